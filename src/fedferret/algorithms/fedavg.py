"""FedAvg: the weighted mean of the clients' updates of all weights.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas. "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, arXiv 1602.05629.

    client j:  w_j <- T local steps from w        Δ_j = w - w_j
    server:    Δ = Σ_j n_j Δ_j / Σ_j n_j          everybody: w <- w - η Δ

With ``server_optimizer`` the server makes another step of Δ (``server_optimizer.py``).

Wire: 4 d bytes up per client and round; 4 d down. Deviations: the update travels instead of the weights, which
is the same sum and lets the log hold entries; η (the server's learning rate, 1 in the paper) is explicit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fedferret.algorithms.full_model import check_tensors, deltas, loaded, step_
from fedferret.algorithms.server_optimizer import Moments, ServerOptimizer
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Payload, Pooled, Shapes, StateBytes, Weighting, WireCost
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.norms import euclidean_norm
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from fedferret.local.first_order import FirstOrder, Trained


@state
class FedAvgPublic:
    """All weights."""

    weights: Tree


@message
class Delta(Payload["Delta"]):
    """A client's update, w - w_j, by the model's names and shapes, fp32."""

    delta: dict[str, Tensor]


@message
class FedAvgEntry:
    """The mean update and the step to take along it."""

    delta: dict[str, Annotated[Tensor, Form(torch.float32)]]
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm[FedAvgPublic, Moments | None, None, FedAvgEntry, Delta]):
    """The weighted mean of the clients' updates of all weights. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fedavg"
    holds_bf16: ClassVar[bool] = True
    server_learning_rate: float = 1.0  # the paper's average, neither damped nor amplified
    server_optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)  # the paper's average
    weighting: Weighting = "examples"  # the paper's n_j; "equal" counts every client once
    training: FirstOrder = field(default_factory=FirstOrder)

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Four bytes a weight, both ways."""
        weights = 4 * sum(math.prod(shape) for shape in shapes.values())
        return WireCost.exact(weights, weights)

    def state_growth(self, model: nn.Module, shapes: Shapes, round: int, clients: int) -> StateBytes:
        """The moments of the weights that travel."""
        return StateBytes(server=self.server_optimizer.moments * self.wire_cost(shapes, 1, round).up_most)

    def accept(self, task: Task, public: FedAvgPublic, payload: Delta) -> None:
        """Refuse an update of other names, shapes or data types."""
        if not isinstance(payload, Delta):
            raise ValueError(f"a {type(payload).__name__} came where a Delta was expected")
        check_tensors(self._sent(task, public), payload.delta, torch.float32)

    def accept_sum(self, task: Task, public: FedAvgPublic, sum: Delta) -> None:
        """Refuse a sum of other names or shapes."""
        if not isinstance(sum, Delta):
            raise ValueError(f"a sum of type {type(sum).__name__} came where a Delta was expected")
        check_tensors(self._sent(task, public), sum.delta, None)

    def update_norm(self, task: Task, public: FedAvgPublic, payload: Delta) -> float:
        """η ‖Δ_j‖, whatever the server's optimiser makes of Δ."""
        return self.server_learning_rate * euclidean_norm(payload.delta.values())

    def init(self, task: Task, key: Key) -> tuple[FedAvgPublic, None]:
        """The base weights."""
        return FedAvgPublic(task.store(tree.parameters(task.model))), None

    def client_update(
        self, task: Task, public: FedAvgPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, Delta]:
        """Train on the client's data; send the update."""
        with loaded(task, public.weights):
            trained = self.train(task, public, data, key.fold("train"))
            delta = Delta(dict(deltas(public.weights, trained)))
        return ClientReply(delta, None, trained.metrics)

    def train(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> Trained:
        """Take the local steps, in place in ``task.model``; FedProx differs here alone.

        Args:
            task: its model has the weights of ``public``.
            public: the public state after the round before.
            data: the client's examples.
            key: draws the order of the examples.

        Returns:
            The weights that training arrived at, and its metrics.

        Raises:
            TrainingRefused: the client has no examples, or its loss is not finite.
        """
        return self.training.train(task, data, key)

    def server_update(
        self, task: Task, public: FedAvgPublic, server: Moments | None, pooled: Pooled[Delta], key: Key
    ) -> tuple[Moments | None, FedAvgEntry]:
        """The mean, or what the server's optimiser makes of the mean, is the entry."""
        server, step = self.server_optimizer.step(server, pooled.only.delta)
        return server, FedAvgEntry(step, float(self.server_learning_rate))

    def apply(self, task: Task, public: FedAvgPublic, entry: FedAvgEntry) -> None:
        """w <- w - η Δ, element by element."""
        step_(self.tuned(task, public), entry.delta, entry.learning_rate, task.rounding)

    @contextmanager
    def model(self, task: Task, public: FedAvgPublic, client: None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model

    def _sent(self, task: Task, public: FedAvgPublic) -> Mapping[str, Tensor]:
        """Tensors with the names and shapes of a client's update."""
        return self.tuned(task, public)
