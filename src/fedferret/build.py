"""The parts of a recipe: model, data, objective, task, node, evaluator. Where clients run is no part of it.

    recipe -> check (seconds, no weights) -> Parts (model and data loaded) -> node

A run's process, a site, a simulation's worker and an export are built from the same parts.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from fedferret import precision
from fedferret.config import ModelSettings, Recipe
from fedferret.core import rounds, tree
from fedferret.core.algorithm import AnyAlgorithm, Shapes
from fedferret.core.allocator import return_large_blocks
from fedferret.core.by_round import shapes_by_round
from fedferret.core.errors import UserError
from fedferret.core.hand_over import Stage
from fedferret.core.keys import Key
from fedferret.core.mapped import MappedTree
from fedferret.core.node import Node
from fedferret.core.stages import Staged
from fedferret.core.task import Task
from fedferret.data.encoded import EncodedData
from fedferret.data.examples import FederatedData
from fedferret.data.held_out import hold_out, nothing_held_out
from fedferret.data.sites import Sites
from fedferret.data.table import Table
from fedferret.data.template_probes import fitted
from fedferret.data.templates import template_of
from fedferret.evaluation.answers import Answers
from fedferret.evaluation.evaluator import Evaluator
from fedferret.evaluation.generation import prompt_room
from fedferret.evaluation.scorers import check_metrics
from fedferret.models.adapters import adapter_of, prefix_of
from fedferret.models.devices import resolve_device
from fedferret.objectives.interface import Loaded, ModelObjective
from fedferret.objectives.next_token import NextToken
from fedferret.wire import codec

P = TypeVar("P", bound="Parts")


def prepare(algorithm: AnyAlgorithm, model: nn.Module, seed: int) -> nn.Module:
    """What the method tunes of the base ``model``: on every node of a run the same, to the bit."""
    return algorithm.prepare(model, Key.of(seed, "prepare"))


def tuned_skeleton(recipe: Recipe) -> nn.Module:
    """What the recipe tunes, on the meta device: names and shapes, no values. Raises UserError."""
    model = recipe.objective.skeleton(recipe.model.name)
    if recipe.model.train == "head":
        recipe.objective.freeze(model)
    return prepare(recipe.algorithm, model, recipe.seed)


def load_base(
    objective: ModelObjective,
    settings: ModelSettings,
    device: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Loaded, str]:
    """The base model, and the SHA-256 of all its values before they are quantised, the frozen ones too.

    Args:
        objective: says what kind of model it is.
        settings: which model, in which precision, and what of it is trained.
        device: to compute on.
        log: called with lines on slow steps.

    Raises:
        UserError: there is no such model.
    """
    loaded = precision.load(objective, settings, device, log)
    fingerprint = freeze_base(objective, loaded.model, settings.train)
    precision.put_on_device(settings, loaded.model, device)
    return loaded, fingerprint


def freeze_base(objective: ModelObjective, model: nn.Module, train: str | None) -> str:
    """Freeze what is not to be trained of a base.

    Args:
        objective: says which part is the head.
        model: changed in place.
        train: "head" freezes all but a classifier's head; None: nothing.

    Returns:
        SHA-256 of the base's weights, frozen or not, and of the statistics that its layers have gathered, if any.

    Raises:
        UserError: the model has no head that can be trained alone.
    """
    if train == "head":
        objective.freeze(model)
    kept = model.state_dict()
    gathered = {name: each for name, each in model.named_buffers() if name in kept and each.is_floating_point()}
    return tree.fingerprint({**{name: each.detach() for name, each in model.named_parameters()}, **gathered})


def check(recipe: Recipe) -> Callable[[int], Shapes]:
    """Refuse everything that can be known to be wrong before weights are read.

    Returns:
        The shapes of the tensors that are tuned in each round.

    Raises:
        UserError: the recipe cannot run: its model, template, data or method's settings.
    """
    resolve_device(recipe.execution.device)
    recipe.objective.check(recipe.model.name, recipe.text)
    algorithm = recipe.algorithm
    if recipe.model.train == "head" and isinstance(algorithm, Staged) and len(algorithm.planned(recipe.rounds)) > 1:
        raise UserError(
            f'model.train="head": {algorithm.name} has several stages, and each after the first would train all '
            f"weights; leave train out"
        )
    model = tuned_skeleton(recipe)
    if recipe.model.train == "head" and adapter_of(model) is not None:
        raise UserError(
            f'model.train="head": {algorithm.name} tunes an adapter in the frozen model, and the head beside it; '
            f"leave train out"
        )
    if recipe.text.packed and prefix_of(model, 1) is not None:
        raise UserError(
            f"text.packed=true: {algorithm.name} puts a prompt before every row, and a packed row holds many "
            f"examples; set packed=false"
        )
    batch = max((training.batch_size for training in _trainings(algorithm)), default=1)
    recipe.objective.check_tuned(recipe.model.name, model, recipe.text, batch * recipe.text.max_tokens)
    if set(recipe.evaluation.metrics) - {"loss", "choice"}:
        prompt_room(model, recipe.text.max_tokens, recipe.evaluation.max_new_tokens)
    for training in _trainings(algorithm):
        training.check(model, recipe.model.name)
    precision.check(recipe, model)
    algorithm.check(model, recipe.rounds)
    if isinstance(recipe.data, Table) and not (recipe.data.holds_out or recipe.held_out_share):
        raise UserError(
            f"data.held_out_fraction={recipe.data.held_out_fraction:g}: nothing is held out to evaluate on; hold a "
            f"share out, or set data.held_out_path, data.held_out_categories or clients.held_out"
        )
    return shapes_by_round(algorithm, model, recipe.rounds)


def _trainings(algorithm: AnyAlgorithm) -> list[Any]:
    """How clients train, in every stage that has rounds."""
    stages = algorithm.stages() if isinstance(algorithm, Staged) else (Stage(algorithm),)
    found = [getattr(stage.algorithm, "training", None) for stage in stages if stage.rounds != 0]
    return [training for training in found if training is not None]


def load_data(recipe: Recipe, at_sites: bool = False, log: Callable[[str], None] = lambda line: None) -> FederatedData:
    """The clients' data, with the counts checked against the recipe.

    Args:
        recipe: with the data's source.
        at_sites: sites hold the examples; here is only what is held out.
        log: called with the data's notes, and with a line on clients that hold nothing out.

    Raises:
        UserError: too few clients, an empty client, nothing to evaluate on, or metrics that do not apply.
    """
    data = recipe.data.load(Key.of(recipe.seed, "data"))
    for note in data.notes:
        log(note)
    if recipe.held_out_share and not at_sites:
        data = hold_out(data, recipe.held_out_share, Key.of(recipe.seed, "held out"), log)
    if recipe.clients.per_round > len(data.clients):
        raise UserError(
            f"clients.per_round={recipe.clients.per_round}: the data has {len(data.clients)} clients, "
            f"set per_round to at most that"
        )
    for client, examples in data.clients.items():
        if not examples and not at_sites:
            raise UserError(f"client {client!r} holds no example: give it data or leave it out")
    recipe.objective.check_template(recipe.model.name, recipe.text, data)
    if isinstance(recipe.data, Sites) and not data.held_out:
        if recipe.evaluation.metrics != ("loss",):
            raise UserError("evaluation.metrics: there is nothing to evaluate on here; set data.held_out_path")
        return data
    if not data.held_out or not all(data.held_out.values()):
        raise UserError(nothing_held_out(data, getattr(recipe.data, "client_column", None)))
    check_metrics(recipe.evaluation.metrics, data.held_out)
    scoring, global_model = len(data.client_held_out), recipe.algorithm.has_global_model
    fewest = 1 if global_model else len(data.clients)  # without a global model these are all figures
    if (recipe.scores_clients or not global_model) and not at_sites and scoring < fewest:
        log(
            f"Of {len(data.clients)} clients {scoring} hold anything out, and no other client scores a model: set "
            f"clients.held_out, such as 0.2."
        )
    recipe.objective.check_examples(recipe.model.name, data, complete=not at_sites)
    if not at_sites:
        _check_largest_class(recipe.algorithm, data)
    return data


def _check_largest_class(algorithm: AnyAlgorithm, data: FederatedData) -> None:
    """Refuse a fewest number of examples of a class that no client has of any. Raises UserError."""
    stages = algorithm.stages() if isinstance(algorithm, Staged) else (Stage(algorithm),)
    for fewest in (getattr(stage.algorithm, "min_examples", 1) for stage in stages if stage.rounds != 0):
        if fewest > 2:  # else a client that cannot take part is one failure
            counts = (Counter(each.response for each in rows) for rows in data.clients.values())
            largest = max((max(each.values()) for each in counts if each), default=0)
            if fewest > largest:
                raise UserError(
                    f"min_examples={fewest}: no client has more than {largest} examples of one class, so none could "
                    f"take part; give at most that"
                )


@dataclass
class Parts:
    """A recipe with its parts loaded.

    Attributes:
        recipe: resolved.
        loaded: the base model with its tokenizer, if it reads text.
        data: of all clients, or of the one site that this is.
        folder: of the run, where weights wait under memory = "lean"; None keeps nothing on disk.
        trains_here: whether clients work in this process or on this machine, rather than at sites.
        model: what is tuned: the base, with the method's adapter if it has one.
        examples: the data as tensors, client by client, made when first asked for.
        base_size: weights of the base alone.
        base_fingerprint: SHA-256 of those, and of an adapter that the method goes on from, if any.
        notes: lines for the user on how the data were read and what becomes of the examples.
    """

    recipe: Recipe
    loaded: Loaded
    data: FederatedData
    folder: Path | None = None
    trains_here: bool = True
    model: nn.Module = field(init=False)
    examples: EncodedData = field(init=False)
    base_size: int = field(init=False)
    base_fingerprint: str = field(init=False)
    notes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.base_size = sum(weight.numel() for weight in self.loaded.model.parameters())
        base = freeze_base(self.objective, self.loaded.model, self.recipe.model.train)
        self.base_fingerprint = self.recipe.algorithm.start_fingerprint(base)
        precision.put_on_device(self.recipe.model, self.loaded.model, self.recipe.execution.device)
        checked = self.objective.check_encoding(self.loaded, self.recipe.text, self.data)
        self.notes = (*self.data.notes, *checked)
        self.examples = EncodedData(self.data, self.objective.encoder(self.loaded, self.recipe.text))
        self.model = prepare(self.recipe.algorithm, self.loaded.model, self.recipe.seed)
        self.objective.check_loaded(self.loaded, self.model, self.recipe.text)
        if not self.objective.reads_every_token(self.loaded):  # then all data are read now, not in round 1
            for client in self.examples:
                _ = self.examples[client]
            for name in self.data.held_out:
                self.examples.held_out(name)

    @classmethod
    def over(
        cls: type[P],
        recipe: Recipe,
        data: FederatedData,
        folder: Path | None = None,
        log: Callable[[str], None] = print,
        **options: Any,
    ) -> P:
        """The recipe with this data, whatever source the recipe names; the model is loaded.

        Args:
            recipe: resolved and checked.
            data: of the clients that are to train here, and what is held out.
            folder: of the run; None keeps nothing on disk.
            log: called with lines on slow steps.
            options: further fields of a subclass.
        """
        loaded = precision.load(recipe.objective, recipe.model, recipe.execution.device, log)
        parts = cls(recipe, loaded, data, folder, **options)
        for note in parts.notes[len(data.notes) :]:  # those of the data were logged as they were read
            log(note)
        return parts

    @property
    def objective(self) -> ModelObjective:
        """What is trained and scored."""
        return self.recipe.objective

    @cached_property
    def evaluator(self) -> Evaluator:
        """What scores models on the held-out sets."""
        asked, text = self.recipe.evaluation, self.recipe.text
        answers = None
        if asked.metrics != ("loss",):
            tokenizer, key = self.loaded.tokenizer, Key.of(self.recipe.seed, "examples to answer")
            assert isinstance(self.objective, NextToken) and tokenizer is not None  # others are refused
            answers = Answers(
                held_out=self.data.held_out,
                template=fitted(template_of(text), tokenizer),
                tokenizer=tokenizer,
                max_tokens=text.max_tokens,
                objective=self.objective,
                key=key,
                metrics=asked.metrics,
                batch_size=asked.batch_size,
                generate_examples=asked.generate_examples,
                max_new_tokens=asked.max_new_tokens,
            )
        return Evaluator(self.examples, self.objective, asked.batch_size, answers)

    @cached_property
    def task(self) -> Task:
        """What every method sees."""
        return Task.of(self.model, self.objective, self.recipe.rounds, self._store)

    def start_node(self) -> tuple[Node, Any]:
        """A node before round 1, and the server's own state."""
        return Node.start(self.task, self.recipe.algorithm, self.recipe.seed, codec)

    def plan(self) -> rounds.Plan:
        """How the rounds are run."""
        recipe = self.recipe
        return rounds.Plan(
            recipe.seed,
            recipe.rounds,
            recipe.clients.per_round,
            recipe.clients.min_clients,
            recipe.clients.min_fraction,
            recipe.clients.bounds(),
            recipe.pool,
            recipe.execution.deadline,
        )

    def _store(self, weights: Mapping[str, Tensor]) -> tree.Tree:
        idle = not self.trains_here and not self.data.held_out  # a server that neither trains nor evaluates
        if self.recipe.execution.memory == "lean" or idle:
            return_large_blocks()
            return MappedTree(self.folder / "state" if self.folder else Path(tempfile.gettempdir()), weights)
        device = self.task.device
        return {name: weight.detach().to(device, copy=True) for name, weight in weights.items()}
