"""LoRA as a stage that is handed its first factors: of an earlier stage's update, or of factors of a higher rank.

The factors are the best of their rank (``bases/low_rank.py``). The server computes them, and they travel in place of
the last entry of the stage before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedferret.algorithms.fedit import FedIT
from fedferret.bases.low_rank import LowRank
from fedferret.core.errors import UserError
from fedferret.local.first_order import FirstOrder
from fedferret.models.adapters import factors

A, B = ".lora_A.default.weight", ".lora_B.default.weight"  # what follows a module's name in that of a factor


def adam() -> FirstOrder:
    """FedIT's local training."""
    return FirstOrder(optimizer="adamw", learning_rate=3e-4, clip=None)


@dataclass(frozen=True, kw_only=True)
class LoRAStage(FedIT):
    """FedIT that refuses a rank above a matrix's."""

    rank: int = 8  # FedIT's
    alpha: int | float = 16  # FedIT's

    @property
    def scale(self) -> float:
        """The s of s B A: α / r."""
        return self.alpha / self.rank

    def check(self, model: nn.Module, rounds: int) -> None:
        """Refuse factors that hold more than their matrix can."""
        for name, (a, b) in factors(model).items():
            most = min(a.shape[1], b.shape[0])
            if self.rank > most:
                raise UserError(
                    f"algorithm: LoRA of rank {self.rank}: {name} is a matrix of {b.shape[0]} x {a.shape[1]}, and has "
                    f"rank {most} at most; give a lower rank, or leave it out of modules"
                )


def figures(found: Sequence[LowRank]) -> dict[str, float]:
    """Say how much of the matrices is left in their factors.

    Args:
        found: one approximation a matrix.

    Returns:
        "energy kept": the share of the sum of all squares, at most 1; nothing where all matrices are zero.
    """
    energy = sum(each.energy for each in found)
    return {"energy kept": sum(each.kept for each in found) / energy} if energy else {}
