"""How a vector of coordinates crosses the wire: all of them in so many bits, or the top-1 of every group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedferret.bases.quantise import Packed, num_bytes, pack_vector
from fedferret.bases.top_one import TopOneCode, encode_top_one, top_one_bytes
from fedferret.core.keys import Key
from fedferret.core.pooling import within

Code: TypeAlias = Packed | TopOneCode


@dataclass(frozen=True)
class Coding:
    """A code's settings.

    Attributes:
        bits: of a coordinate, where all travel.
        group_size: coordinates of which the largest travels, as place and sign; 1: all travel.
    """

    bits: int
    group_size: int = 1

    def encode(self, values_K: Tensor, key: Key) -> Code:
        """Encode coordinates for the wire.

        Args:
            values_K: any float dtype, shape (K,).
            key: draws roundings and rotations.

        Returns:
            A ``Packed``; a ``TopOneCode`` where ``group_size`` is above 1.
        """
        if self.group_size == 1:
            return pack_vector(values_K, self.bits, key)
        return encode_top_one(values_K, self.group_size, key)

    def num_bytes(self, count: int) -> int:
        """The cost of a code.

        Args:
            count: number of coordinates, K.

        Returns:
            Bytes of the codes, without scale, seed and framing.
        """
        return num_bytes(count, self.bits) if self.group_size == 1 else top_one_bytes(count, self.group_size)

    def check(self, code: object, length: int) -> None:
        """Refuse a received code that does not fit this run.

        Args:
            code: as received, of any type.
            length: number of coordinates that the code must hold.

        Raises:
            ValueError: ``code`` has another type, other settings or another length, or its fields contradict each
                other.
        """
        wanted = Packed if self.group_size == 1 else TopOneCode
        if not isinstance(code, wanted):
            raise ValueError(f"a {type(code).__name__} came where a {wanted.__name__} was expected")
        if Coding.of(code) != self:
            raise ValueError(f"coordinates came as {Coding.of(code)}, and this run has {self}")
        code.check()
        if code.length != length:
            raise ValueError(f"{code.length} coordinates came, {length} were expected")

    def is_finite(self, code: Code) -> bool:
        """Check the values of a code that ``check`` took.

        A rotation keeps the norm, so no sum that undoes it is above that of all magnitudes: a code below 8 bits is
        decoded only where its scale is huge.

        Args:
            code: of this coding.

        Returns:
            Whether no coordinate is NaN or infinite.
        """
        rotated = isinstance(code, TopOneCode) or code.bits < 8
        if rotated and 4 * code.scale * code.length < torch.finfo(torch.float32).max:  # a level is below 3 scales
            return True
        return within(code.unpack(), math.inf)

    @classmethod
    def of(cls, code: Code) -> Coding:
        """Read the settings from a code.

        Args:
            code: as received; need not be valid.

        Returns:
            The settings that the code states.
        """
        return cls(code.bits) if isinstance(code, Packed) else cls(1, code.group)

    def __str__(self) -> str:
        return f"{self.bits} bits each" if self.group_size == 1 else f"the top-1 of every {self.group_size}"
