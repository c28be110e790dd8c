"""A run from a recipe: build the parts, play the rounds, measure, and leave a folder that explains itself.

    recipe -> check (seconds, no weights)  -> model, data, engine -> rounds -> events, summary, report

The folder is resumable after every round: `run` continues a folder that holds an unfinished run of the same recipe.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedferret import models
from fedferret.config import Recipe
from fedferret.core import rounds, tree
from fedferret.core.algorithm import Task
from fedferret.core.allocator import return_large_blocks
from fedferret.core.errors import RunError, UserError
from fedferret.core.keys import Key
from fedferret.core.log import Log
from fedferret.core.mapped import MappedTree
from fedferret.core.rounds import RoundRecord, RunState
from fedferret.data.batches import FederatedTokens
from fedferret.data.examples import FederatedData
from fedferret.data.sites import Sites
from fedferret.data.templates import NO_CHAT_TEMPLATE, Chat, template
from fedferret.engines.client_store import ClientStore, FolderClientStore
from fedferret.engines.debug import Debug
from fedferret.engines.in_process import InProcess
from fedferret.engines.remote import Remote
from fedferret.engines.simulation import simulation
from fedferret.engines.transport import Transport
from fedferret.evaluation.evaluator import Evaluator, Results, Scores
from fedferret.evaluation.loss import evaluate
from fedferret.evaluation.personal import fairness
from fedferret.evaluation.scorers import check_metrics
from fedferret.local.response_loss import ResponseLoss, learns_prompt
from fedferret.models import LanguageModel
from fedferret.tracking import checkpoint, events
from fedferret.wire import codec

ENGINES = {"in-process": InProcess, "debug": Debug}


def check(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Everything that can be known to be wrong before weights are read. Returns the trainable tensors' shapes."""
    models.check(recipe.model.name, device=recipe.execution.device)
    if template(recipe.text.template) == Chat() and not models.has_chat_template(recipe.model.name):
        raise UserError(f'text.template="{recipe.text.template}": {NO_CHAT_TEMPLATE}')
    model = rounds.prepare(recipe.algorithm, models.skeleton(recipe.model.name), recipe.seed)
    if recipe.text.packed and learns_prompt(model):
        raise UserError(
            f"text.packed=true: {recipe.algorithm.name} puts a prompt before every row, and a packed row holds many "
            f"examples; set packed=false"
        )
    shapes = {name: tuple(weight.shape) for name, weight in tree.parameters(model).items()}
    recipe.algorithm.check(shapes, recipe.rounds)
    return shapes


def load_data(recipe: Recipe, elsewhere: bool = False) -> FederatedData:
    """Who holds what, with the counts checked against the recipe; ``elsewhere``: sites hold it. Raises UserError."""
    data = recipe.data.load(Key.of(recipe.seed, "data"))
    if recipe.clients.per_round > len(data.clients):
        raise UserError(
            f"clients.per_round={recipe.clients.per_round}: the data has {len(data.clients)} clients, "
            f"set per_round to at most that"
        )
    for client, examples in data.clients.items():
        if not examples and not elsewhere:
            raise UserError(f"client {client!r} holds no example: give it data or leave it out")
    if isinstance(recipe.data, Sites) and not data.held_out:
        if recipe.evaluation.metrics != ("loss",):
            raise UserError("evaluation.metrics: there is nothing to evaluate on here; set data.held_out_path")
        return data
    if not data.held_out or not all(data.held_out.values()):
        raise UserError("no held-out example is left to evaluate on: hold out a larger share of the data")
    check_metrics(recipe.evaluation.metrics, data.held_out)
    return data


def check_base(run: Path, fingerprint: str) -> None:
    """Raise RunError where the folder ``run`` is of a run from other weights than those with this SHA-256.

    Where all weights are tuned, replaying the log would find out; the log of an adapter fits any base.
    """
    known = events.read(run).start.get("base", fingerprint) if (run / events.FILE).exists() else fingerprint
    if known != fingerprint:
        raise RunError(
            f"{run} began from a base with SHA-256 {known[:12]}…, and this one has {fingerprint[:12]}…: "
            f"give it the weights that it began from"
        )


