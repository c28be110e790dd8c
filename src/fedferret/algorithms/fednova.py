"""FedNova: FedAvg of clients that take different numbers of local steps, each update divided by its length.

Wang, Liu, Liang, Joshi, Poor. "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
NeurIPS 2020, arXiv 2007.07481, equations 7 to 9 and section 4.

    client j:  w_j <- τ_j local steps from w        Δ_j = w - w_j = η_l Σ_k a_jk g_k        send Δ_j / r_j and r_j
               r_j = ‖a_j‖₁, the steps that the update is worth:
               plain SGD  τ      momentum ρ  (τ - ρ (1 - ρ^τ) / (1 - ρ)) / (1 - ρ)      proximal  (1 - (1 - α)^τ) / α
    server:    τ_eff = Σ p_j r_j            everybody: w <- w - η τ_eff Σ p_j Δ_j / r_j          α = η_l μ

With ``steps`` all clients take as many: r_j = 1, and it is FedAvg (or FedProx, with μ) to the bit. FedAvg minimises an
objective in which a client counts by n_j τ_j where numbers of steps differ; here it counts by n_j.

Wire: 4 d + 8 bytes up per client and round, 4 d down. 1 / r_j travels too, so that both means pool: τ_eff is at most
``MOST`` times the harmonic mean, and no claim of steps scales everybody's update without bound. Deviations:
docs/methods/fednova.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fedferret.algorithms.fedavg import Delta, FedAvgEntry, FedAvgPublic
from fedferret.algorithms.fedprox import FedProx
from fedferret.algorithms.full_model import check_tensors, deltas, loaded
from fedferret.algorithms.over import OverAdapter
from fedferret.algorithms.server_optimizer import Moments
from fedferret.core.algorithm import ClientReply, Payload, Pooled, Shapes, WireCost
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.norms import euclidean_norm
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import MOST_STEPS, FirstOrder

MOST = (
    10.0  # times the harmonic mean of all lengths: as a claim of examples beside the median (clients.max_over_median)
)


@message
class NormalizedDelta(Payload["NormalizedDelta"]):
    """A client's update divided by its length, (w - w_j) / r_j, fp32, and r_j and 1 / r_j, fp32."""

    delta: dict[str, Tensor]
    lengths: Annotated[Tensor, Form(rank=1)]  # (2,); under a mask int64


@dataclass(frozen=True, kw_only=True)
class FedNova(OverAdapter[Any, Any, Any, Any, Any], FedProx):
    """FedAvg of normalised updates. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fednova"
    mu: float = 0.0  # FedProx's pull, which the length takes into account; the paper's main results have none
    training: FirstOrder = field(default_factory=FirstOrder)

    def __post_init__(self) -> None:
        super().__post_init__()
        FedProx.__post_init__(self)
        training = self.training
        if training.optimizer != "sgd":
            raise UserError(f'training.optimizer="{training.optimizer}": its steps are no sum of gradients; set "sgd"')
        if training.schedule_over != "rounds":
            raise UserError(f'training.schedule_over="{training.schedule_over}": steps count alike; set "rounds"')
        if self.mu and training.momentum:
            raise UserError(f"mu={self.mu}, training.momentum={training.momentum}: choose one; set the other to 0")
        if not self.mu * training.learning_rate < 1:
            raise UserError(f"mu={self.mu}: times the learning rate it must be below 1, or steps overshoot the pull")

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Four bytes a weight, both ways, and two numbers up."""
        weights = super().wire_cost(shapes, cohort, round).up_most
        return WireCost.exact(weights + 8, weights)

    def length(self, task: Task, steps: int) -> float:
        """How many gradients an update is worth, r.

        Args:
            task: says the round, and with it the learning rate.
            steps: τ, that the client took.

        Returns:
            ‖a‖₁; with ``training.steps``, which all clients take, 1.
        """
        if self.training.steps is not None:
            return 1.0
        momentum, pull = self.training.momentum, self.mu * self.training.rate(task, 0, 1)
        velocity = moved = 0.0
        for _ in range(steps):
            velocity = momentum * velocity + 1 - pull * moved
            moved += velocity
        return moved

    def client_update(
        self, task: Task, public: FedAvgPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, Any]:
        """Train on the client's data; send the update divided by its length."""
        length = self.length(task, self.training.total_steps(len(data)))
        with loaded(task, public.weights):
            trained = self.train(task, public, data, key.fold("train"))
            delta = {name: change / length for name, change in deltas(public.weights, trained)}
        return ClientReply(NormalizedDelta(delta, _both(length)), None, trained.metrics)

    def accept(self, task: Task, public: FedAvgPublic, payload: Any) -> None:
        """Refuse an update of other tensors, and lengths that no number of these settings' steps has."""
        if not isinstance(payload, NormalizedDelta):
            raise ValueError(f"a {type(payload).__name__} came where a NormalizedDelta was expected")
        check_tensors(public.weights, payload.delta, torch.float32)
        lengths = payload.lengths
        if not isinstance(lengths, Tensor) or lengths.dtype != torch.float32 or lengths.shape != (2,):
            raise ValueError("lengths came that are no two numbers of fp32")
        least = self.length(task, self.training.epochs or 0)  # a pass has a step at least
        most = 1.0 if self.training.steps is not None else MOST_STEPS / (1 - self.training.momentum)
        if not (least * (1 - 1e-6) <= float(lengths[0]) <= most and torch.equal(lengths, _both(float(lengths[0])))):
            raise ValueError(f"an update of length {float(lengths[0]):g} came, which these settings do not give")

    def accept_sum(self, task: Task, public: FedAvgPublic, sum: Any) -> None:
        """Refuse a sum of other names or shapes."""
        if not isinstance(sum, NormalizedDelta):
            raise ValueError(f"a sum of type {type(sum).__name__} came where a NormalizedDelta was expected")
        check_tensors(public.weights, sum.delta, None)
        if sum.lengths.shape != (2,):
            raise ValueError("a sum of other lengths came than two numbers")

    def update_norm(self, task: Task, public: FedAvgPublic, payload: Any) -> float:
        """η ‖Δ_j‖."""
        return self.server_learning_rate * float(payload.lengths[0]) * euclidean_norm(payload.delta.values())

    def server_update(
        self, task: Task, public: FedAvgPublic, server: Moments | None, pooled: Pooled[Any], key: Key
    ) -> tuple[Moments | None, FedAvgEntry]:
        """The mean of the normalised updates, as long as the clients' updates are in the mean."""
        mean, inverse = pooled.only.lengths.tolist()
        effective = min(mean, MOST / inverse)
        delta = Delta({name: each * effective for name, each in pooled.only.delta.items()})
        return super().server_update(task, public, server, replace(pooled, sums=(delta,)), key)


def _both(length: float) -> Tensor:
    """r and 1 / r, of r as fp32 has it."""
    rounded = torch.tensor(length, dtype=torch.float32)
    return torch.stack((rounded, 1 / rounded))
