"""What SparseLoCo's clients send: places, and values in 2 bits with two magnitudes per tensor, or in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from fedferret.bases.chunk_top_k import Chunks
from fedferret.bases.quantise import join_bytes, num_bytes, split_bytes
from fedferret.bases.signs import fit_two_magnitudes, two_magnitudes
from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.messages import message
from fedferret.core.pooling import NotFinite


@message
class ChunkedSparse(Payload["ChunkedSparse"]):
    """The largest values of every chunk. What the settings and the model say does not travel."""

    indices: Annotated[Tensor, Form(torch.uint8, rank=1)]
    """uint8, see ``bases/chunk_top_k.py``."""
    codes: Annotated[Tensor, Form(torch.uint8, rank=1)]
    """uint8, shape (ceil(V bits / 8),): chunk after chunk, low bits first; in 32 bits the fp32 values."""
    magnitudes: Annotated[Tensor, Form(torch.float32, rank=2)]
    """fp32, shape (T, 2): of every tensor the smaller and the larger; (0, 2) in 32 bits."""

    def check(self, chunks: Chunks, bits: int) -> None:
        """Refuse other numbers of values than the model has, and values that are not finite.

        Args:
            chunks: of the model.
            bits: of a value, 32 or 2.

        Raises:
            ValueError: a length or a data type is another, or a magnitude is negative.
            NotFinite: a value is NaN or infinite.
        """
        size = num_bytes(int(chunks.taken.sum()), bits)
        tensors = len(chunks.sizes) if bits == 2 else 0
        fits = self.codes.dtype == torch.uint8 and self.magnitudes.dtype == torch.float32
        if not fits or self.codes.shape != (size,) or self.magnitudes.shape != (tensors, 2):
            raise ValueError("the update is not the largest values of this model's chunks: another setting sent it")
        if not torch.isfinite(self.values(chunks, bits)).all() or not torch.isfinite(self.magnitudes).all():
            raise NotFinite("values holds NaN or infinity")
        if (self.magnitudes < 0).any():
            raise ValueError("a magnitude is negative")

    def values(self, chunks: Chunks, bits: int) -> Tensor:
        """The values, in the order of their places; lengths are right.

        Args:
            chunks: of the model.
            bits: of a value, 32 or 2.

        Returns:
            fp32, shape (V,).
        """
        if bits == 32:
            return self.codes.clone().view(torch.float32)
        codes = split_bytes(self.codes, 2, int(chunks.taken.sum()))
        counts = torch.tensor(chunks.taken_of(chunks.sizes))
        return two_magnitudes(codes, self.magnitudes.repeat_interleave(counts, dim=0))


def pack_values(values: Sequence[Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Pack the values of tensors.

    Args:
        values: of each tensor those that are taken, finite, fp32, shape (V_t,).
        bits: of a value, 32 or 2.

    Returns:
        The fields ``codes`` and ``magnitudes`` of a ``ChunkedSparse``.
    """
    if bits == 32:
        return torch.cat(list(values)).view(torch.uint8), torch.zeros(0, 2)
    fitted = [fit_two_magnitudes(part) for part in values]
    return join_bytes(torch.cat([codes for codes, _ in fitted]), 2), torch.stack([pair for _, pair in fitted])