@dataclass
class Experiment:
    """A recipe with its parts loaded: what the command line, the library and the tests play rounds with."""

    recipe: Recipe
    language_model: LanguageModel
    data: FederatedData
    folder: Path | None = None  # where public weights wait under memory = "lean", and runs are written
    transport: Transport | None = None  # to sites that hold the data; None: everything is on this machine or cluster
    model: nn.Module = field(init=False)  # what is tuned: the base, with the method's adapter in it if it has one
    base_size: int = field(init=False)  # weights of the base alone
    base_fingerprint: str = field(init=False)  # SHA-256 of those

    def __post_init__(self) -> None:
        base = tree.parameters(self.language_model.model)
        self.base_size, self.base_fingerprint = tree.size(base), tree.fingerprint(base)
        self.model = rounds.prepare(self.recipe.algorithm, self.language_model.model, self.recipe.seed)

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        folder: Path | None = None,
        log: Callable[[str], None] = print,
        transport: Transport | None = None,
    ) -> Experiment:
        """Check, then load data and model. Raises UserError for whatever the recipe gets wrong."""
        check(recipe)
        data = load_data(recipe, elsewhere=transport is not None)
        return cls.over(recipe, data, folder, log, transport)

    @classmethod
    def over(
        cls,
        recipe: Recipe,
        data: FederatedData,
        folder: Path | None = None,
        log: Callable[[str], None] = print,
        transport: Transport | None = None,
    ) -> Experiment:
        """The recipe with this data, whatever its own source is."""
        model = models.load(recipe.model.name, device=recipe.execution.device, log=log)
        return cls(recipe, model, data, folder, transport)

    @cached_property
    def tokens(self) -> FederatedTokens:
        """The data as tokens, client by client, made when first asked for."""
        text = self.recipe.text
        tokenizer = self.language_model.tokenizer
        learn_prompts = text.train_on == "all"
        return FederatedTokens(
            self.data, template(text.template), tokenizer, text.max_tokens, text.packed, learn_prompts
        )

    @cached_property
    def loss(self) -> ResponseLoss:
        """The loss that is trained and reported."""
        return ResponseLoss(self.model)

    @cached_property
    def evaluator(self) -> Evaluator:
        """What scores models."""
        text, asked = self.recipe.text, self.recipe.evaluation
        return Evaluator(
            tokens=self.tokens,
            template=template(text.template),
            tokenizer=self.language_model.tokenizer,
            max_tokens=text.max_tokens,
            loss=self.loss,
            key=Key.of(self.recipe.seed, "examples to answer"),
            metrics=asked.metrics,
            batch_size=asked.batch_size,
            generate_examples=asked.generate_examples,
            max_new_tokens=asked.max_new_tokens,
            per_client=asked.per_client,
        )

    @cached_property
    def task(self) -> Task:
        """What every method sees."""
        return Task(self.model, self.loss, self.recipe.rounds, self._store)

    def plan(self) -> rounds.Plan:
        """How the rounds are run."""
        clients = self.recipe.clients
        return rounds.Plan(
            self.recipe.seed,
            self.recipe.rounds,
            clients.per_round,
            clients.min_clients,
            clients.min_fraction,
            clients.max_examples,
        )

    def initial_state(self) -> RunState:
        """The state before round 1, or after the last finished round of the run in ``folder``.

        Raises RunError where that run began from another base, or this machine rebuilds other weights.
        """
        if self.folder and checkpoint.saved_round(self.folder) is not None:
            check_base(self.folder, self.base_fingerprint)
            return checkpoint.resume(self.folder, self.task, self.recipe.algorithm, self.recipe.seed)
        log = Log(self.folder / "log" if self.folder else None)
        return rounds.initial_state(self.task, self.recipe.algorithm, self.recipe.seed, log)

    def engine(
        self,
        state: RunState,
        on_client_start: Callable[[str], None] = lambda client: None,
        log: Callable[[str], None] = lambda line: None,
        record: Callable[[Mapping[str, Any]], None] = lambda event: None,
    ) -> InProcess | Remote:
        """The engine of the recipe, with the clients' private states as they were after ``state.round``. Close it.

        ``log`` hears what an operator should know, ``record`` of every letter, where there are letters.
        """
        folder = self.folder and self.folder / "state" / "clients"
        store = FolderClientStore(folder, codec, state.round) if folder else ClientStore()
        execution = self.recipe.execution
        if self.transport is None and execution.engine in ENGINES:
            return ENGINES[execution.engine](self.tokens, codec, store, on_client_start)
        workers = None if self.transport else simulation(execution, self.folder)
        return Remote(
            self.transport or workers,  # type: ignore[arg-type]  # one of them is there
            codec,
            recipe=self.recipe.identity_toml(),
            base=self.base_fingerprint,
            deadline=execution.deadline,
            workers=workers.workers if workers else (),
            store=store,
            on_client_start=on_client_start,
            log=log,
            record=record,
        )

    def play(
        self,
        state: RunState,
        engine: InProcess | Remote,
        on_reply: Callable[[rounds.ClientUpdate | rounds.Failure], None] = lambda outcome: None,
        on_round: Callable[[RoundRecord], None] = lambda record: None,
    ) -> Iterator[RoundRecord]:
        """The rounds after ``state.round``; each is committed before it is yielded.

        ``on_round`` hears of a round just before: what it writes of a round that a crash undoes, it will write again.
        """
        records = rounds.run(
            self.task, self.recipe.algorithm, engine, codec, list(self.data.clients), state, self.plan(), on_reply
        )
        for record in records:
            engine.store.withdraw(failure.client for failure in record.failures)
            on_round(record)
            if self.folder:
                checkpoint.save(self.folder, state)
            engine.store.commit(record.round)  # after the checkpoint: it removes the states from before this round
            yield record

    def score(
        self,
        state: RunState,
        engine: InProcess | Remote,
        on_progress: Callable[[], None] = lambda: None,
        extra: bool = False,
    ) -> Scores:
        """What ``[evaluation]`` asks for on every held-out set, in fp32, beside the losses only if ``extra``: of the
        global model, or where there is none, the mean over the models of (at most 8 of) the clients that have trained.
        Nothing where nothing is held out here, or where those models stay at their sites.
        """
        algorithm = self.recipe.algorithm
        if not self.data.held_out:
            return Scores({}, {})
        with algorithm.model(self.task, state.public) as model:
            if model is not None:
                return self.evaluator.score(model, extra, on_progress)
        if self.transport is not None:
            return Scores({}, {})
        personal: list[Results] = []
        losses: dict[str, float] = {}
        for number, client in enumerate(sorted(state.versions)):
            if number >= 8 and not self.recipe.evaluation.per_client:
                break
            with algorithm.model(self.task, state.public, engine.store.get(client)) as model:
                assert model is not None, f"{algorithm.name} gives client {client} no model to run"
                if number < 8:
                    personal.append(self.evaluator.score(model, extra, on_progress).results)
                own = self.evaluator.own_loss(model, client) if self.recipe.evaluation.per_client else None
                if own is not None:
                    losses[client] = own
        results = {
            name: {key: statistics.fmean(scores[name][key] for scores in personal) for key in personal[0][name]}
            for name in (self.data.held_out if personal else ())
        }
        if losses:
            results[next(iter(results))] |= fairness(losses)
        return Scores(results, losses)

    def local_only(
        self, base: Mapping[str, Tensor], on_progress: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """The yardstick: some clients train alone from the base for as many rounds as they would be asked for.

        Returns each one's loss on the main held-out set. ``base`` is a copy of what the weights were before tuning.
        """
        recipe, model = self.recipe, self.model
        training = getattr(recipe.algorithm, "training", None)
        count = min(recipe.evaluation.local_only_clients, len(self.data.clients)) if training else 0
        if self.transport is not None or not self.data.held_out:
            return {}
        main = next(iter(self.data.held_out))
        losses: dict[str, float] = {}
        for client in Key.of(recipe.seed, "local-only").sample(sorted(self.data.clients), count):
            tree.copy_(tree.parameters(model), base)
            for number in range(1, recipe.rounds + 1):
                assert training is not None
                training.train(self.task, self.tokens[client], Key.of(recipe.seed, "local-only", number, client))
                on_progress()
            score = evaluate(model, self.loss, self.tokens.held_out(main), recipe.evaluation.batch_size)
            losses[client] = score.loss
        tree.copy_(tree.parameters(model), base)
        return losses

    def _store(self, weights: Mapping[str, Tensor]) -> tree.Tree:
        idle = self.transport is not None and not self.data.held_out  # a server that neither trains nor evaluates
        if self.recipe.execution.memory == "lean" or idle:
            return_large_blocks()
            folder = self.folder / "state" if self.folder else Path(tempfile.gettempdir())
            return MappedTree(folder / f".weights-{os.getpid()}", weights)
        device = self.task.device
        return {name: weight.detach().to(device, copy=True) for name, weight in weights.items()}
