"""Local-only: every client trains alone; the baseline that a federation must beat at its clients.

    client j:  P_j <- T local steps from its own P_j, in the beginning the base's
    server:    counts the rounds

Wire: nothing, 0 bytes each way; a client keeps 4 d. Messages have their framing, the number of examples and the loss,
as in all methods, so that a round looks like any other: the same cohorts, local training and schedule of evaluation.
A client that has not trained yet has the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.algorithms.full_model import deltas, loaded
from fedferret.algorithms.partly_private import PrivateWeights
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Payload, Pooled, Shapes, WireCost
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder


@message
class NothingShared(Payload["NothingShared"]):
    """What a client sends, and what the server adds to the log: that there was a round."""


@dataclass(frozen=True, kw_only=True)
class LocalOnly(Algorithm[FedAvgPublic, None, PrivateWeights, NothingShared, NothingShared]):
    """Clients that share nothing. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "local-only"
    has_global_model: ClassVar[bool] = False  # the public weights stay the base's
    shares_nothing: ClassVar[bool] = True  # so no pool can be chosen
    training: FirstOrder = field(default_factory=FirstOrder)

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Nothing is sent; a client keeps four bytes a weight."""
        return WireCost.exact(0, 0, 4 * sum(math.prod(shape) for shape in shapes.values()))

    def accept(self, task: Task, public: FedAvgPublic, payload: NothingShared) -> None:
        """Refuse anything at all."""
        if not isinstance(payload, NothingShared):
            raise ValueError(f"a {type(payload).__name__} came where clients share nothing")

    def accept_sum(self, task: Task, public: FedAvgPublic, sum: NothingShared) -> None:
        """Refuse anything at all."""
        self.accept(task, public, sum)

    def update_norm(self, task: Task, public: FedAvgPublic, payload: NothingShared) -> float:
        """Nothing is added to the public weights."""
        return 0.0

    def init(self, task: Task, key: Key) -> tuple[FedAvgPublic, None]:
        """The base weights."""
        return FedAvgPublic(task.store(tree.parameters(task.model))), None

    def init_client(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> PrivateWeights:
        """The base weights."""
        return PrivateWeights({name: weight.detach().float().clone() for name, weight in public.weights.items()})

    def client_update(
        self, task: Task, public: FedAvgPublic, client: PrivateWeights | None, data: Examples, key: Key
    ) -> ClientReply[PrivateWeights, NothingShared]:
        """Train the client's own model; keep it."""
        before = client.weights if client else public.weights
        with loaded(task, before):
            trained = self.training.train(task, data, key.fold("train"))
            # ``deltas`` refuses what is not finite
            own = {name: trained.weights[name].detach().float().clone() for name, _ in deltas(before, trained)}
        return ClientReply(NothingShared(), PrivateWeights(own), trained.metrics)

    def server_update(
        self, task: Task, public: FedAvgPublic, server: None, pooled: Pooled[NothingShared], key: Key
    ) -> tuple[None, NothingShared]:
        """A round has passed."""
        return None, NothingShared()

    def apply(self, task: Task, public: FedAvgPublic, entry: NothingShared) -> None:
        """The base stays what it is."""

    @contextmanager
    def model(
        self, task: Task, public: FedAvgPublic, client: PrivateWeights | None = None
    ) -> Iterator[nn.Module | None]:
        """The client's own model; there is no other."""
        if client is None:
            yield None
            return
        with loaded(task, client.weights) as model:
            yield model
