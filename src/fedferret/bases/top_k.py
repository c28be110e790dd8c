"""The k numbers of largest magnitude in a sequence of tensors that never lie side by side.

The bits of positive floats, read as integers, are ordered as the floats are. Two passes count the upper and then the
lower half of the bits, which gives the k-th magnitude exactly; a third picks. Of equal magnitudes the first are taken,
so the choice is the same everywhere. Cost: O(d) time, three passes; memory of the largest tensor twice and 12 bytes
for each of the k, where sorting a concatenation would take the model once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_HALF = 16


def top_k(numbers: Callable[[], Iterator[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Ascending positions int64 (K,) in the tensors laid end to end, and their values fp32 (K,).

    ``numbers`` gives the same finite fp32 tensors at each of three calls; ``count`` is at most their number.
    """
    upper = torch.zeros(2 ** (31 - _HALF), dtype=torch.int64)
    for _, bits in _with_bits(numbers):
        upper += torch.bincount(bits >> _HALF, minlength=len(upper)).cpu()
    above, left = _cut(upper, count)
    lower = torch.zeros(2**_HALF, dtype=torch.int64)
    for _, bits in _with_bits(numbers):
        lower += torch.bincount(bits[bits >> _HALF == above] & 2**_HALF - 1, minlength=len(lower)).cpu()
    below, left = _cut(lower, left)
    smallest = above << _HALF | below
    positions, values, start = [], [], 0
    for flat, bits in _with_bits(numbers):
        chosen = bits > smallest
        ties = (bits == smallest).nonzero().view(-1)[:left]
        chosen[ties] = True
        left -= len(ties)
        places = chosen.nonzero().view(-1)
        positions.append(places.cpu() + start)
        values.append(flat[places].cpu())
        start += len(flat)
    return torch.cat(positions), torch.cat(values)


def _with_bits(numbers: Callable[[], Iterator[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor, flat, and its magnitudes' bits as int32."""
    for tensor in numbers():
        flat = tensor.contiguous().view(-1)
        yield flat, flat.view(torch.int32) & 0x7FFFFFFF


def _cut(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin in which the ``count``-th number from the top lies, and how many of that bin are among the count."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, count))
    return len(histogram) - 1 - place, count - (int(from_top[place - 1]) if place else 0)
