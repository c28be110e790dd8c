"""Three methods that have little in common, to know that the contract carries more than it was written for.

drift        a mean of changes; the server alone remembers a velocity           public, server          MEAN
prototypes   one round; every client's class means are kept side by side         public                  EACH
hermits      every client keeps a model of its own; only a census is shared      public, client          SUM
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Payload, Pooled, Pooling, Shapes, WireCost
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from toys import TRAINING, ToyData


def num_weights(shapes: Shapes) -> int:
    """d."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@state
class DriftPublic:
    weights: Tree


@state
class DriftServer:
    velocity: Tree


@message
class DriftReply(Payload["DriftReply"]):
    change: dict[str, Tensor]


@message
class DriftEntry:
    step: dict[str, Tensor]


@dataclass(frozen=True)
class Drift(Algorithm[DriftPublic, DriftServer, None, DriftEntry, DriftReply]):
    """The mean of changes drives a velocity that the server keeps to itself. Wire: 4 d bytes both ways."""

    name: ClassVar[str] = "drift"
    weighting: ClassVar[str] = "examples"

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        return WireCost.exact(4 * num_weights(shapes), 4 * num_weights(shapes))

    def init(self, task: Task, key: Key) -> tuple[DriftPublic, DriftServer]:
        weights = task.store(tree.parameters(task.model))
        return DriftPublic(weights), DriftServer(tree.zeros_like(weights))

    def client_update(
        self, task: Task, public: DriftPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, DriftReply]:
        tree.copy_(tree.parameters(task.model), public.weights)
        trained = TRAINING.train(task, data, key)
        change = dict(tree.difference(public.weights, tree.parameters(task.model)))
        return ClientReply(DriftReply(change), None, trained.metrics)

    def server_update(
        self, task: Task, public: DriftPublic, server: DriftServer, pooled: Pooled[DriftReply], key: Key
    ) -> tuple[DriftServer, DriftEntry]:
        change = pooled.only.change
        velocity = {name: 0.5 * value + change[name].to(value.device) for name, value in server.velocity.items()}
        return DriftServer(velocity), DriftEntry(tree.clone(velocity))

    def apply(self, task: Task, public: DriftPublic, entry: DriftEntry) -> None:
        for name, weight in public.weights.items():
            weight.sub_(entry.step[name].to(weight.device))

    @contextmanager
    def model(self, task: Task, public: DriftPublic, client: None = None) -> Iterator[nn.Module]:
        tree.copy_(tree.parameters(task.model), public.weights)
        yield task.model


@message
class Means(Payload["Means"]):
    """Mean input (2, 4) and mean target (2, 1) of the rows below and above zero."""

    x: Tensor
    y: Tensor


@state
class PrototypesPublic:
    known: tuple[Any, ...]


@message
class PrototypesEntry:
    known: tuple[Any, ...]


class Nearest(nn.Module):
    """Answers with the target of the nearest prototype; 0 where there is none."""

    def __init__(self, known: tuple[Means, ...]) -> None:
        super().__init__()
        self.x = torch.cat([each.x for each in known]) if known else torch.zeros(1, 4)
        self.y = torch.cat([each.y for each in known]) if known else torch.zeros(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.y[torch.cdist(x, self.x).argmin(dim=1)]


@dataclass(frozen=True)
class Prototypes(Algorithm[PrototypesPublic, None, None, PrototypesEntry, Means]):
    """A union in one round. Wire: 40 bytes up; 40 N down."""

    name: ClassVar[str] = "prototypes"
    max_rounds: ClassVar[int | None] = 1

    @property
    def pooling(self) -> Pooling:
        return Pooling.EACH

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        return WireCost(40, 40, 40, 40 * cohort)

    def init(self, task: Task, key: Key) -> tuple[PrototypesPublic, None]:
        return PrototypesPublic(()), None

    def client_update(
        self, task: Task, public: PrototypesPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, Means]:
        (rows,) = data.batches(len(data), key) if len(data) else ()
        sides = [rows.y[:, 0] <= 0, rows.y[:, 0] > 0]
        return ClientReply(Means(*(torch.stack([v[side].mean(0) for side in sides]) for v in (rows.x, rows.y))))

    def server_update(
        self, task: Task, public: PrototypesPublic, server: None, pooled: Pooled[Means], key: Key
    ) -> tuple[None, PrototypesEntry]:
        return None, PrototypesEntry(pooled.sums)

    def apply(self, task: Task, public: PrototypesPublic, entry: PrototypesEntry) -> None:
        public.known = entry.known

    @contextmanager
    def model(self, task: Task, public: PrototypesPublic, client: None = None) -> Iterator[nn.Module]:
        yield Nearest(public.known)


@state
class Census:
    rows: float


@state
class Hermit:
    weights: Tree
    rounds: int


@message
class Head(Payload["Head"]):
    rows: float


@message
class CensusEntry:
    rows: float


@dataclass(frozen=True)
class Hermits(Algorithm[Census, None, Hermit, CensusEntry, Head]):
    """Private models, a public count of rows. Wire: 8 bytes both ways. No global model."""

    name: ClassVar[str] = "hermits"

    @property
    def pooling(self) -> Pooling:
        return Pooling.SUM

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        return WireCost.exact(8, 8, 4 * num_weights(shapes))

    def init(self, task: Task, key: Key) -> tuple[Census, None]:
        return Census(0.0), None

    def init_client(self, task: Task, public: Census, data: Examples, key: Key) -> Hermit:
        # the working replica's weights mean nothing between calls: a hermit starts from numbers of its own
        weights = tree.parameters(task.model)
        drawn = {name: key.fold(name).uniform(weight.numel()).float() - 0.5 for name, weight in weights.items()}
        return Hermit({name: values.view(weights[name].shape) for name, values in drawn.items()}, 0)

    def client_update(
        self, task: Task, public: Census, client: Hermit | None, data: Examples, key: Key
    ) -> ClientReply[Hermit, Head]:
        assert client is not None
        tree.copy_(tree.parameters(task.model), client.weights)
        trained = TRAINING.train(task, data, key)
        private = Hermit(tree.clone(tree.parameters(task.model)), client.rounds + 1)
        return ClientReply(Head(float(len(data))), private, trained.metrics)

    def server_update(
        self, task: Task, public: Census, server: None, pooled: Pooled[Head], key: Key
    ) -> tuple[None, CensusEntry]:
        return None, CensusEntry(pooled.only.rows)

    def apply(self, task: Task, public: Census, entry: CensusEntry) -> None:
        public.rows += entry.rows

    @contextmanager
    def model(self, task: Task, public: Census, client: Hermit | None = None) -> Iterator[nn.Module | None]:
        if client is None:
            yield None
            return
        tree.copy_(tree.parameters(task.model), client.weights)
        yield task.model


UNLIKE = (Drift(), Prototypes(), Hermits())
__all__ = ["UNLIKE", "Drift", "Hermits", "Prototypes", "ToyData"]
