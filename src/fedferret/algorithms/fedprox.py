"""FedProx: FedAvg of clients that are pulled back towards the global weights.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. "Federated Optimization in Heterogeneous Networks", MLSys 2020,
arXiv 1812.06127. Client j minimises its loss + μ/2 ‖w - w_global‖² (equation 2); the rest is FedAvg, and with
μ = 0 all of it is. Wire: FedAvg's. Deviation: the pull is added before the gradient is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import FedAvg, FedAvgPublic
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import Trained
from fedferret.local.steppers import Adjust


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term."""

    name: ClassVar[str] = "fedprox"
    mu: float = 0.01  # the pull's strength, μ; the paper's grid is 0.001, 0.01, 0.1, 1

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise UserError(f"mu={self.mu}: must not be negative; 0 is FedAvg")

    def train(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> Trained:
        """Local steps with μ (w - w_global) added to every gradient."""
        return self.training.train(task, data, key, adjust=pull(public.weights, self.mu) if self.mu else None)


def pull(anchor: Mapping[str, Tensor], mu: float) -> Adjust:
    """The proximal term's part of the gradient.

    Args:
        anchor: the weights that training began from, by name.
        mu: μ, at least 0.

    Returns:
        An adjustment that adds μ (w - anchor) to every gradient.
    """

    @torch.no_grad()
    def adjust(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, weight in parameters.items():
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - anchor[name].to(weight.device), alpha=mu)

    return adjust
