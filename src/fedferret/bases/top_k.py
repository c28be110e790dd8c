"""The k values of largest magnitude in a sequence of tensors that is never concatenated.

The bits of positive floats, read as integers, have the order of the floats. One pass counts the upper half of the bits
and a second pass the lower half, which gives the k-th magnitude exactly. A third pass selects. Of equal magnitudes the
first are taken, so the selection is the same on every node. Cost: O(d) time, three passes; memory of twice the largest
tensor and 12 bytes for each of the k, where sorting a concatenation would take the model once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_HALF = 16


def top_k(tensors: Callable[[], Iterator[Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Positions and values of the ``count`` elements of largest magnitude.

    Args:
        tensors: called three times; each call yields the same tensors, finite, fp32, any shapes.
        count: K, at most the number of elements.
    Returns:
        Positions in the tensors, counted from tensor to tensor, ascending int64, shape (K,); values, fp32, shape (K,).
    """
    upper = torch.zeros(2 ** (31 - _HALF), dtype=torch.int64)
    for _, bits in _with_bits(tensors):
        upper += torch.bincount(bits >> _HALF, minlength=len(upper)).cpu()
    above, left = _cut(upper, count)
    lower = torch.zeros(2**_HALF, dtype=torch.int64)
    for _, bits in _with_bits(tensors):
        lower += torch.bincount(bits[bits >> _HALF == above] & 2**_HALF - 1, minlength=len(lower)).cpu()
    below, left = _cut(lower, left)
    smallest = above << _HALF | below
    positions, values, start = [], [], 0
    for flat, bits in _with_bits(tensors):
        chosen = bits > smallest
        ties = (bits == smallest).nonzero().view(-1)[:left]
        chosen[ties] = True
        left -= len(ties)
        places = chosen.nonzero().view(-1)
        positions.append(places.cpu() + start)
        values.append(flat[places].cpu())
        start += len(flat)
    return torch.cat(positions), torch.cat(values)


def _with_bits(tensors: Callable[[], Iterator[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor, flat, and the bits of the magnitudes as int32."""
    for tensor in tensors():
        flat = tensor.contiguous().view(-1)
        yield flat, flat.view(torch.int32) & 0x7FFFFFFF


def _cut(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin of the ``count``-th value from the top, and how many values of that bin are among the count."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, count))
    return len(histogram) - 1 - place, count - (int(from_top[place - 1]) if place else 0)
