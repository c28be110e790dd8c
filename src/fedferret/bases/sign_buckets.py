"""Sign buckets: every weight gets a random sign and falls into the bucket of its position modulo K.

Row p of V has one non-zero element, ±1 in column p mod K. A coordinate is the signed sum of its bucket. A reconstructed
weight is the coordinate of its bucket with the weight's sign. This is the limit of Ferret's block-wise reconstruction
(arXiv 2409.06277, section 4.2) in which every block has one coordinate, with strided blocks and with signs instead of
the dense columns.

Unbiased with s = 1. In a bucket of n weights the error energy is n - 1 times the energy of the bucket, so d/K - 1 in
total for equal buckets. At K = d, projection and expansion are exact inverses.

Cost: one pass over d weights for every K, 4 d bytes read to project, 8 d moved to expand, O(chunk + K) extra memory.
Compiled where there is a C compiler (native.py), torch operations on chunks elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedferret.bases import native
from fedferret.bases.arithmetic import add_rounded_, fold_rows_
from fedferret.bases.basis import Basis
from fedferret.bases.hashing import MAX_SIGN_POSITION, TILE, flip_signs
from fedferret.core.keys import Key

_CHUNK = 1 << 18  # elements per chunk of the PyTorch fallback: they fit in a processor's cache
_CHUNK_ACCELERATOR = 1 << 24  # so many that the time to launch kernels is negligible: 40 times as fast as 2^18 on a GPU


@dataclass(frozen=True)
class SignBuckets(Basis):
    """One signed element per row of V."""

    name: ClassVar[str] = "sign-buckets"
    max_size: ClassVar[int] = MAX_SIGN_POSITION

    chunk_elements: int | None = None  # per chunk of the PyTorch fallback; None: chosen by device

    def unbiased_scale(self, size: int, num_coordinates: int) -> float:
        """1, because every row of V has unit norm.

        Args:
            size: d, number of weights of the block.
            num_coordinates: K.
        """
        return 1.0

    def error_energy(self, size: int, num_coordinates: int) -> float:
        """The error energy, d/K - 1 where K divides d.

        Otherwise r = d mod K buckets have one weight more than the others. The value is then the mean over directions
        of Δ, d/K - 1 + r (K - r)/(d K); that of a single Δ lies between floor(d/K) - 1 and ceil(d/K) - 1.

        Args:
            size: d, number of weights of the block.
            num_coordinates: K.
        """
        smaller, larger_buckets = divmod(size, num_coordinates)
        squares = (num_coordinates - larger_buckets) * smaller**2 + larger_buckets * (smaller + 1) ** 2
        return squares / size - 1

    def expanded_energy(self, size: int, coordinates_K: Tensor) -> float:
        """The squared norm |V c|² = Σ n_k c_k², exactly: bucket k has n_k weights.

        Args:
            size: d, number of weights of the block.
            coordinates_K: c, float64, shape (K,).
        """
        squares_K = coordinates_K.square()
        smaller, larger_buckets = divmod(size, coordinates_K.numel())
        energy = smaller * float(squares_K.sum())
        return energy + float(squares_K[:larger_buckets].sum()) if larger_buckets else energy

    def _project(self, delta_N: Tensor, out_K: Tensor, key: Key, size: int, offset: int) -> None:
        if compiled := native.kernels(delta_N.device):
            compiled.sign_project(delta_N, out_K, key, offset)
            return
        for start, stop in _chunks(delta_N.numel(), offset, self._step(delta_N.device)):
            signed_N = flip_signs(delta_N[start - offset : stop - offset], key, start)
            _add_to_buckets_(out_K, signed_N, start)

    def _expand_(self, target_N: Tensor, coordinates_K: Tensor, key: Key, size: int, offset: int) -> None:
        if compiled := native.kernels(target_N.device):
            compiled.sign_expand_(target_N, coordinates_K, key, offset)
            return
        step = self._step(target_N.device)
        longest_run = min(step, target_N.numel())
        # few coordinates are repeated so that a whole chunk is one slice; many wrap at most once per chunk unrepeated
        few = coordinates_K.numel() < longest_run
        buckets = coordinates_K.repeat(1 + -(-longest_run // coordinates_K.numel())) if few else coordinates_K
        for chunk_start, chunk_stop in _chunks(target_N.numel(), offset, step):
            start = chunk_start
            while start < chunk_stop:
                column = start % coordinates_K.numel()
                stop = min(chunk_stop, start + buckets.numel() - column)
                increment_N = flip_signs(buckets[column : column + stop - start], key, start)
                add_rounded_(target_N[start - offset : stop - offset], increment_N)
                start = stop

    def _step(self, device: torch.device) -> int:
        """Positions per chunk, a whole number of tiles."""
        chunk = self.chunk_elements or (_CHUNK if device.type == "cpu" else _CHUNK_ACCELERATOR)
        return max(TILE, chunk // TILE * TILE)


def _chunks(count: int, offset: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of ``count`` positions from ``offset`` on; chunks end with a tile, so no tile is hashed twice."""
    start, end = offset, offset + count
    while start < end:
        stop = min(end, (start // step + 1) * step)
        yield start, stop
        start = stop


def _add_to_buckets_(out_K: Tensor, signed_N: Tensor, start: int) -> None:
    """Add signed values of positions ``start`` onwards to their buckets; overwrites ``signed_N``."""
    buckets, count = out_K.numel(), signed_N.numel()
    column = start % buckets
    head = min(count, (buckets - column) % buckets)
    out_K[column : column + head] += signed_N[:head]
    rows = (count - head) // buckets
    if rows:
        out_K += fold_rows_(signed_N[head : head + rows * buckets].view(rows, buckets))
    tail = signed_N[head + rows * buckets :]
    out_K[: tail.numel()] += tail
