"""FedMeZO: FedAvg of clients that train with forward passes alone.

Ling, Chen, Yao, Li, Shen. "On the Convergence of Zeroth-Order Federated Tuning for Large Language Models", KDD 2024,
arXiv 2402.05926, Algorithm 1. Client j walks along Gaussian directions z by the central difference
g = (loss(w + ε z) - loss(w - ε z)) / 2 ε, w <- w - η (g z + λ w), in local/zeroth_order.py; the rest is FedAvg.

Wire: FedAvg's, 4 d bytes up per client and round and 4 d down. Deviations: all weights are tuned where the paper's
experiments tune adapters, with a rate to suit; λ w is taken after g z instead of with it, a difference of η² λ g z.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fedferret.algorithms.fedavg import FedAvg
from fedferret.local.zeroth_order import ZerothOrder


@dataclass(frozen=True, kw_only=True)
class FedMeZO(FedAvg):
    """FedAvg of zeroth-order training, central difference."""

    name: ClassVar[str] = "fedmezo"
    holds_bf16: ClassVar[bool] = False  # its steps are far below a rounding step of bf16
    training: ZerothOrder = field(  # type: ignore[assignment]  # trains as FirstOrder does, by forward passes
        default_factory=lambda: ZerothOrder(perturbation=1e-3, steps=30)  # the published settings
    )
