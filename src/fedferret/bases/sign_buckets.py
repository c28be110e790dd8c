"""Sign buckets: every weight gets a random sign and falls into the bucket of its position modulo K.

V has one ±1 in each row, in column p mod K, so a coordinate is its bucket's signed sum and a reconstructed weight is
its bucket's coordinate with the weight's own sign. This is the limit of Ferret's block-wise reconstruction (arXiv
2409.06277, section 4.2) in which every block has one coordinate, with strided blocks and signs for the dense columns.

Unbiased with s = 1. In a bucket of n weights the error energy is n - 1 times the bucket's own, so d/K - 1 in all for
equal buckets, and at K = d projection and expansion are each other's exact inverse.

Cost: one pass over d numbers whatever K is, 4 d bytes read to project, 8 d moved to expand, O(chunk + K) extra memory.
Compiled where the machine can (native.py), in chunks of torch's operations elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedferret.bases import native
from fedferret.bases.basis import Basis, add_rounded_, fold_rows_
from fedferret.bases.hashing import MAX_SIGN_POSITION, TILE, flip_signs
from fedferret.core.keys import Key

_CHUNK = 1 << 18  # elements that the plain path holds at a time: they fit a processor's cache
_CHUNK_ELSEWHERE = 1 << 24  # many enough that starting kernels takes no time: 40 times as fast on a GPU as 2^18


@dataclass(frozen=True)
class SignBuckets(Basis):
    """One signed entry a row. ``chunk_elements``: how much the plain path works on at a time, if not what suits."""

    name: ClassVar[str] = "sign-buckets"
    max_size: ClassVar[int] = MAX_SIGN_POSITION

    chunk_elements: int | None = None

    def unbiased_scale(self, size: int, num_coordinates: int) -> float:
        """1: every row of V has unit norm."""
        return 1.0

    def error_energy(self, size: int, num_coordinates: int) -> float:
        """d/K - 1 when K divides d. Otherwise r = d mod K buckets hold one weight more than the others, and the figure
        is the mean over directions of Δ, d/K - 1 + r (K - r)/(d K); one Δ's own lies between floor(d/K) - 1 and
        ceil(d/K) - 1.
        """
        smaller, larger_buckets = divmod(size, num_coordinates)
        squares = (num_coordinates - larger_buckets) * smaller**2 + larger_buckets * (smaller + 1) ** 2
        return squares / size - 1

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
        # few coordinates are repeated until a whole chunk is one slice; many wrap at most once a chunk as they are
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
        chunk = self.chunk_elements or (_CHUNK if device.type == "cpu" else _CHUNK_ELSEWHERE)
        return max(TILE, chunk // TILE * TILE)


def _chunks(count: int, offset: int, step: int) -> Iterator[tuple[int, int]]:
    """``count`` positions from ``offset`` on, in chunks that end with a tile of signs, so none is hashed twice."""
    start, end = offset, offset + count
    while start < end:
        stop = min(end, (start // step + 1) * step)
        yield start, stop
        start = stop


def _add_to_buckets_(out_K: Tensor, signed_N: Tensor, start: int) -> None:
    """Add ``signed_N``, whose first element is at position ``start`` of the block, to its buckets. Overwrites it."""
    buckets, count = out_K.numel(), signed_N.numel()
    column = start % buckets
    head = min(count, (buckets - column) % buckets)
    out_K[column : column + head] += signed_N[:head]
    rows = (count - head) // buckets
    if rows:
        out_K += fold_rows_(signed_N[head : head + rows * buckets].view(rows, buckets))
    tail = signed_N[head + rows * buckets :]
    out_K[: tail.numel()] += tail
