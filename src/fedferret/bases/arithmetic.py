"""Elementwise arithmetic that the bases share: the same bits on every device and for every thread count."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rounded_(target_N: Tensor, increment_N: Tensor) -> None:
    """Add an increment to a tensor in place: the sum is formed in fp32 and rounded once to the target's dtype.

    Args:
        target_N: any float dtype, shape (N,).
        increment_N: fp32, shape (N,).
    """
    if target_N.dtype == torch.float32:
        target_N += increment_N
    else:
        target_N.copy_(target_N.float().add_(increment_N))


def fold_rows_(values_RN: Tensor) -> Tensor:
    """The sum over rows, by a fixed tree of elementwise additions: the same bits for every thread count.

    Args:
        values_RN: shape (R, N) with R >= 1, any float dtype; overwritten.
    Returns:
        The first row, which holds the sum, shape (N,).
    """
    rows = values_RN.shape[0]
    while rows > 1:
        half = rows // 2
        values_RN[:half].add_(values_RN[rows - half : rows])
        rows -= half
    return values_RN[0]
