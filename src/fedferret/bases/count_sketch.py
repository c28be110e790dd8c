"""A count sketch: R rows, in each of which every weight has a random sign and falls into a cell of its position.

    row r of C_r cells:   cell (p mod C_r) += sign_r(p) Δ_p                  a row is a projection on sign buckets
    estimate of Δ_p:      the median over r of sign_r(p) times the cell of p
    C_1 > C_2 > ... > C_R, from C downwards, pairwise coprime

Two positions that share a cell in two rows lie at least C_r C_s apart. With 12,000 cells a row, no two of 134.5 million
weights do. In the paper a random hash says which cell a weight falls into; here only the signs are random. Neighbours
never share a cell. Sketches of the same key are linear: they add up and average. One row of d cells loses nothing.

Charikar, Chen, Farach-Colton. "Finding frequent items in data streams", ICALP 2002.

Cost: R passes over d weights to sketch them, 3 ns a weight on one core with R = 5; R passes and a median to estimate
them, 15 ns; memory of R chunks, whatever d. Compiled where there is a C compiler (native.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedferret.bases.hashing import flip_signs_at
from fedferret.bases.sign_buckets import SignBuckets
from fedferret.core.errors import UserError
from fedferret.core.keys import Key

_CHUNK = 1 << 20  # positions that are estimated at once: many, since each call passes over all cells too
_CHUNK_ACCELERATOR = 1 << 24


@dataclass(frozen=True)
class CountSketch:
    """R rows of at most C cells, for vectors of d values."""

    num_rows: int
    num_columns: int
    size: int
    key: Key

    def __post_init__(self) -> None:
        if not 0 < self.num_columns <= self.size:
            raise UserError(
                f"num_columns={self.num_columns:,} cells a row for {self.size:,} weights: give 1 to {self.size:,}"
            )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Cells of every row, (R,)."""
        return row_lengths(self.num_rows, self.num_columns)

    def zeros(self, device: torch.device | str = "cpu") -> Tensor:
        """An empty sketch.

        Args:
            device: of the result.

        Returns:
            fp32, shape (Σ C_r,), row after row.
        """
        return torch.zeros(sum(self.lengths), device=device)

    def add_(self, cells: Tensor, values: Tensor, offset: int) -> None:
        """Add a piece of a vector to a sketch, in place.

        Args:
            cells: a sketch, on the device of ``values``.
            values: any float dtype and shape, in row-major order.
            offset: position in the vector of the first of ``values``.
        """
        for row, row_C in enumerate(torch.split(cells, list(self.lengths))):
            SignBuckets().project(values, len(row_C), self.key.fold(row), size=self.size, offset=offset, out=row_C)

    def sketched(self, positions_K: Tensor, values_K: Tensor) -> Tensor:
        """The sketch of a vector of few values.

        Args:
            positions_K: int64, distinct, shape (K,).
            values_K: fp32, shape (K,).

        Returns:
            fp32, shape (Σ C_r,), on the processor.
        """
        cells = self.zeros()
        for row, row_C in enumerate(torch.split(cells, list(self.lengths))):
            signed_K = flip_signs_at(values_K, self.key.fold(row), positions_K)
            row_C.index_add_(0, positions_K % len(row_C), signed_K)
        return cells

    def estimates(self, cells: Tensor) -> Iterator[Tensor]:
        """The estimates of all d values, piece by piece.

        Args:
            cells: a sketch, fp32, on any device.

        Yields:
            fp32, in the order of positions, each piece new, on the device of ``cells``.
        """
        rows = torch.split(cells, list(self.lengths))
        chunk = _CHUNK if cells.device.type == "cpu" else _CHUNK_ACCELERATOR
        for start in range(0, self.size, chunk):
            length = min(chunk, self.size - start)
            estimates = [torch.zeros(length, device=cells.device) for _ in rows]
            for row, (row_C, estimate_N) in enumerate(zip(rows, estimates, strict=True)):
                SignBuckets().expand_(estimate_N, row_C, self.key.fold(row), size=self.size, offset=start)
            yield _median(estimates)


def row_lengths(num_rows: int, num_columns: int) -> tuple[int, ...]:
    """The largest pairwise coprime numbers of cells, each found from the one before downwards.

    Args:
        num_rows: R, odd, so that a median is one of the values.
        num_columns: C, the most cells of a row.

    Returns:
        R numbers, descending.

    Raises:
        UserError: R is not an odd number above 0, or there are not so many numbers above 1.
    """
    if num_rows < 1 or num_rows % 2 == 0:
        raise UserError(f"num_rows={num_rows}: must be odd and at least 1, so that there is a middle row")
    lengths: list[int] = [num_columns]
    while len(lengths) < num_rows:
        below = range(lengths[-1] - 1, 1, -1)
        found = next((each for each in below if all(math.gcd(each, other) == 1 for other in lengths)), None)
        if found is None:
            raise UserError(
                f"num_columns={num_columns} has no {num_rows} rows of different lengths: raise num_columns, or lower "
                f"num_rows={num_rows}"
            )
        lengths.append(found)
    return tuple(lengths)


def _median(rows: list[Tensor]) -> Tensor:
    """The middle of an odd number of values, element by element; may overwrite them."""
    if len(rows) == 5:  # neither the least nor the most of four is the middle of five
        first, second, third, fourth, fifth = rows
        low = torch.maximum(torch.minimum(first, second), torch.minimum(third, fourth))
        high = torch.minimum(torch.maximum(first, second, out=first), torch.maximum(third, fourth, out=third))
        rows = [low, high, fifth]
    if len(rows) == 3:
        first, second, third = rows
        upper = torch.maximum(first, second)
        return torch.maximum(torch.minimum(first, second, out=first), torch.minimum(upper, third, out=upper), out=first)
    return rows[0] if len(rows) == 1 else torch.stack(rows).median(dim=0).values
