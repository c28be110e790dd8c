"""Coordinates in 32, 16, 8, 4, 2 or 1 bits, with a mean that stays right.

* 32 bits: the fp32 numbers. 16: fp16 of the values over a power of two.
* 8: stochastic rounding to 255 levels over the largest magnitude: unbiased for every vector.
* 4, 2, 1: coordinates are heavy-tailed, so they are first rotated (see :mod:`fedferret.bases.rotation`), after which
  they look Gaussian, and rounded to the best levels for a Gaussian. The scale ‖y‖²/<y, Q(y)> makes the result's
  component along the input exactly the input (1 bit: DRIVE, Vargaftik et al. 2021; more: EDEN, 2022).

Relative error energy for long vectors, D/(1 - D) with D the distortion of the levels: 0.5708 (π/2 - 1), 0.1331 and
0.009592 at 1, 2 and 4 bits. Below 8 bits the rotation is a Hadamard transform, not a uniformly random one: unbiased
for vectors that many entries share; where one entry is nearly all, the small ones come out smaller than they are.
Cost: ceil(K bits / 8) bytes, and O(K log K) time below 8 bits. Unpacking is elementwise and bit-equal everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedferret.bases.rotation import rotate, rotate_back
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import message

BITS = (32, 16, 8, 4, 2, 1)

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
    """A vector of ``length`` numbers as it crosses the wire; needs nothing else to be read."""

    codes: Tensor
    """uint8 (ceil(length * bits / 8),). Low bits of a byte come first, low bytes of a number first."""
    scale: float
    """An fp32 number by which the codes' levels are multiplied."""
    bits: int
    length: int
    seed: int
    """32 bits that key the rotation; 0 where there is none."""

    def unpack(self) -> Tensor:
        """The numbers, fp32 (length,), bit-equal on every node. ``UserError`` if the fields contradict each other."""
        if self.bits not in BITS or self.length < 0 or self.codes.numel() != num_bytes(self.length, self.bits):
            raise UserError(
                f"a packed vector of {self.codes.numel():,} bytes is not one of {self.length:,} numbers in "
                f"{self.bits} bits: the sender's version or the transport is at fault"
            )
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
    """Pack 1-D ``values_K`` (any float dtype) at ``bits`` bits a number; ``key`` draws the rounding or the rotation.

    ``UserError`` for another number of bits and for values that are not finite fp32 numbers.
    """
    if bits not in BITS:
        raise UserError(f"coordinates cannot have {bits} bits: allowed are {', '.join(map(str, BITS))}")
    values = finite_fp32(values_K)
    if bits == 32:
        return Packed(values.view(torch.uint8).clone(), 1.0, bits, values.numel(), 0)
    if bits >= 8:
        return _pack_against_largest(values, bits, key)
    return _pack_rotated(values, bits, seed=key.words[0])


def finite_fp32(values_K: Tensor) -> Tensor:
    """The values in fp32, contiguous. ``UserError`` where one is NaN, infinite or too large for fp32."""
    values = values_K.detach().float().contiguous()
    if not bool(torch.isfinite(values).all()):
        raise UserError("coordinates hold NaN or infinity: the update that gave them diverged, lower the learning rate")
    return values


def _pack_against_largest(values: Tensor, bits: int, key: Key) -> Packed:
    largest = float(values.abs().max()) if values.numel() else 0.0
    if bits == 16:
        # a power of two is exact to divide by; the result, in [-2, 2], keeps clear of fp16's overflow
        scale = math.ldexp(1.0, max(math.frexp(largest)[1] - 1, -126))
        codes = (values / scale).half().view(torch.uint8)
        return Packed(codes, scale, bits, values.numel(), 0)
    # rounded up, so that no value is above 127 steps and none needs clamping
    step = float(torch.nextafter(torch.tensor(largest, dtype=torch.float32) / 127, torch.tensor(torch.inf)))
    noise = key.uniform(values.numel()).to(values.device)
    codes = (values.double() / step + noise).floor_().add_(128).to(torch.uint8)
    return Packed(codes, step if largest else 0.0, bits, values.numel(), 0)


def _pack_rotated(values: Tensor, bits: int, seed: int) -> Packed:
    # in fp64 the squares of the largest and smallest fp32 numbers neither overflow nor vanish
    rotated = rotate(values, Key(seed)).double()
    energy = float(rotated.square().sum())
    if energy == 0:
        codes = torch.zeros(num_bytes(values.numel(), bits), dtype=torch.uint8, device=values.device)
        return Packed(codes, 0.0, bits, values.numel(), seed)
    levels = _levels(bits, values.device).double()
    boundaries = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(rotated * math.sqrt(values.numel() / energy), boundaries)
    scale = energy / float((rotated * levels[codes]).sum())
    return Packed(join_bytes(codes, bits), rounded_to_fp32(scale), bits, values.numel(), seed)


def _levels(bits: int, device: torch.device) -> Tensor:
    positive = _LEVELS[bits]
    return torch.tensor([*(-level for level in reversed(positive)), *positive], dtype=torch.float32, device=device)


def num_bytes(length: int, bits: int) -> int:
    """Bytes of ``length`` codes of 1, 2, 4 or 8 bits, or numbers of 16 or 32."""
    return -(-length * bits // 8)


def join_bytes(codes_K: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2, 4 or 8 bits as uint8 (num_bytes,), low bits of a byte first."""
    per_byte = 8 // bits
    padded = torch.zeros(num_bytes(codes_K.numel(), bits) * per_byte, dtype=torch.uint8, device=codes_K.device)
    padded[: codes_K.numel()] = codes_K.to(torch.uint8)
    joined = torch.zeros(len(padded) // per_byte, dtype=torch.uint8, device=codes_K.device)
    for place in range(per_byte):
        joined |= padded[place::per_byte] << (place * bits)
    return joined


def split_bytes(joined: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of ``join_bytes``: int64 (length,)."""
    shifts = torch.arange(0, 8, bits, device=joined.device)
    codes: Tensor = (joined.long()[:, None] >> shifts) & (2**bits - 1)
    return codes.view(-1)[:length]


def rounded_to_fp32(value: float) -> float:
    """The nearest fp32 number."""
    return float(torch.tensor(value, dtype=torch.float32))
