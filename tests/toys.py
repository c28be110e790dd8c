"""A small world to run methods in: a regression on 97 weights, clients of uneven size, whole runs in milliseconds.

Methods on language read the same rows as sentences of five words and predict the last; classifiers, as three classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedpeptao import FedPepTAO
from fedferret.algorithms.fedprompt import FedPrompt
from fedferret.algorithms.fedptuning import FedPTuning
from fedferret.algorithms.fedptuning_v2 import FedPTuningV2
from fedferret.algorithms.ferret import Ferret
from fedferret.algorithms.spafl_gates import SpaFLGates
from fedferret.algorithms.ssf import SSF
from fedferret.core import rounds, tree
from fedferret.core.algorithm import AnyAlgorithm, Shapes
from fedferret.core.by_round import shapes_by_round
from fedferret.core.clients import ClientChanges
from fedferret.core.exchanges import Body, Failure, Reply
from fedferret.core.guard import Guard
from fedferret.core.keys import Key
from fedferret.core.log import Log
from fedferret.core.metrics import LARGEST_LOSS
from fedferret.core.node import Node
from fedferret.core.robust_pooling import PoolSettings
from fedferret.core.rounds import Plan, RoundRecord, RunState
from fedferret.core.task import Examples, Objective, Task
from fedferret.core.weighting import Bounds
from fedferret.data.batches import IGNORED, Batch
from fedferret.engines.client_store import ClientStore, FolderClientStore
from fedferret.engines.in_process import InProcess
from fedferret.local.first_order import FirstOrder
from fedferret.objectives.next_token import NextToken
from fedferret.tracking import checkpoint
from fedferret.wire import codec
from toy_classifier import THREE_CLASSES, ToyClassifier
from toy_numbers import normal

TRAINING = FirstOrder(learning_rate=0.1, steps=2, batch_size=4)
ONE_BIT = Ferret(**Ferret.presets["one-bit"], training=TRAINING)  # shared directions, and every coordinate travels
INPUTS = 4
WORDS = 8


@dataclass(frozen=True)
class Rows:
    """A batch: inputs (B, 4) and targets (B, 1)."""

    x: Tensor
    y: Tensor

    @property
    def labels(self) -> Tensor:
        """The rows as examples of three classes, (B,): in what range the target lies."""
        return (self.y[:, 0] > -0.5).long() + (self.y[:, 0] > 0.5)


@dataclass(frozen=True)
class ToyData:
    """One client's rows. In a fixed order if ``shuffled`` is off, whatever the key."""

    x: Tensor
    y: Tensor
    shuffled: bool = True

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, key: Key | None) -> Iterator[Rows]:
        """All rows once."""
        order = key.permutation(len(self)) if self.shuffled and key else list(range(len(self)))
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            yield Rows(self.x[rows], self.y[rows])

    def take(self, rows: Sequence[int]) -> ToyData:
        """Some rows, in this order."""
        return ToyData(self.x[list(rows)], self.y[list(rows)], self.shuffled)


class Failing(ToyData):
    """A client that breaks in the middle of its training, after gradients exist."""

    def batches(self, size: int, key: Key | None) -> Iterator[Rows]:
        """One good batch, then none."""
        yield next(super().batches(size, key))
        raise OSError("the disk is gone")

    def take(self, rows: Sequence[int]) -> Failing:
        """Some rows, which break too."""
        return Failing(self.x[list(rows)], self.y[list(rows)], self.shuffled)


def toy_rows(key: Key, count: int) -> ToyData:
    """Rows of one law, y = tanh of a fixed direction, seen under noise."""
    x = normal(key.fold("x"), count, INPUTS)
    return ToyData(
        x, torch.tanh(x @ torch.tensor([[1.0], [-1.0], [0.5], [0.0]])) + 0.05 * normal(key.fold("y"), count, 1)
    )


def toy_clients(count: int = 3) -> dict[str, Examples]:
    """Clients "a", "b", ... of 9, 12, 15, ... rows."""
    return {chr(ord("a") + number): toy_rows(Key.of(7, "client", number), 9 + 3 * number) for number in range(count)}


HELD_OUT = toy_rows(Key.of(7, "held out"), 64)


