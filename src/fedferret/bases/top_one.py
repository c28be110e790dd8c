"""Coordinates in less than a bit each: of every 8 or 128, only the largest travels, as its place and its sign.

The K coordinates are rotated twice (:mod:`fedferret.bases.rotation`), after which they look like independent Gaussians,
and cut into groups of g = 2^m. A group's code is m bits for the place of its largest magnitude and one for its sign;
the value is the same for all groups, ‖y‖²/Σ max|y|, so that the result's component along the input is exactly the
input, as with the fewest bits of :mod:`fedferret.bases.quantise`.

Relative error energy for long vectors: g/m_g² - 1, with m_g the mean of the largest of g standard half-normal numbers,
1.515 for g = 8 and 15.01 for g = 128. What counts is the whole error at equal bytes, the basis's d/K included: the same
bytes hold g/(m + 1) times as many coordinates as at one bit, and for K far below d the whole error energy is then
(m + 1) (2/π)/m_g² of one bit's, 0.80 and 0.64. No code of B bits has less than 1/(2^(2B/d) - 1), which is 0.46 of it.

Wire: ceil(ceil(K/g) (m + 1) / 8) bytes: half a bit a coordinate for g = 8, a sixteenth for g = 128. Time O(K log K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedferret.bases.quantise import finite_fp32, join_bytes, num_bytes, rounded_to_fp32, split_bytes
from fedferret.bases.rotation import rotate, rotate_back
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import message

GROUPS = (8, 128)


@message
class TopOneCode:
    """A vector of ``length`` numbers of which one in ``group`` crossed the wire; needs nothing else to be read."""

    codes: Tensor
    """uint8: a group's place times two, and one more if it is positive, in 4 bits (low bits of a byte first) or 8."""
    scale: float
    """An fp32 number: the magnitude of what was picked."""
    group: int
    length: int
    seed: int
    """32 bits that key the rotation."""

    def unpack(self) -> Tensor:
        """The numbers, fp32 (length,), bit-equal on every node. ``UserError`` if the fields contradict each other."""
        if self.group not in GROUPS or self.length < 0 or self.codes.numel() != top_one_bytes(self.length, self.group):
            raise UserError(
                f"{self.codes.numel():,} bytes are not the largest of every {self.group} of {self.length:,} numbers: "
                f"the sender's version or the transport is at fault"
            )
        groups = -(-self.length // self.group)
        codes_G = split_bytes(self.codes, _bits(self.group), groups).long()
        signs_G = (codes_G % 2 * 2 - 1).float()
        rotated = torch.zeros(groups, self.group, device=codes_G.device)
        rotated.scatter_(1, (codes_G // 2)[:, None], signs_G[:, None] * torch.tensor(self.scale, dtype=torch.float32))
        first, second = _rotations(self.seed)
        return rotate_back(rotate_back(rotated.view(-1)[: self.length], second), first)


def encode_top_one(values_K: Tensor, group: int, key: Key) -> TopOneCode:
    """Pack 1-D ``values_K`` (any float dtype) as the largest of every ``group``; ``key`` draws the rotation.

    ``UserError`` for another size of group and for values that are not finite fp32 numbers.
    """
    if group not in GROUPS:
        raise UserError(f"coordinates cannot be picked from {group}: allowed are {', '.join(map(str, GROUPS))}")
    seed, length = key.words[0], values_K.numel()
    first, second = _rotations(seed)
    rotated = rotate(rotate(finite_fp32(values_K), first), second)
    groups = -(-length // group)
    padded = torch.zeros(groups * group, device=rotated.device)
    padded[:length] = rotated
    rows = padded.view(groups, group)
    places_G = rows.abs().argmax(dim=1)
    largest_G = rows.gather(1, places_G[:, None]).view(-1).double()
    # in fp64 the squares of the largest and smallest fp32 numbers neither overflow nor vanish
    energy, reached = float(rotated.double().square().sum()), float(largest_G.abs().sum())
    codes = join_bytes(places_G * 2 + (largest_G > 0), _bits(group))
    return TopOneCode(codes, rounded_to_fp32(energy / reached) if energy else 0.0, group, length, seed)


def top_one_bytes(length: int, group: int) -> int:
    """Bytes of the codes."""
    return num_bytes(-(-length // group), _bits(group))


def _rotations(seed: int) -> tuple[Key, Key]:
    """Two: after one, a vector that is nearly all one entry has equal magnitudes, and the rest picks among them."""
    return Key(seed), Key(seed).fold("again")


def _bits(group: int) -> int:
    """Of one group's code: its place and its sign."""
    return group.bit_length()
