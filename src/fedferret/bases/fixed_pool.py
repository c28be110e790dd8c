"""The published code's directions: one pool of columns for the whole run, the same for every block.

Each projection draws which K_l columns of the pool it uses; the columns themselves never change, so training
stays in a subspace of at most ``pool`` directions per block. Kept for comparison: fresh directions cost nothing more.
Cost: O(d K_l), whatever the basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedferret.bases.basis import Basis
from fedferret.core.keys import Key


@dataclass(frozen=True)
class FixedPool(Basis):
    """Columns of ``basis``, one coordinate each, from a pool of ``pool`` columns that ``pool_key`` names."""

    name: ClassVar[str] = "fixed-pool"
    basis: Basis
    pool: int
    pool_key: Key

    @property
    def max_size(self) -> int:  # type: ignore[override]
        """The inner basis's limit."""
        return self.basis.max_size

    def unbiased_scale(self, size: int, num_coordinates: int) -> float:
        """That of independent columns."""
        return self.basis.unbiased_scale(size, 1) / num_coordinates

    def error_energy(self, size: int, num_coordinates: int) -> float:
        """That of independent columns."""
        return self.basis.error_energy(size, 1) / num_coordinates

    def _columns(self, count: int, key: Key) -> list[Key]:
        return [self.pool_key.fold("column", index) for index in key.sample(range(self.pool), count)]

    def _project(self, delta_N: Tensor, out_K: Tensor, key: Key, size: int, offset: int) -> None:
        for index, column in enumerate(self._columns(out_K.numel(), key)):
            out_K[index : index + 1] += self.basis.project(delta_N, 1, column, size=size, offset=offset) / out_K.numel()

    def _expand_(self, target_N: Tensor, coordinates_K: Tensor, key: Key, size: int, offset: int) -> None:
        for index, column in enumerate(self._columns(coordinates_K.numel(), key)):
            self.basis.expand_(target_N, coordinates_K[index : index + 1], column, size=size, offset=offset)
