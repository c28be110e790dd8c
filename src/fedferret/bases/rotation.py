"""A keyed random rotation of K values in O(K log K): random signs, then fast Hadamard transforms.

For K = 2^m: signs from :mod:`fedferret.bases.hashing`, then the orthonormal Hadamard transform. For other K, the K
values are treated as a ring, and the transform of length 2^m < K is applied to four windows in turn, each time after
new signs: the first 2^m values, the last 2^m, and both again half a window further. Four windows spread the energy of
a few neighbours over all values. The inverse undoes the steps in reverse order. All steps are butterflies in a fixed
order and elementwise products, so both directions give the same bits on every node (DRIVE, Vargaftik et al., NeurIPS
2021, section 6). Compiled where there is a C compiler (native.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedferret.bases import native
from fedferret.bases.hashing import flip_signs
from fedferret.core.keys import Key


def rotate(values_K: Tensor, key: Key) -> Tensor:
    """The values rotated; the norm stays the same to rounding.

    Args:
        values_K: any float dtype, shape (K,).
        key: of the rotation.
    Returns:
        fp32, shape (K,).
    """
    rotated = values_K.detach().float()
    for number, start in enumerate(_windows(values_K.numel())):
        rotated = _step(rotated.roll(-start), key.fold("rotation", number), back=False).roll(start)
    return rotated


def rotate_back(rotated_K: Tensor, key: Key) -> Tensor:
    """The inverse of ``rotate`` with the same key, to rounding.

    Args:
        rotated_K: any float dtype, shape (K,).
        key: of the rotation.
    Returns:
        fp32, shape (K,).
    """
    values = rotated_K.detach().float()
    for number, start in reversed(list(enumerate(_windows(rotated_K.numel())))):
        values = _step(values.roll(-start), key.fold("rotation", number), back=True).roll(start)
    return values


def hadamard(values_K: Tensor) -> Tensor:
    """The orthonormal Hadamard transform, which is an involution.

    Args:
        values_K: fp32, shape (2^m,).
    Returns:
        A new tensor, fp32, shape (2^m,).
    """
    length = values_K.numel()
    result = values_K.clone()
    half = 1
    while half < length:
        pairs = result.view(-1, 2, half)
        result = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        half *= 2
    return result.view(-1) * torch.tensor(1 / math.sqrt(length), dtype=torch.float32)


def _step(ring_K: Tensor, key: Key, back: bool) -> Tensor:
    """New signs, then the Hadamard transform of the first window; or both undone. Overwrites ``ring_K``."""
    length = _window_length(ring_K.numel())
    if compiled := native.kernels(ring_K.device):
        compiled.rotate_(ring_K, length, key, back)
        return ring_K
    if not back:
        ring_K = flip_signs(ring_K, key, 0)
    ring_K = torch.cat((hadamard(ring_K[:length]), ring_K[length:]))
    return flip_signs(ring_K, key, 0) if back else ring_K


def _windows(count: int) -> tuple[int, ...]:
    """Where on the ring each window starts: one window for a power of two, else four; none for zero values."""
    if count == 0:
        return ()
    length = _window_length(count)
    last = count - length
    return (0,) if last == 0 else (0, last, length // 2, last + length // 2)


def _window_length(count: int) -> int:
    """The largest power of two that is at most ``count`` >= 1."""
    return 1 << (count.bit_length() - 1)
