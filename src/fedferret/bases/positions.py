"""Sorted positions of k out of d values in few bytes: integers from 0 to d - 1.

    k = d       nothing
    k <= 2^18   adaptively coded gaps (``bases/gaps.py``), where they are shorter than what follows
    otherwise   the shortest of a bitmap, ceil(d/8) bytes, and the Elias-Fano code with the best b: the b low bits of
                every position unchanged, and a bitmap with bit (p_i >> b) + i set for the i-th position p_i,
                ceil(k b/8) + ceil((k + (d-1 >> b)) / 8) bytes

Elias, "Efficient Storage and Retrieval by Content and Address of Static Files", JACM 1974; Fano 1971. Their code takes
under 2 + log2(d/k) bits per position, whatever the positions: the bound of every message. Coded gaps are shorter where
positions cluster: 7.4 bits and not 13.1 at 60,396 of SmolLM2's 134.5 M weights. They take 5 µs a position in Python,
hence the limit of 2^18. The layout follows from k, d and the number of bytes.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedferret.bases.gaps import decode_gaps, encode_gaps, least_gap_bytes
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.messages import message

_Bits = npt.NDArray[np.uint8]
_MOST_LOW_BITS = 40  # enough for a model of 2^40 weights
_MOST_GAPS = 2**18  # more positions than this do not have their gaps coded: it takes a second and a half


@message
class Positions:
    """``count`` ascending positions below ``length``, as they cross the wire."""

    codes: Annotated[Tensor, Form(torch.uint8, rank=1)]
    """uint8: a code of the gaps; or num_bytes(count, length) bytes, the low bits and the bitmap, low bits first."""
    count: int
    length: int

    def unpack(self) -> Tensor:
        """The positions, ascending.

        Returns:
            int64, shape (count,).
        Raises:
            UserError: where the fields contradict each other.
        """
        codes, count, length = self.codes.cpu().numpy(), self.count, self.length
        if not 0 <= count <= length or codes.ndim != 1 or codes.dtype != np.uint8:
            raise self._refusal("the number of bytes does not match")
        size = num_bytes(count, length)
        if len(codes) > size or (len(codes) < size and count > _MOST_GAPS):
            raise self._refusal("the number of bytes does not match")
        if count in (0, length):
            return torch.arange(count)
        if len(codes) < size:
            return torch.from_numpy(self._from_gaps(codes))
        low_bits = _low_bits(count, length)
        if low_bits is None:
            found = np.flatnonzero(_bits(codes, length))
        else:
            border = _num_low_bytes(count, low_bits)
            low_KB = _bits(codes[:border], count * low_bits).reshape(count, low_bits)
            high = np.flatnonzero(_bits(codes[border:], count + (length - 1 >> low_bits)))
            if len(high) != count:
                raise self._refusal(f"they encode {len(high):,}")
            weights = 1 << np.arange(low_bits, dtype=np.int64)
            found = (high - np.arange(count) << low_bits) + low_KB @ weights
        if len(found) != count or found[-1] >= length or (np.diff(found) <= 0).any():
            raise self._refusal("the positions do not ascend")
        return torch.from_numpy(found.astype(np.int64))

    def _from_gaps(self, codes: _Bits) -> npt.NDArray[np.int64]:
        """The positions behind coded gaps, which ascend by construction."""
        try:
            found = decode_gaps(codes, self.count)
        except ValueError as error:
            raise self._refusal(str(error)) from None
        if found[-1] >= self.length:
            raise self._refusal("a position is too large")
        return found

    def _refusal(self, what: str) -> UserError:
        """The error for fields that contradict each other in ``what``."""
        return UserError(
            f"{self.codes.numel():,} bytes are not {self.count:,} positions of {self.length:,} ({what}): the sender's "
            f"version or the transport is at fault"
        )


def pack_positions(positions_K: Tensor, length: int) -> Positions:
    """Pack positions in the shortest of the layouts.

    Args:
        positions_K: int64, ascending, distinct, from 0 to ``length - 1``, shape (K,).
        length: d, number of values that the positions refer to.
    """
    positions = positions_K.cpu().numpy()
    count = len(positions)
    codes: _Bits = np.zeros(0, np.uint8)
    if count not in (0, length):
        low_bits = _low_bits(count, length)
        if low_bits is None:
            codes = _bytes(positions, length)
        else:
            low_KB = (positions[:, None] >> np.arange(low_bits)) & 1
            high = (positions >> low_bits) + np.arange(count)
            codes = np.concatenate(
                (
                    np.packbits(low_KB.astype(np.uint8).reshape(-1), bitorder="little"),
                    _bytes(high, count + (length - 1 >> low_bits)),
                )
            )
        if count <= _MOST_GAPS and len(gaps := encode_gaps(positions)) < len(codes):
            codes = gaps
    return Positions(torch.from_numpy(codes), count, length)


def num_bytes(count: int, length: int) -> int:
    """The most bytes of packed positions: they grow with ``count``, except that all positions cost nothing.

    Args:
        count: k, number of positions.
        length: d, number of values that the positions refer to.
    """
    if count in (0, length):
        return 0
    low_bits = _low_bits(count, length)
    return -(-length // 8) if low_bits is None else _num_coded_bytes(count, length, low_bits)


def least_bytes(count: int, length: int) -> int:
    """The least bytes of packed positions.

    Args:
        count: k, number of positions.
        length: d, number of values that the positions refer to.
    """
    most = num_bytes(count, length)
    return min(most, least_gap_bytes(count)) if count <= _MOST_GAPS else most


def _low_bits(count: int, length: int) -> int | None:
    """Low bits per position in the shortest Elias-Fano code; None where the bitmap of all positions is shorter."""
    best = min(range(_MOST_LOW_BITS), key=lambda low_bits: _num_coded_bytes(count, length, low_bits))
    return best if _num_coded_bytes(count, length, best) < -(-length // 8) else None


def _num_coded_bytes(count: int, length: int, low_bits: int) -> int:
    """Bytes of the Elias-Fano code with ``low_bits``."""
    return _num_low_bytes(count, low_bits) + -(-(count + (length - 1 >> low_bits)) // 8)


def _num_low_bytes(count: int, low_bits: int) -> int:
    return -(-count * low_bits // 8)


def _bytes(set_bits: npt.NDArray[np.int64], count: int) -> _Bits:
    """A bitmap of ``count`` bits with ``set_bits`` set, packed."""
    bits = np.zeros(count, np.uint8)
    bits[set_bits] = 1
    return np.packbits(bits, bitorder="little")


def _bits(codes: _Bits, count: int) -> _Bits:
    """The first ``count`` bits of ``codes``, one per element."""
    return np.unpackbits(codes, count=count, bitorder="little")
