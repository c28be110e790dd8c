"""Which values of a tensor are tuned: a share of them, drawn by a key that everybody knows. So no position travels.

A mask is Bernoulli(density) given its number of ones, which is exactly round(density n): the bytes of the values then
follow from shapes alone. Pieces of 2^20 values are drawn apart, each with its part of the number, so that the memory
does not grow with the tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedferret.core.keys import Key

_PIECE = 1 << 20


def num_drawn(size: int, density: float) -> int:
    """How many of a tensor's values are drawn.

    Args:
        size: number of the tensor's values, at least 1.
        density: their share, above 0 and at most 1.

    Returns:
        The nearest whole number to ``density`` × ``size``, at least 1.
    """
    return max(1, int(density * size + 0.5))


def drawn_positions(size: int, density: float, key: Key) -> Tensor:
    """Draw positions of a flat tensor.

    Args:
        size: number of the tensor's values.
        density: share of positions to draw.
        key: of this tensor.

    Returns:
        ``num_drawn`` positions, rising, int64, on the CPU; the same bits everywhere.
    """
    pieces, before = [], 0
    for start in range(0, size, _PIECE):
        end = min(start + _PIECE, size)
        until = num_drawn(size, density) if end == size else int(density * end + 0.5)
        if until > before:
            bits = key.fold(start).bits(end - start)  # all different: the hash of a counter is one to one
            pieces.append((bits <= bits.kthvalue(until - before).values).nonzero().view(-1) + start)
        before = until
    return torch.cat(pieces)
