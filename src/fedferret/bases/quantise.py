"""Coordinates in 32, 16, 8, 4, 2 or 1 bits, unbiased.

* 32 bits: the fp32 values. 16 bits: fp16 of the values divided by a power of two.
* 8 bits: stochastic rounding to 255 levels over the largest magnitude, unbiased for every vector.
* 4, 2, 1 bits: coordinates are heavy-tailed, so they are first rotated (see :mod:`fedferret.bases.rotation`), which
  makes their distribution close to Gaussian, and then rounded to the optimal levels for a Gaussian. The scale
  ‖y‖²/<y, Q(y)> makes the component of the result along the input exactly the input. This is EDEN (Vargaftik et al.,
  ICML 2022, arXiv 2108.08842) at whole bits, and at 1 bit DRIVE (NeurIPS 2021); ``tests/reference/test_eden.py``.
  For less than a bit a value EDEN leaves values out at random; here an update is projected at random.

Relative error energy for long vectors, D/(1 - D) with D the distortion of the levels: 0.5708 (π/2 - 1), 0.1331 and
0.009592 at 1, 2 and 4 bits. Below 8 bits the rotation is a Hadamard transform, not a uniformly random rotation. It is
unbiased for vectors with the energy spread over many entries; where one entry has nearly all of the energy, the small
entries are shrunk towards zero.

Cost: ceil(K bits / 8) bytes, and O(K log K) time below 8 bits. Unpacking is elementwise and bit-equal on every node.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Literal, TypeAlias

import torch
from torch import Tensor

from fedferret.bases.rotation import rotate, rotate_back
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.pooling import within

BITS = (32, 16, 8, 4, 2, 1)

Bits: TypeAlias = Literal[32, 16, 8, 4, 2, 1]  # of a packed value

# the positive levels that minimise a standard Gaussian's mean squared rounding error (Lloyd 1957, Max 1960)
_LEVELS = {
    1: (0.7978845608028654,),
    2: (0.4527800346364925, 1.5104176084990963),
    4: (
        0.12839502985114726,
        0.38804829949028974,
        0.6567591185324636,
        0.9423404564869603,
        1.2562311973471778,
        1.618046386021883,
        2.0690172265313893,
        2.7325895709951644,
    ),
}


@message
class Packed:
    """A vector of ``length`` values as it crosses the wire. The message is enough to decode it."""

    codes: Annotated[Tensor, Form(torch.uint8, rank=1)]
    """uint8, shape (ceil(length * bits / 8),): low bits of a byte first, low bytes of a value first."""
    scale: float
    """An fp32 value, the factor on the codes' levels."""
    bits: int
    """Per value: 32, 16, 8, 4, 2 or 1."""
    length: int
    """Number of values."""
    seed: int
    """32 bits that key the rotation; 0 at 8 bits and more, where there is none."""

    def check(self) -> None:
        """Refuse fields that contradict each other, or a scale or seed out of range.

        Raises:
            UserError: a field contradicts another, or is out of range.
        """
        fits = type(self.bits) is int and self.bits in BITS
        fits = fits and is_code(self.codes, self.length, num_bytes(self.length, self.bits))
        if not (fits and is_scale(self.scale) and is_seed(self.seed, 32)):
            raise UserError(
                f"a packed vector of {self.codes.numel():,} bytes is not one of {self.length:,} values in "
                f"{self.bits} bits: the sender's version or the transport is at fault"
            )

    def unpack(self) -> Tensor:
        """The values, bit-equal on every node.

        Returns:
            fp32, shape (length,).

        Raises:
            UserError: where the fields contradict each other.
        """
        self.check()
        if self.bits == 32:
            return self.codes.clone().view(torch.float32)
        scale = torch.tensor(self.scale, dtype=torch.float32)
        if self.bits == 16:
            return self.codes.clone().view(torch.float16).float() * scale
        codes = split_bytes(self.codes, self.bits, self.length)
        if self.bits == 8:
            return (codes.float() - 128) * scale
        return rotate_back(_levels(self.bits, codes.device)[codes] * scale, Key(self.seed))


def pack_vector(values_K: Tensor, bits: int, key: Key) -> Packed:
    """Pack values in ``bits`` bits each.

    Args:
        values_K: any float dtype, shape (K,).
        bits: 32, 16, 8, 4, 2 or 1.
        key: of the rounding (8 bits) or of the rotation (fewer).

    Returns:
        The message, with codes on the device of ``values_K``.

    Raises:
        UserError: for another number of bits, and for values that are NaN, infinite or too large for fp32.
    """
    if bits not in BITS:
        raise UserError(f"coordinates cannot have {bits} bits: allowed are {', '.join(map(str, BITS))}")
    values = finite_fp32(values_K)
    if bits == 32:
        return Packed(values.view(torch.uint8).clone(), 1.0, bits, values.numel(), 0)
    if bits >= 8:
        return _pack_against_largest(values, bits, key)
    return _pack_rotated(values, bits, seed=key.words[0])


def is_code(codes: Tensor, length: int, count: int) -> bool:
    """Check the codes of a received message.

    Args:
        codes: as received.
        length: number of values, as the message states it.
        count: the bytes that the codes of so many values have.

    Returns:
        Whether ``codes`` are uint8 of shape (count,) and ``length`` is an integer of at least 0.
    """
    return type(length) is int and length >= 0 and codes.dtype == torch.uint8 and codes.shape == (count,)


