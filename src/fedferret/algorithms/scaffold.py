"""SCAFFOLD: FedAvg of clients that correct their steps for what their own data pulls them away from the others.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020, arXiv 1910.06378, Algorithm 1, with option II for the controls. S clients reply in a round, N so far.

    public     the weights w and the control c, 0 at first      client j    its control c_j, c at first

    client j:  w_j <- K_j steps of SGD from w along g(w_j) - c_j + c        Δ_j = w - w_j
               c_j <- c_j - c + Δ_j / (K_j η_l), the mean of its gradients g
    server:    Δ = Σ p_j Δ_j       c <- c + S/N (Σ p_j Δ_j / (K_j η_l) - c)         everybody: w <- w - η Δ

c is the mean of the controls of all clients that have replied in any round.

Wire: 4 d bytes up per client and round; 8 d down. With option II the change of a control is Δ_j / (K_j η_l) - c, and c
is public: so clients send K_j where the paper's send 4 d bytes more. A client keeps 4 d.

With one client, and in the first round, it is FedAvg to the bit. Deviations: docs/methods/scaffold.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import Delta, FedAvg
from fedferret.algorithms.full_model import check_tensors, deltas, loaded
from fedferret.algorithms.over import OverAdapter
from fedferret.algorithms.scaffold_messages import (
    DecodedSteps,
    ScaffoldClient,
    ScaffoldEntry,
    ScaffoldPublic,
    ScaffoldServer,
    ScaffoldUpdate,
)
from fedferret.core import tree
from fedferret.core.algorithm import ClientReply, Pooled, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder
from fedferret.local.steppers import Adjust


@dataclass(frozen=True, kw_only=True)
class Scaffold(OverAdapter[Any, Any, Any, Any, Any], FedAvg):
    """FedAvg with controls. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "scaffold"
    weighting: Weighting = "equal"  # the paper's mean; "examples" weights updates and controls alike
    training: FirstOrder = field(default_factory=FirstOrder)

    def __post_init__(self) -> None:
        super().__post_init__()
        training = self.training
        for given, wrong in (
            (f'training.optimizer="{training.optimizer}"', training.optimizer != "sgd"),
            (f"training.momentum={training.momentum}", training.momentum > 0),
            (f'training.schedule_over="{training.schedule_over}"', training.schedule_over != "rounds"),
        ):
            if wrong:
                raise UserError(
                    f"{given}: a control is the mean gradient, read off the update of plain SGD at one rate; "
                    f'set optimizer="sgd", momentum=0.0 and schedule_over="rounds"'
                )

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Four bytes a weight up, twice as many down; four a weight are kept."""
        weights = super().wire_cost(shapes, cohort, round).up_most
        return WireCost.exact(weights, 2 * weights, weights)

    def init(self, task: Task, key: Key) -> tuple[ScaffoldPublic, ScaffoldServer]:  # type: ignore[override]
        """The base weights; no direction is known."""
        public, _ = super().init(task, key)
        zeros = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in public.weights.items()}
        return ScaffoldPublic(public.weights, zeros), ScaffoldServer((), None)

    def init_client(self, task: Task, public: ScaffoldPublic, data: Examples, key: Key) -> ScaffoldClient:
        """Everybody's direction: nothing is to be corrected yet."""
        return ScaffoldClient(tree.clone(public.control))

    def client_update(  # type: ignore[override]
        self, task: Task, public: ScaffoldPublic, client: ScaffoldClient | None, data: Examples, key: Key
    ) -> ClientReply[ScaffoldClient, ScaffoldUpdate]:
        """Train with corrected gradients; send the update, keep the mean gradient as the control."""
        own = client.control if client else public.control
        corrected = correction(public.control, own, self.training.clip)
        with loaded(task, public.weights):
            trained = replace(self.training, clip=None).train(task, data, key.fold("train"), adjust=corrected)
            update = ScaffoldUpdate(dict(deltas(public.weights, trained)), self.training.total_steps(len(data)))
        per_step, rate = update.decoded().per_step, self.training.rate(task, 0, 1)
        control = {
            name: _towards(value, own[name], public.control[name], rate, 1.0) for name, value in per_step.items()
        }
        return ClientReply(update, ScaffoldClient(control), trained.metrics)

    def accept(self, task: Task, public: ScaffoldPublic, payload: Any) -> None:  # type: ignore[override]
        """Refuse an update of other tensors, and numbers of local steps that these settings do not give."""
        if not isinstance(payload, ScaffoldUpdate):
            raise ValueError(f"a {type(payload).__name__} came where a ScaffoldUpdate was expected")
        check_tensors(public.weights, payload.delta, torch.float32)
        if not self.training.may_take(payload.steps):
            raise ValueError(f"{payload.steps!s:.40} local steps came, which these settings do not give")

    def accept_sum(self, task: Task, public: ScaffoldPublic, sum: Any) -> None:  # type: ignore[override]
        """Refuse a sum of other names or shapes."""
        if not isinstance(sum, DecodedSteps):
            raise ValueError(f"a sum of type {type(sum).__name__} came where DecodedSteps were expected")
        check_tensors(public.weights, sum.delta, None)
        check_tensors(public.weights, sum.per_step, None)

    def server_update(  # type: ignore[override]
        self, task: Task, public: ScaffoldPublic, server: ScaffoldServer, pooled: Pooled[DecodedSteps], key: Key
    ) -> tuple[ScaffoldServer, ScaffoldEntry]:
        """The mean update as in FedAvg, and the control moved by the share of those who replied."""
        mean, replied = pooled.only, len(pooled.weights)
        averaged = Pooled((Delta(mean.delta),), pooled.weights, pooled.clients)
        moments, entry = super().server_update(task, public, server.moments, averaged, key)
        known = tuple(sorted({*server.clients, *pooled.clients}))
        share, rate = replied / max(len(known), replied), self.training.rate(task, 0, 1)
        control = {name: _towards(mean.per_step[name], c, c, rate, share) for name, c in public.control.items()}
        return ScaffoldServer(known, moments), ScaffoldEntry(entry.delta, entry.learning_rate, control)

    def apply(self, task: Task, public: ScaffoldPublic, entry: ScaffoldEntry) -> None:  # type: ignore[override]
        """w <- w - η Δ, and the new control."""
        super().apply(task, public, entry)
        for name, control in public.control.items():
            control.copy_(entry.control[name])


def correction(control: Mapping[str, Tensor], own: Mapping[str, Tensor], clip: float | None) -> Adjust:
    """What turns a client's gradients into everybody's.

    Args:
        control: c, by name.
        own: c_j, by name.
        clip: greatest Euclidean norm of a client's gradient, before it is corrected; None: not clipped.

    Returns:
        An adjustment that clips the gradients and adds c - c_j.
    """
    added: dict[str, Tensor] = {}

    @torch.no_grad()
    def adjust(parameters: Mapping[str, nn.Parameter]) -> None:
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        for name, weight in parameters.items():
            if weight.grad is None:
                continue
            if name not in added:
                added[name] = control[name].to(weight.device) - own[name].to(weight.device)
            weight.grad.add_(added[name])

    return adjust


def _towards(per_step: Tensor, old: Tensor, control: Tensor, rate: float, share: float) -> Tensor:
    """``old`` + share (mean gradient of the corrected steps - c): with one client c and c_j are the same bits."""
    per_step, old, control = per_step.cpu(), old.cpu(), control.cpu()
    return torch.add(old, per_step / rate - control, alpha=share)
