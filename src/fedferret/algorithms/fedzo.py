"""FedZO: FedAvg of clients that train with forward passes alone, one perturbation a step.

Fang, Yu, Jiang, Shi, Jones, Zhou. "Communication-Efficient Stochastic Zeroth-Order Optimization for Federated
Learning", IEEE Transactions on Signal Processing 70, 2022, arXiv 2201.09531, Algorithm 1, with b_2 = 1 direction a
step. Client j estimates the gradient by d (loss(w + μ v) - loss(w)) / μ · v, v uniform on the unit sphere, in
local/zeroth_order.py; the rest is FedAvg.

Wire: FedAvg's, 4 d bytes up per client and round and 4 d down. Deviation: v is z / √d for a Gaussian z, so that with
ε = μ / √d the estimate is (loss(w + ε z) - loss(w)) / ε · z. Its length is that of the sphere's to a relative √(1/2d),
and it is as unbiased; the exact length would take another pass over the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fedferret.algorithms.fedavg import FedAvg
from fedferret.local.zeroth_order import ZerothOrder


@dataclass(frozen=True, kw_only=True)
class FedZO(FedAvg):
    """FedAvg of zeroth-order training, forward difference."""

    name: ClassVar[str] = "fedzo"
    holds_bf16: ClassVar[bool] = False  # its steps are far below a rounding step of bf16
    training: ZerothOrder = field(  # type: ignore[assignment]  # trains as FirstOrder does, by forward passes
        default_factory=lambda: ZerothOrder(difference="forward")
    )