def is_scale(scale: float) -> bool:
    """Check the scale of a received message.

    Args:
        scale: as received.

    Returns:
        Whether ``scale`` is a float from 0 to the largest finite fp32 value.
    """
    return type(scale) is float and 0 <= scale <= torch.finfo(torch.float32).max


def is_seed(seed: int, bits: int) -> bool:
    """Check the seed of a received message.

    Args:
        seed: as received.
        bits: of a valid seed.

    Returns:
        Whether ``seed`` is an integer from 0 to 2^bits - 1.
    """
    return type(seed) is int and 0 <= seed < 2**bits


def finite_fp32(values_K: Tensor) -> Tensor:
    """Convert coordinates to fp32, and refuse those of a diverged update.

    Args:
        values_K: any float dtype, shape (K,).

    Returns:
        fp32, shape (K,), contiguous and detached.

    Raises:
        UserError: where a value is NaN, infinite or too large for fp32.
    """
    values = values_K.detach().float().contiguous()
    if not within(values, math.inf):
        raise UserError("coordinates contain NaN or infinity: the update diverged, lower the learning rate")
    return values


def _pack_against_largest(values: Tensor, bits: int, key: Key) -> Packed:
    """Pack in 16 or 8 bits, with a scale from the largest magnitude."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if bits == 16:
        # division by a power of two is exact, and results in [-2, 2] cannot overflow fp16
        scale = math.ldexp(1.0, max(math.frexp(largest)[1] - 1, -126))
        codes = (values / scale).half().view(torch.uint8)
        return Packed(codes, scale, bits, values.numel(), 0)
    # rounded up: no value is above 127 steps, so none needs clamping
    step = float(torch.nextafter(torch.tensor(largest, dtype=torch.float32) / 127, torch.tensor(torch.inf)))
    noise = key.uniform(values.numel()).to(values.device)
    codes = (values.double() / step + noise).floor_().add_(128).to(torch.uint8)
    return Packed(codes, step if largest else 0.0, bits, values.numel(), 0)


def _pack_rotated(values: Tensor, bits: int, seed: int) -> Packed:
    """Pack in 4, 2 or 1 bits, after a rotation."""
    # in fp64 the squares of the largest and smallest fp32 values neither overflow nor underflow
    rotated = rotate(values, Key(seed)).double()
    energy = float(rotated.square().sum())
    if energy == 0:
        codes = torch.zeros(num_bytes(values.numel(), bits), dtype=torch.uint8, device=values.device)
        return Packed(codes, 0.0, bits, values.numel(), seed)
    levels = _levels(bits, values.device).double()
    if bits == 1:  # the same without a search, as the one boundary is 0
        codes, products = rotated > 0, rotated.abs() * levels[1]
    else:
        boundaries = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(rotated * math.sqrt(values.numel() / energy), boundaries)
        products = rotated * levels[codes]
    return Packed(join_bytes(codes, bits), rounded(energy / float(products.sum())), bits, values.numel(), seed)


@lru_cache
def _levels(bits: int, device: torch.device) -> Tensor:
    """All 2^bits levels, ascending, fp32."""
    positive = _LEVELS[bits]
    return torch.tensor([*(-level for level in reversed(positive)), *positive], dtype=torch.float32, device=device)


def num_bytes(length: int, bits: int) -> int:
    """The cost of a packed vector.

    Args:
        length: number of values.
        bits: per value: 32, 16, 8, 4, 2 or 1.

    Returns:
        Bytes of the codes: ceil(length * bits / 8).
    """
    return -(-length * bits // 8)


def join_bytes(codes_K: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes, low bits of a byte first.

    Args:
        codes_K: integers below 2^bits, shape (K,).
        bits: per code: 8, 4, 2 or 1.

    Returns:
        uint8, shape (num_bytes(K, bits),).
    """
    per_byte = 8 // bits
    padded = torch.zeros(num_bytes(codes_K.numel(), bits) * per_byte, dtype=torch.uint8, device=codes_K.device)
    padded[: codes_K.numel()] = codes_K
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes_K.device)
    return (padded.view(-1, per_byte) << shifts).sum(dim=1, dtype=torch.uint8)  # no two codes share a bit


def split_bytes(joined: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of ``join_bytes``.

    Args:
        joined: uint8, shape (num_bytes(length, bits),).
        bits: per code: 8, 4, 2 or 1.
        length: number of codes.

    Returns:
        int64, shape (length,).
    """
    shifts = torch.arange(0, 8, bits, device=joined.device)
    codes: Tensor = (joined.long()[:, None] >> shifts) & (2**bits - 1)
    return codes.view(-1)[:length]


def rounded(value: float, dtype: torch.dtype = torch.float32) -> float:
    """Round a number to what a data type holds.

    Args:
        value: any float.
        dtype: fp32, or bf16, the upper half of fp32.

    Returns:
        The nearest value of ``dtype``; infinity, with the sign of ``value``, beyond its range.
    """
    return float(torch.tensor(value, dtype=dtype))
