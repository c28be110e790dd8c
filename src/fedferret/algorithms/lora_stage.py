"""LoRA as a stage that is handed its first factors: of an earlier stage's update, or of factors of a higher rank.

The factors are the best of their rank (``bases/low_rank.py``). The server computes them, and they travel in place of
the last entry of the stage before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedferret.algorithms.fedit import FedIT
from fedferret.bases.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class LoRAStage(FedIT):
    """FedIT with a rank and α of its stage, not of an adapter in a folder."""

    rank: int = 8  # FedIT's
    alpha: int | float = 16  # FedIT's

    @property
    def scale(self) -> float:
        """The s of s B A: α / r."""
        return self.alpha / self.rank


def figures(found: Sequence[LowRank]) -> dict[str, float]:
    """Say how much of the matrices is left in their factors.

    Args:
        found: one approximation a matrix.

    Returns:
        "energy kept": the share of the sum of all squares, at most 1; nothing where all matrices are zero.
    """
    energy = sum(each.energy for each in found)
    return {"energy kept": sum(each.retained for each in found) / energy} if energy else {}
