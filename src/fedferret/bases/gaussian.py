"""Gaussian directions: columns z(k) of a random d x K matrix that is never built, for zeroth-order methods.

A column has one element per weight of the model, tensor after tensor. A tensor is passed alone, with its ``offset``.
With ``w0, w1 = key.fold("gaussian", p div 2^32).words`` and ``mix`` as in hashing.py, all on 32-bit words::

    word(p, k) = mix(mix((p mod 2^32) ^ w0) ^ mix(k ^ w1))
    u = (word mod 2^16 - word div 2^16) / 2^16             exact in fp32; distribution: a triangle over (-1, 1)
    z = u (b0 + b1 u² + b2 u⁴ + b3 u⁶ + b4 u⁸)             by Horner's rule in fp32

The polynomial is the least-squares fit of the normal quantile to the triangle's, scaled to variance 1. z has mean 0,
variance 1 to 1e-7 and kurtosis 2.994, lies within ±3.82, and its distribution function is within 0.0009 of the normal
distribution's. It needs no table, logarithm or cosine: a table of 65,536 quantiles cost four times as much, because
the lookups missed the cache.

All operations are elementwise fp32 multiplications and additions in a fixed order, so the bits are the same on every
device and for every chunk size, offset and thread count. Cost: one hash and 13 multiplications and additions per
element; k directions at once pass over the target's memory once. Compiled where there is a C compiler (native.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedferret.bases import native
from fedferret.bases.hashing import mix_, position_states, signed
from fedferret.core.keys import Key

COEFFICIENTS = (2.40964, -1.804, 8.08725, -12.65185, 7.76996)

_SEGMENT = 2**32  # positions that a 32-bit counter can distinguish
_CHUNK = 1 << 15  # elements per chunk of the PyTorch fallback: they fit in cache, and torch starts no thread for them
_CHUNK_ACCELERATOR = 1 << 22  # so many that the time to launch kernels is negligible


def add_gaussian_(target: Tensor, key: Key, column: int, factor: float, offset: int = 0) -> Tensor:
    """Add ``factor`` times z(column) to a tensor in place.

    For an fp32 target the product is rounded, then the sum. For other dtypes the sum is formed in fp32 and rounded
    once.

    Args:
        target: any float dtype, shape and layout, in row-major order.
        key: of the matrix.
        column: from 0 to 2^32 - 1.
        factor: rounded to fp32.
        offset: position in the column of the first element of ``target``.
    Returns:
        ``target``.
    """
    return add_gaussians_(target, key, [column], torch.tensor([factor]), offset)


def add_gaussians_(target: Tensor, key: Key, columns: Sequence[int], factors_K: Tensor, offset: int = 0) -> Tensor:
    """Add the sum over k of factors_K[k] times z(columns[k]) to a tensor in place.

    For an fp32 target the bits are those of calls of ``add_gaussian_`` in this order. Other dtypes are rounded once,
    at the end.

    Args:
        target: any float dtype, shape and layout, in row-major order.
        key: of the matrix.
        columns: K indices from 0 to 2^32 - 1.
        factors_K: rounded to fp32, shape (K,).
        offset: position in the columns of the first element of ``target``.
    Returns:
        ``target``.
    Raises:
        ValueError: unless there is one factor per column.
    """
    if factors_K.shape != (len(columns),):
        raise ValueError(f"{len(columns)} columns came with factors of shape {tuple(factors_K.shape)}")
    factors_K = factors_K.to("cpu", torch.float32).contiguous()
    with torch.no_grad():
        flat = target.view(-1) if target.is_contiguous() else target.reshape(-1)
        for start, stop, segment in _segments(flat.numel(), offset):
            within = (offset + start) % _SEGMENT
            _add_(flat[start:stop], key.fold("gaussian", segment), columns, factors_K, within)
        if not target.is_contiguous():
            target.copy_(flat.view(target.shape))
    return target


def add_directions_(weights: Mapping[str, Tensor], key: Key, columns: Sequence[int], factors_K: Tensor) -> None:
    """Call ``add_gaussians_`` on all tensors of a tree in place, one after another in the tree's order.

    Args:
        weights: any float dtypes and shapes; positions count on from tensor to tensor.
        key: of the matrix.
        columns: K indices from 0 to 2^32 - 1.
        factors_K: rounded to fp32, shape (K,).
    Raises:
        ValueError: unless there is one factor per column.
    """
    offset = 0
    for weight in weights.values():
        add_gaussians_(weight, key, columns, factors_K, offset)
        offset += weight.numel()


def _segments(count: int, offset: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, segment) of ``count`` elements from position ``offset`` on, split where the counter wraps."""
    start = 0
    while start < count:
        segment = (offset + start) // _SEGMENT
        stop = min(count, (segment + 1) * _SEGMENT - offset)
        yield start, stop, segment
        start = stop


def _add_(target_N: Tensor, key: Key, columns: Sequence[int], factors_K: Tensor, position: int) -> None:
    """Add columns to a piece of one segment; ``key`` is the segment's."""
    if compiled := native.kernels(target_N.device):
        compiled.gaussian_add_(target_N, columns, factors_K, key, position, COEFFICIENTS)
        return
    columns_K = torch.tensor([signed(column) for column in columns], dtype=torch.int32)
    states_K = mix_(columns_K ^ signed(key.words[1])).to(target_N.device)
    chunk = _CHUNK if target_N.device.type == "cpu" else _CHUNK_ACCELERATOR
    for start in range(0, target_N.numel(), chunk):
        piece_N = target_N[start : start + chunk]
        positions_N = position_states(key, position + start, position + start + piece_N.numel(), target_N.device)
        sum_N = piece_N.float()  # for fp32, the piece itself
        for state, factor in zip(states_K, factors_K.tolist(), strict=True):
            sum_N += _elements(positions_N ^ state).mul_(factor)
        if sum_N is not piece_N:
            piece_N.copy_(sum_N)


def _elements(words_N: Tensor) -> Tensor:
    """Elements of a direction, fp32 (N,), from int32 words before the last ``mix``; overwrites ``words_N``."""
    high_N = mix_(words_N) >> 16
    high_N &= 0xFFFF  # torch's shift copies the sign
    words_N &= 0xFFFF
    u_N = words_N.sub_(high_N).float().mul_(2.0**-16)
    square_N = u_N * u_N
    polynomial_N = torch.full_like(u_N, COEFFICIENTS[-1])
    for coefficient in COEFFICIENTS[-2::-1]:
        polynomial_N.mul_(square_N).add_(coefficient)
    return polynomial_N.mul_(u_N)
