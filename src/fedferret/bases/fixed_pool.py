"""The published code's directions: one pool of columns for the whole run, the same for every block.

Each projection draws which K_l columns of the pool it uses. The columns never change, so training stays in a subspace
of at most ``pool`` directions per block. This basis exists for comparison: new directions in every round cost no more.
Cost: O(d K_l), for every inner basis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedferret.bases.basis import Basis
from fedferret.core.keys import Key


@dataclass(frozen=True)
class FixedPool(Basis):
    """Columns of ``basis``, one coordinate each, from a pool of ``pool`` columns that ``pool_key`` defines."""

    name: ClassVar[str] = "fixed-pool"
    basis: Basis
    pool: int
    pool_key: Key

    @property
    def max_size(self) -> int:  # type: ignore[override]
        """The limit of the inner basis."""
        return self.basis.max_size

    def unbiased_scale(self, size: int, num_coordinates: int) -> float:
        """The scale for independent columns.

        Args:
            size: d, number of weights of the block.
            num_coordinates: K_l.
        """
        return self.basis.unbiased_scale(size, 1) / num_coordinates

    def error_energy(self, size: int, num_coordinates: int) -> float:
        """The error energy of independent columns.

        Args:
            size: d, number of weights of the block.
            num_coordinates: K_l.
        """
        return self.basis.error_energy(size, 1) / num_coordinates

    def _columns(self, count: int, key: Key) -> list[Key]:
        """Keys of the ``count`` columns that ``key`` draws from the pool."""
        return [self.pool_key.fold("column", index) for index in key.sample(range(self.pool), count)]

    def _project(self, delta_N: Tensor, out_K: Tensor, key: Key, size: int, offset: int) -> None:
        for index, column in enumerate(self._columns(out_K.numel(), key)):
            out_K[index : index + 1] += self.basis.project(delta_N, 1, column, size=size, offset=offset) / out_K.numel()

    def _expand_(self, target_N: Tensor, coordinates_K: Tensor, key: Key, size: int, offset: int) -> None:
        for index, column in enumerate(self._columns(coordinates_K.numel(), key)):
            self.basis.expand_(target_N, coordinates_K[index : index + 1], column, size=size, offset=offset)