def toy_model() -> nn.Module:
    """Two linear layers: four tensors, 97 weights."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, 1))
    return drawn(model, Key.of(7, "model"))


def toy_classifier() -> nn.Module:
    """A body and a head: four tensors, 51 weights."""
    with torch.random.fork_rng(devices=[]):
        model = ToyClassifier(INPUTS)
    return drawn(model, Key.of(7, "classifier"))


@torch.no_grad()
def drawn(model: nn.Module, key: Key) -> nn.Module:
    """The model with weights that the key draws."""
    for name, weight in model.named_parameters():
        weight.copy_(0.5 * normal(key.fold(name), *weight.shape))
    return model


class SquaredError:
    """The regression's objective: the mean squared error over a batch, times ``factor``."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    @property
    def sums(self) -> Mapping[str, float]:
        """The summed loss."""
        return {"loss": LARGEST_LOSS}

    def check_sums(self, sums: Mapping[str, float]) -> None:
        """Any loss can be."""

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        """The mean over a batch."""
        return self.factor * nn.functional.mse_loss(model(rows.x), rows.y)

    def scores(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        """Sums over a batch."""
        return {"loss": float(self.loss(model, rows)) * len(rows.x), "count": float(len(rows.x))}


class Given(SquaredError):
    """An objective with a loss that a test writes: ``loss(model, rows)``."""

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        self.loss = loss  # type: ignore[method-assign]


class LastWord:
    """The objective of methods that need a language model: the rows as sentences, the last word predicted."""

    def __init__(self) -> None:
        self.next_token = NextToken()

    @property
    def sums(self) -> Mapping[str, float]:
        """The summed loss."""
        return self.next_token.sums

    def check_sums(self, sums: Mapping[str, float]) -> None:
        """The language model's."""
        self.next_token.check_sums(sums)

    def loss(self, model: nn.Module, rows: Rows) -> Tensor:
        """The mean over a batch."""
        return self.next_token.loss(model, sentences(rows))

    def scores(self, model: nn.Module, rows: Rows) -> dict[str, float]:
        """Sums over a batch."""
        return self.next_token.scores(model, sentences(rows))


def toy_language_model(blocks: int = 1) -> nn.Module:
    """A Llama of few blocks, eight weights wide, that knows eight words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 16}
    key = Key.of(7, "language model")
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, num_attention_heads=2, **sizes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(0.5 * normal(key.fold(name), *weight.shape))
    return model


def sentences(rows: Rows) -> Batch:
    """Every row as five words, which say in what range its numbers lie; the last, the target's, is to be predicted."""
    words = ((torch.cat((rows.x, rows.y), dim=1) + 2) * 2).long().clamp(0, WORDS - 1)
    labels = torch.full_like(words, IGNORED)
    labels[:, -1] = words[:, -1]
    return Batch(words, torch.ones_like(words), labels)


def toy_task(rounds: int, algorithm: AnyAlgorithm | None = None) -> Task:
    """The regression, the classes or the last words, with a model of its own that is prepared for ``algorithm``."""
    classes = algorithm is not None and algorithm.objectives == ("classification",)
    language = isinstance(algorithm, FedPrompt | FedPTuning | FedPTuningV2 | FedPepTAO | SSF | SpaFLGates)
    blocks = 3 if isinstance(algorithm, FedPepTAO) and algorithm.layers != 1 else 1  # it chooses among them
    model = toy_language_model(blocks) if language else toy_classifier() if classes else toy_model()
    if algorithm:
        model = algorithm.prepare(model, Key.of(7, "prepare"))
    objective: Objective = LastWord() if language else THREE_CLASSES if classes else SquaredError()
    return Task.of(model, objective, rounds)


def shapes_of(algorithm: AnyAlgorithm, rounds: int) -> Callable[[int], Shapes]:
    """The shapes of the toy task's tensors that are tuned in each round."""
    return shapes_by_round(algorithm, toy_task(rounds, algorithm).model, rounds)


SHAPES = {name: tuple(weight.shape) for name, weight in toy_model().named_parameters()}


class Backwards:
    """An engine with outcomes in the reverse of the order in which they were asked for."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def exchange(self, bodies: Mapping[str, Body], state: RunState) -> Iterable[Reply | Failure]:
        """All of them, the last first."""
        return list(self.engine.exchange(bodies, state))[::-1]

    def commit(self, round: int, refused: Sequence[str]) -> None:
        """The engine's."""
        self.engine.commit(round, refused)

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class Simulation:
    """A run and what it was made of."""

    algorithm: AnyAlgorithm
    task: Task
    engine: Any
    store: ClientStore
    state: RunState
    records: list[RoundRecord]
    data: Mapping[str, Examples]
    seed: int

    @property
    def public(self) -> bytes:
        """The public state, to the bit."""
        return codec.encode(self.state.public)

    @property
    def memory(self) -> bytes:
        """All that must be the same for two runs to be the same: every memory and the log."""
        private = {client: self.store.get(client) for client in self.data}
        update = self.state.log.since(0)
        return codec.encode(
            (self.state.public, self.state.server, private, self.state.versions, update.snapshot, update.records)
        )

    def history(self) -> list[RoundRecord]:
        """The records without their timings."""
        return [untimed(record) for record in self.records]

    def loss(self) -> float:
        """On held-out rows: the global model's, or the mean over the clients' models."""
        with self.algorithm.model(self.task, self.state.public) as model:
            if model is not None:
                return held_out_loss(self.task, model)
        losses = []
        for client in self.data:
            with self.algorithm.model(self.task, self.state.public, self.store.get(client)) as model:
                assert model is not None
                losses.append(held_out_loss(self.task, model))
        return sum(losses) / len(losses)


@torch.no_grad()
def held_out_loss(task: Task, model: nn.Module) -> float:
    """The mean over the held-out rows."""
    return float(task.objective.loss(model, Rows(HELD_OUT.x, HELD_OUT.y)))


def untimed(record: RoundRecord) -> RoundRecord:
    """The record with its seconds taken out."""
    metrics = {c: {k: v for k, v in values.items() if k != "seconds"} for c, values in record.metrics.items()}
    return replace(record, metrics=metrics, seconds=0.0, seconds_local=0.0, seconds_saving=0.0)


MakeEngine = Callable[[Mapping[str, Examples], Any, ClientStore], Any]


def simulate(
    algorithm: AnyAlgorithm,
    rounds_: int,
    *,
    data: Mapping[str, Examples] | None = None,
    first: Sequence[str] = (),
    until: int | None = None,
    per_round: int | None = None,
    min_clients: int = 1,
    bounds: Bounds | None = None,
    pool: PoolSettings | None = None,
    guards: Sequence[Guard] = (),
    seed: int = 3,
    folder: Path | None = None,
    engine: MakeEngine = InProcess,
    arriving: Callable[[Any], Any] = lambda engine: engine,
    task: Task | None = None,
    keeps_states: bool = True,
    history: int = 10,
    on_outcome: Callable[[Reply | Failure], None] = lambda outcome: None,
    changes: Callable[[int], ClientChanges] = lambda number: ClientChanges(),
) -> Simulation:
    """Run ``rounds_`` rounds (or stop after ``until`` of them); with a folder, go on from what it holds.

    The list of clients begins with ``first``, or all; ``changes`` are asked for as a round begins.
    """
    data, task = data or toy_clients(), task or toy_task(rounds_, algorithm)
    plan = Plan(
        seed,
        rounds_,
        per_round or len(data),
        min_clients,
        bounds=bounds,
        pool=pool or PoolSettings(),
        fingerprint_every=1,
    )
    node, server = Node.start(task, algorithm, seed, codec, guards=guards)
    if folder and checkpoint.saved_round(folder) is not None:
        state = checkpoint.resume(folder, node, server, history)
    else:
        state = RunState(node, server, Log(folder / "log" if folder else None, history))
    kept = kept_rounds(algorithm, state) if folder and keeps_states else {}  # sites keep their clients' states
    store = FolderClientStore(folder / "clients", codec, kept, history) if folder else ClientStore()
    running = arriving(engine(data, codec, store))
    simulation = Simulation(algorithm, task, running, store, state, [], data, seed)
    if state.round >= (until or rounds_):
        return simulation
    save = (lambda record: checkpoint.save(folder, state)) if folder else (lambda record: None)

    def clients(number: int) -> list[str]:
        state.changes |= changes(number)
        return state.changes.applied(first or data)

    for record in rounds.run(running, clients, state, plan, on_outcome, save):
        simulation.records.append(record)
        if record.round == until:
            break
    return simulation


def kept_rounds(algorithm: AnyAlgorithm, state: RunState) -> dict[str, int]:
    """The last counted round of each client that keeps a private state here."""
    shapes = shapes_of(algorithm, state.node.task.rounds)
    counted = {client: version + 1 for client, version in state.versions.items()}
    return {
        client: number
        for client, number in counted.items()
        if algorithm.wire_cost(shapes(number), len(counted), number).client_state_bytes
    }


def bits(value: Any) -> bytes:
    """A state or message to the bit."""
    return codec.encode(value)


def weights(simulation: Simulation) -> dict[str, Tensor]:
    """The global model's weights, copied."""
    with simulation.algorithm.model(simulation.task, simulation.state.public) as model:
        assert model is not None
        return tree.clone(tree.parameters(model))
