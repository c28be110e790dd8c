"""Coordinates in less than a bit each, top-1 of 8 to 32,768: per group, the index and the sign of the largest.

The K coordinates are rotated twice (:mod:`fedferret.bases.rotation`), which makes them close to independent Gaussians,
and split into groups of g = 2^m. The code of a group is m bits for the index of the largest magnitude and one bit for
its sign. Its magnitude is the same for all groups, ‖y‖²/Σ max|y|, which makes the component of the result along the
input the input itself, as at 4, 2 and 1 bits in :mod:`fedferret.bases.quantise`, but for the scale's rounding, 2^-9.

Relative error energy for long vectors: g/m_g² - 1, with m_g the mean of the maximum of g standard half-normal values.
Codes are compared by the total error at equal bytes, which includes the d/K of the basis. The same bytes hold g/(m + 1)
times as many coordinates as at one bit. For K far below d the total error energy is then (m + 1) (2/π)/m_g² times that
of one bit. No code of B bits has less than 1/(2^(2B/d) - 1), which is 0.46 of that of one bit.

    g                                                8       128     2,048    32,768
    g/m_g² - 1                                   1.515     15.01     154.8     1,778
    at equal bytes, of one bit's                 0.801     0.637     0.581     0.553

Wire: ceil(ceil(K/g) (m + 1) / 8) bytes: 4, 8, 12 or 16 bits a group. Time O(K log K): at equal bytes K grows with g.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fedferret.bases.quantise import (
    finite_fp32,
    is_code,
    is_scale,
    is_seed,
    join_bytes,
    num_bytes,
    rounded,
    split_bytes,
)
from fedferret.bases.rotation import rotate, rotate_back
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message

GroupSize: TypeAlias = Literal[1, 8, 128, 2048, 32768]  # with codes of whole half bytes; 1: all coordinates travel
GROUP_SIZES: tuple[int, ...] = get_args(GroupSize)[1:]


@message
class TopOneCode:
    """A vector of ``length`` values, top-1 of ``group``, as it crosses the wire. The message is enough to decode it."""

    codes: Annotated[Tensor, Form(torch.uint8, rank=1)]
    """uint8: per group 2 · index + (1 if positive), in 4, 8, 12 or 16 bits; low bits first."""
    scale: float
    """The magnitude of every group's largest, with eight significant bits: three bytes on the wire."""
    group: int
    """Values per group, of ``GROUP_SIZES``."""
    length: int
    """Number of values."""
    seed: int
    """32 bits that key the rotations."""

    def check(self) -> None:
        """Refuse fields that contradict each other, or a scale or seed out of range.

        Raises:
            UserError: a field contradicts another, or is out of range.
        """
        known = type(self.group) is int and self.group in GROUP_SIZES
        fits = known and is_code(self.codes, self.length, top_one_bytes(self.length, self.group))
        if not (fits and is_scale(self.scale) and is_seed(self.seed, 32)):
            raise UserError(
                f"{self.codes.numel():,} bytes are not the top-1 of {self.group} code of {self.length:,} values: "
                f"the sender's version or the transport is at fault"
            )

    def unpack(self) -> Tensor:
        """The values, bit-equal on every node.

        Returns:
            fp32, shape (length,).
        Raises:
            UserError: where the fields contradict each other.
        """
        self.check()
        groups = -(-self.length // self.group)
        codes_G = _split(self.codes, _bits(self.group), groups)
        signs_G = (codes_G % 2 * 2 - 1).float()
        rotated = torch.zeros(groups, self.group, device=codes_G.device)
        rotated.scatter_(1, (codes_G // 2)[:, None], signs_G[:, None] * torch.tensor(self.scale, dtype=torch.float32))
        first, second = _rotations(self.seed)
        return rotate_back(rotate_back(rotated.view(-1)[: self.length], second), first)


def encode_top_one(values_K: Tensor, group_size: int, key: Key) -> TopOneCode:
    """Pack values as the largest of each group.

    Args:
        values_K: any float dtype, shape (K,).
        group_size: of ``GROUP_SIZES``.
        key: of the rotations.
    Raises:
        UserError: for another group size, and for values that are NaN, infinite or too large for fp32.
    """
    if group_size not in GROUP_SIZES:
        raise UserError(f"group_size cannot be {group_size}: allowed are {', '.join(map(str, GROUP_SIZES))}")
    seed, length = key.words[0], values_K.numel()
    first, second = _rotations(seed)
    rotated = rotate(rotate(finite_fp32(values_K), first), second)
    groups = -(-length // group_size)
    padded = torch.zeros(groups * group_size, device=rotated.device)
    padded[:length] = rotated
    rows = padded.view(groups, group_size)
    indices_G = rows.abs().argmax(dim=1)
    largest_G = rows.gather(1, indices_G[:, None]).view(-1).double()
    # in fp64 the squares of the largest and smallest fp32 values neither overflow nor underflow
    energy, largest_sum = float(rotated.double().square().sum()), float(largest_G.abs().sum())
    codes = _join(indices_G * 2 + (largest_G > 0), _bits(group_size))
    return TopOneCode(codes, rounded(energy / largest_sum, torch.bfloat16) if energy else 0.0, group_size, length, seed)


def top_one_bytes(length: int, group_size: int) -> int:
    """Bytes of the codes of a packed vector.

    Args:
        length: number of values.
        group_size: of ``GROUP_SIZES``.
    """
    return num_bytes(-(-length // group_size), _bits(group_size))


def _rotations(seed: int) -> tuple[Key, Key]:
    """Keys of two rotations.

    After one rotation, a vector with nearly all of its energy in one entry has almost equal magnitudes, and the small
    entries would decide which is largest.
    """
    return Key(seed), Key(seed).fold("again")


def _bits(group_size: int) -> int:
    """Bits of the code of one group: index and sign."""
    return group_size.bit_length()


def _join(codes_G: Tensor, bits: int) -> Tensor:
    """Pack codes of whole half bytes into bytes, low half bytes first."""
    halves_GH = codes_G[:, None] >> torch.arange(0, bits, 4, device=codes_G.device) & 15
    return join_bytes(halves_GH.view(-1), 4)


def _split(joined: Tensor, bits: int, groups: int) -> Tensor:
    """The inverse of ``_join``: int64, shape (G,)."""
    halves_GH = split_bytes(joined, 4, groups * bits // 4).view(groups, bits // 4)
    return (halves_GH << torch.arange(0, bits, 4, device=joined.device)).sum(dim=1)
