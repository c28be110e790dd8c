"""FedPTR: FedAvg of clients that are pulled towards where the global weights seem to be going.

Chen, Cao, Wang, Hsieh, Chen. "Federated Learning with Projected Trajectory Regularization", arXiv 2312.14380. FedPTR
as its abstract describes it: a synthetic set mimics the last global step, and steps on it project the next one. The
paper's algorithm, constants and experiments were not at hand: what stands between is a reconstruction.

    match      D = (X, Y, a) such that S gradient steps on D lead from w^{t-1} to w^t (local/trajectory_matching.py)
    project    w~ = w^t after S' further steps on D
    client j   T local steps on  loss(w_j) + μ/2 ‖w_j - w~‖²      Δ_j = w^t - w_j
    server     Δ = Σ n_j Δ_j / Σ n_j                              everybody: w^{t+1} = w^t - η Δ

``where = "client"``: every client has a D, its private state. ``where = "server"``: one D, and the entry carries w~,
since other machines would compute other last bits from D. In the first round w~ = w^0. No example of a client enters D.

Wire: 4 d bytes up; down 4 d, and 4 d more for w~ from the server. A client keeps D: 4 n (values of an input + C) + 4
bytes, n = C ``examples_per_class``. μ = 0: FedAvg; S' = 0: FedProx; to the bit. Deviations: docs/methods/fedptr.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import Delta, FedAvgEntry, FedAvgPublic
from fedferret.algorithms.fedprox import FedProx, pull
from fedferret.algorithms.full_model import deltas, loaded, step_
from fedferret.algorithms.over import OverAdapter
from fedferret.core import tree
from fedferret.core.algorithm import ClientReply, Pooled, Shapes, StateBytes, WireCost
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from fedferret.local.trajectory_matching import AuxiliarySet, check_unroll, first_set, followed
from fedferret.models.classifiers import HEAD, Classifier


@state
class FedPTRPublic(FedAvgPublic):
    """All weights, and what the pull's target follows from; empty where nothing does."""

    previous: Tree  # w^{t-1}, where clients match
    target: Tree  # w~, where the server does


@message
class FedPTREntry(FedAvgEntry):
    """The mean update, the step along it, and w~ of the next round."""

    target: dict[str, Annotated[Tensor, Form(torch.float32)]]


