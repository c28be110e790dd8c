"""The k largest magnitudes of every chunk of consecutive values, and their places in few bits each.

Chunks never span tensors, and a tensor's last chunk may be shorter. A chunk of more than k values has k indices of
ceil(log2(chunk size)) bits, 12 for 4,096 values, ascending; of a chunk of k or fewer all values are taken, without
indices. So the layout follows from the tensors' sizes. Cost: one pass, and a copy of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Chunks:
    """The chunks of tensors.

    Attributes:
        sizes: number of values per tensor.
        chunk_size: of a full chunk.
        most: k, values that are taken of a chunk.
    """

    sizes: tuple[int, ...]
    chunk_size: int
    most: int

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Values per chunk, tensor after tensor."""
        return np.concatenate([np.zeros(0, np.int64), *(self._lengths(size) for size in self.sizes)])

    @cached_property
    def taken(self) -> npt.NDArray[np.int64]:
        """Values that are taken per chunk."""
        return np.minimum(self.lengths, self.most)

    @property
    def index_bits(self) -> int:
        """Of an index."""
        return (self.chunk_size - 1).bit_length()

    @property
    def num_index_bytes(self) -> int:
        """Of all indices."""
        return -(-int((self.lengths > self.most).sum()) * self.most * self.index_bits // 8)

    def taken_of(self, sizes: Sequence[int]) -> list[int]:
        """Values that are taken of tensors.

        Args:
            sizes: number of values per tensor.

        Returns:
            One number per tensor.
        """
        return [int(np.minimum(self._lengths(size), self.most).sum()) for size in sizes]

    def pack(self, places_V: Tensor) -> Tensor:
        """Pack places as indices.

        Args:
            places_V: of all values that are taken, counted from tensor to tensor, ascending, int64, shape (V,).

        Returns:
            uint8, shape (num_index_bytes,), low bits of a byte first.
        """
        indices = (places_V.cpu().numpy() - self._starts)[self._indexed]
        bits = (indices[:, None] >> np.arange(self.index_bits)) & 1
        return torch.from_numpy(np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little"))

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of ``pack``; the sender is not trusted.

        Args:
            packed: as received.

        Returns:
            The places, ascending, int64, shape (V,).

        Raises:
            ValueError: the indices have another length, do not ascend, or are beyond their chunk.
        """
        if packed.dtype != torch.uint8 or packed.shape != (self.num_index_bytes,):
            raise ValueError(f"{packed.numel():,} bytes of indices came where {self.num_index_bytes:,} were expected")
        count = int(self._indexed.sum())
        bits = np.unpackbits(packed.cpu().numpy(), count=count * self.index_bits, bitorder="little")
        places = self._starts + self._within
        places[self._indexed] += bits.reshape(count, self.index_bits).astype(np.int64) @ (
            np.int64(1) << np.arange(self.index_bits, dtype=np.int64)
        )
        places[self._indexed] -= self._within[self._indexed]
        if (np.diff(places) <= 0).any() or (places >= self._starts + np.repeat(self.lengths, self.taken)).any():
            raise ValueError("indices do not ascend within their chunk")
        return torch.from_numpy(places)

    def _lengths(self, size: int) -> npt.NDArray[np.int64]:
        """Of a tensor's chunks."""
        lengths = np.full(-(-size // self.chunk_size), self.chunk_size, np.int64)
        lengths[-1:] -= -size % self.chunk_size
        return lengths

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """For every value that is taken the place at which its chunk begins."""
        return np.repeat(np.cumsum(self.lengths) - self.lengths, self.taken)

    @cached_property
    def _within(self) -> npt.NDArray[np.int64]:
        """For every value that is taken how many of its chunk come before."""
        return np.arange(int(self.taken.sum())) - np.repeat(np.cumsum(self.taken) - self.taken, self.taken)

    @cached_property
    def _indexed(self) -> npt.NDArray[np.bool_]:
        """For every value that is taken whether it has an index."""
        return np.repeat(self.lengths > self.most, self.taken)


def chunk_positions(flat_N: Tensor, chunk_size: int, most: int) -> Tensor:
    """Places of the largest magnitudes of every chunk of a tensor.

    Args:
        flat_N: finite, any float dtype, shape (N,).
        chunk_size: of a full chunk.
        most: k, values to take of a chunk; of fewer all are taken.

    Returns:
        Ascending, int64, on the CPU; of equal magnitudes any are taken.
    """
    size = flat_N.numel()
    rows = functional.pad(flat_N.abs(), (0, -size % chunk_size), value=-1.0).view(-1, chunk_size)
    chosen = rows.topk(min(most, chunk_size), dim=1, sorted=False).indices.sort(dim=1).values.cpu()
    places = (chosen + torch.arange(len(rows))[:, None] * chunk_size).view(-1)
    return places[places < size]
