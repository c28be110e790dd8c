"""Uni-LoRA, federated: every value of all LoRA factors is read from one short vector, and the vector alone is averaged.

Li, Han, Su, Li, Cai, Ji. "Uni-LoRA: One Vector is All You Need", NeurIPS 2025, arXiv 2506.00799; not federated.
TinyLoRA (arXiv 2602.04118) goes further down the same road. A baseline at equal bytes for methods of few kilobytes.

    model:     y = W x + B A x, W frozen; value i of all A and B is θ[place(i)] / √n[place(i)], n[p] the uses of p
    places:    drawn by the run's key, each p as often as another or once more; θ uniform in ±``bound`` at first
    client j:  T local steps on θ, with a fresh optimiser
    server:    the mean of the updates of θ, weighted by examples

Wire: ceil(len θ · bits / 8) bytes up per client and round, ceil(len θ · entry_bits / 8) down; with 8,000 values 32,000
bytes, or 1,000 in one bit a value. A classifier's head adds its weights to the vector.

θ -> (A, B) is linear and an isometry, so the mean of the θ stands for the mean of the factors; the mean of the products
it is not, as in FedIT. With as many values as the factors have it is FedIT of α = r, from other first values.

Deviations: places are balanced, as in peft's implementation, where the paper draws each by itself; no dropout; no scale
α / r, which the paper does not have either. Bits below 32 are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from fedferret.algorithms.packed_average import PackedAverage
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters


def _training() -> FirstOrder:
    """Adam, as in the paper."""
    return FirstOrder(optimizer="adamw", learning_rate=5e-3, clip=None)


@dataclass(frozen=True, kw_only=True)
class UniLoRA(PackedAverage):
    """The weighted mean of the vector that all LoRA factors are read from."""

    name: ClassVar[str] = "uni-lora"
    values: int = 8_000  # of θ: kilobytes, whatever the model
    rank: int = 4  # r, the paper's and peft's; more costs no byte, and shares each value among more places
    modules: str | tuple[str, ...] | None = None  # FedIT's
    bound: float = 0.02  # of θ's first values, peft's; at 0 neither factor would ever have a gradient
    training: FirstOrder = field(default_factory=_training)

    def __post_init__(self) -> None:
        for name in ("values", "rank"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 1e-6 <= self.bound <= 1:  # far below, all products of factors would be 0, and none would have a gradient
            raise UserError(f"bound={self.bound}: must be from 0.000001 to 1; peft's is 0.02")

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model with factors that are read from one vector."""
        lora = adapters.UniLoRA(rank=self.rank, modules=self.modules, values=self.values, bound=self.bound)
        return lora.attach(model, key)

    def release(self, model: nn.Module) -> nn.Module:
        """The factors merged into the base weights."""
        return adapters.released(model)