@dataclass(frozen=True, kw_only=True)
class FedPTR(OverAdapter[FedAvgPublic, None, None, FedAvgEntry, Delta], FedProx):
    """FedAvg with a pull towards the projected trajectory. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fedptr"
    holds_bf16: ClassVar[bool] = False  # rounding would be most of the step that is to be matched
    mu: float = 0.1  # λ, the pull's strength
    where: Literal["client", "server"] = "client"  # who matches; the server once for all, at twice the bytes down
    target: Literal["trajectory", "extrapolated"] = "trajectory"  # extrapolated: 2 w^t - w^{t-1}, for comparison
    examples_per_class: int = 3  # synthetic ones
    tokens: int = 8  # of a synthetic text
    matching_steps: int = 20  # J
    matching_rate: float = 0.1  # Adam's, on X, Y and log a
    inner_steps: int = 1  # S
    projection_steps: int = 1  # S'

    def __post_init__(self) -> None:
        FedProx.__post_init__(self)
        super().__post_init__()
        self.server_optimizer.refuse("the method projects plain steps of the mean")
        for name, least in (("examples_per_class", 1), ("tokens", 1), ("matching_steps", 1), ("inner_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")
        if self.projection_steps < 0:
            raise UserError(f"projection_steps={self.projection_steps}: must not be negative; 0 is FedProx")
        if not self.matching_rate > 0:
            raise UserError(f"matching_rate={self.matching_rate}: must be greater than 0")
        if self.target == "extrapolated" and self.where == "server":
            raise UserError('where="server": nothing is matched under target="extrapolated"; leave where out')

    @property
    def objectives(self) -> tuple[str, ...]:
        """Classification: synthetic examples need soft labels over few classes."""
        known = super().objectives
        return tuple(name for name in ("classification",) if known is None or name in known)

    def check(self, model: nn.Module, rounds: int) -> None:
        """The model must take synthetic inputs, have second derivatives, and leave room in memory."""
        super().check(model, rounds)
        if not isinstance(model, Classifier):
            raise UserError("fedptr: this model has no head of classes that synthetic examples could name")
        if self._matches:
            shape, classes = model.input_shape(self.tokens), model.head.out_features
            check_unroll(model, tree.parameters(model), shape, classes, self.examples_per_class, self.inner_steps)

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """FedAvg's, w~ from the server, and at clients the labels and the rate of D."""
        cost = super().wire_cost(shapes, cohort, round)
        if not self._matches:
            return cost
        if self.where == "server":
            return WireCost.exact(cost.up_most, 2 * cost.down_most)
        classes = shapes[HEAD + "bias"][0]
        return WireCost.exact(cost.up_most, cost.down_most, 4 * (self.examples_per_class * classes**2 + 1))

    def state_growth(self, model: nn.Module, shapes: Shapes, round: int, clients: int) -> StateBytes:
        """FedAvg's, and a client's X: the model alone knows its size."""
        assert isinstance(model, Classifier)  # others are refused
        values = self.examples_per_class * model.head.out_features * math.prod(model.input_shape(self.tokens))
        kept = 4 * values if self._matches and self.where == "client" else 0
        return replace(super().state_growth(model, shapes, round, clients), client=kept)

    def init(self, task: Task, key: Key) -> tuple[FedPTRPublic, AuxiliarySet | None]:  # type: ignore[override]
        """w~ = w^{t-1} = w^0; the server's set where the server matches."""
        weights = tree.parameters(task.model)
        follows = self.mu > 0 and (self._matches or self.target == "extrapolated")
        previous = task.store(weights) if follows and self.where == "client" else {}
        target = task.store(weights) if follows and self.where == "server" else {}
        server = self._first_set(task, key) if self._matches and self.where == "server" else None
        return FedPTRPublic(task.store(weights), previous, target), server

    def init_client(  # type: ignore[override]
        self, task: Task, public: FedPTRPublic, data: Examples, key: Key
    ) -> AuxiliarySet | None:
        """A set that has matched nothing yet, where clients match."""
        return self._first_set(task, key) if self._matches and self.where == "client" else None

    def client_update(  # type: ignore[override]
        self, task: Task, public: FedPTRPublic, client: AuxiliarySet | None, data: Examples, key: Key
    ) -> ClientReply[AuxiliarySet, Delta]:
        """Match and project, from public weights alone; train with the pull; send the update."""
        started = time.perf_counter()
        target: Mapping[str, Tensor] = public.weights
        if client is not None:
            client, target = self._projected(task, public.previous, public.weights, client)
        elif self.target == "extrapolated" and public.previous:
            target = {name: 2 * weight - public.previous[name] for name, weight in public.weights.items()}
        elif public.target:
            target = public.target
        with loaded(task, public.weights):
            adjust = pull(target, self.mu) if self.mu else None
            trained = self.training.train(task, data, key.fold("train"), adjust=adjust)
            delta = Delta(dict(deltas(public.weights, trained)))
        return ClientReply(delta, client, {**trained.metrics, "seconds": time.perf_counter() - started})

    def server_update(  # type: ignore[override]
        self, task: Task, public: FedPTRPublic, server: AuxiliarySet | None, pooled: Pooled[Delta], key: Key
    ) -> tuple[AuxiliarySet | None, FedAvgEntry]:
        """The mean is the entry, and where the server matches, w~ is in it."""
        _, entry = super().server_update(task, public, None, pooled, key)
        if server is None:
            return None, entry
        after = tree.clone(public.weights)
        step_(after, entry.delta, entry.learning_rate, task.rounding)
        server, target = self._projected(task, public.weights, after, server)
        return server, FedPTREntry(entry.delta, entry.learning_rate, dict(target))

    def apply(self, task: Task, public: FedPTRPublic, entry: FedAvgEntry) -> None:  # type: ignore[override]
        """w <- w - η Δ; the weights of before, or w~, are kept."""
        tree.copy_(public.previous, public.weights)
        super().apply(task, public, entry)
        if isinstance(entry, FedPTREntry):
            tree.copy_(public.target, entry.target)

    @property
    def _matches(self) -> bool:
        """Whether there is a set at all."""
        return self.target == "trajectory" and self.mu > 0 and self.projection_steps > 0

    def _first_set(self, task: Task, key: Key) -> AuxiliarySet:
        model = task.model
        assert isinstance(model, Classifier)  # others are refused
        shape, classes, rate = model.input_shape(self.tokens), model.head.out_features, self.training.learning_rate
        key = key.fold("auxiliary")
        return first_set(shape, model.input_scale, classes, self.examples_per_class, rate, key, task.device)

    def _projected(
        self, task: Task, start: Mapping[str, Tensor], end: Mapping[str, Tensor], auxiliary: AuxiliarySet
    ) -> tuple[AuxiliarySet, Mapping[str, Tensor]]:
        """The set after matching, and w~."""
        return followed(
            task.model,
            start,
            end,
            auxiliary,
            steps=self.matching_steps,
            inner_steps=self.inner_steps,
            further_steps=self.projection_steps,
            rate=self.matching_rate,
        )
