"""FedProx: FedAvg whose clients are pulled back towards the global weights.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. "Federated Optimization in Heterogeneous Networks", MLSys 2020,
arXiv 1812.06127. Client j minimises its loss + μ/2 ‖w - w_global‖² (equation 2); the rest is FedAvg, and with
μ = 0 all of it is. Wire: FedAvg's. Deviation: the pull is added before the gradient is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedferret.algorithms.fedavg import FedAvg, FedAvgPublic
from fedferret.core.algorithm import Examples, Task
from fedferret.core.errors import UserError
from fedferret.core.keys import Key


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term."""

    name: ClassVar[str] = "fedprox"
    mu: float = 0.01  # the pull's strength, μ; the paper's grid is 0.001, 0.01, 0.1, 1

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise UserError(f"mu={self.mu}: must not be negative; 0 is FedAvg")

    def train(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> dict[str, float]:
        """Local steps with μ (w - w_global) added to every gradient."""
        return self.training.train(task, data, key, anchor=public.weights, proximal=self.mu)
