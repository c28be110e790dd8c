"""Tensors in 8, 4, 2 or 1 bits per element, in chunks with one scale each.

    8 bits      chunks of 1,024 elements: stochastic rounding to 255 levels over the largest magnitude, unbiased
    4, 2, 1     chunks of 65,536 elements, rotated together and rounded as in ``bases/quantise.py``

Chunks never span tensors. Updates are heavy-tailed: after 5 SGD steps on SmolLM2 the largest element of a tensor's
update is 61 times its root mean square in the median, 1,013 times at most. With one scale per tensor, most of the 255
levels would stay unused. For that update at 8 bits:

    elements per scale       whole tensor   65,536   4,096    1,024      256
    relative error energy           0.068    0.026   0.008   0.0040   0.0016

After AdamW, where all steps are about equally large, the relative error energy is 4e-5 for every chunk size.

Cost of a tensor of n elements: ceil(n bits / 8) bytes, 4 bytes per chunk, and 1 to 4 bytes for n. Unpacking is
elementwise and bit-equal on every node.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from fedferret.bases.quantise import Packed, is_code, is_seed, pack_vector
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message

BITS = (8, 4, 2, 1)
_ROW = 1024  # elements that share a scale at 8 bits: 0.4% more bytes
_PIECE = 65_536  # elements packed at once, and rotated together below 8 bits: they fit in a core's cache


@message
class Chunked:
    """Flat tensors as they cross the wire. The message is enough to decode them."""

    codes: Annotated[Tensor, Form(torch.uint8, rank=1)]
    """uint8, shape (num_bytes(sizes, bits),): tensor after tensor, each of whole bytes."""
    scales: Annotated[Tensor, Form(torch.float32, rank=1)]
    """fp32, shape (num_scales(sizes, bits),): one per chunk."""
    sizes: tuple[int, ...]
    """Number of elements per tensor."""
    bits: int
    """Per element: 8, 4, 2 or 1."""
    seed: int
    """64 bits that key the rotations; 0 at 8 bits, where there are none."""

    def check(self) -> None:
        """Refuse fields that contradict each other, or a scale or a seed out of range.

        Raises:
            UserError: a field contradicts another, or is out of range.
        """
        known = (
            type(self.bits) is int and self.bits in BITS and all(type(size) is int and size >= 0 for size in self.sizes)
        )
        counts = (num_bytes(self.sizes, self.bits), num_scales(self.sizes, self.bits)) if known else (-1, -1)
        fits = known and is_code(self.codes, counts[0], counts[0]) and is_seed(self.seed, 64)
        scales_fit = self.scales.dtype == torch.float32 and self.scales.shape == (counts[1],)
        if not (fits and scales_fit and bool((self.scales >= 0).all() and torch.isfinite(self.scales).all())):
            raise UserError(
                f"{self.codes.numel():,} bytes and {self.scales.numel():,} scales are not {sum(self.sizes):,} values "
                f"in {self.bits} bits: the sender's version or the transport is at fault"
            )

    def unpack(self) -> tuple[Tensor, ...]:
        """The tensors' values.

        Returns:
            Per tensor of n elements, fp32, shape (n,).
        Raises:
            UserError: where the fields contradict each other.
        """
        self.check()
        tensors, byte, scale, index = [], 0, 0, 0
        for size in self.sizes:
            whole = torch.empty(size)
            for piece in torch.split(whole, _PIECE) if size else ():
                num_codes, count = -(-len(piece) * self.bits // 8), num_scales((len(piece),), self.bits)
                codes, scales = self.codes[byte : byte + num_codes], self.scales[scale : scale + count]
                if self.bits == 8:
                    piece.copy_((codes.float() - 128).mul_(scales.repeat_interleave(_ROW)[: len(piece)]))
                else:
                    seed = Key(self.seed).fold(index).words[0]
                    piece.copy_(Packed(codes, float(scales), self.bits, len(piece), seed).unpack())
                byte, scale, index = byte + num_codes, scale + count, index + 1
            tensors.append(whole)
        return tuple(tensors)


def pack_tensors(tensors: Iterable[Tensor], bits: int, key: Key) -> Chunked:
    """Pack tensors, one at a time.

    Args:
        tensors: finite, fp32, any shapes.
        bits: per element: 8, 4, 2 or 1.
        key: of the rounding (8 bits) or of the rotations (fewer).
    """
    codes: list[Tensor] = []
    scales: list[Tensor] = []
    sizes: list[int] = []
    for tensor in tensors:
        flat = tensor.contiguous().view(-1)
        sizes.append(len(flat))
        for piece in torch.split(flat, _PIECE) if len(flat) else ():
            piece_key = key.fold(len(codes))
            if bits == 8:
                coded, scale = _round_rows(piece, piece_key)
            else:
                packed = pack_vector(piece, bits, piece_key)
                coded, scale = packed.codes, torch.tensor([packed.scale])
            codes.append(coded.cpu())
            scales.append(scale.cpu())
    nothing = torch.empty(0)
    return Chunked(
        torch.cat([nothing.byte(), *codes]),
        torch.cat([nothing, *scales]),
        tuple(sizes),
        bits,
        0 if bits == 8 else key.value,
    )


def num_bytes(sizes: Iterable[int], bits: int) -> int:
    """Bytes of the codes of tensors.

    Args:
        sizes: number of elements per tensor.
        bits: per element.
    """
    return sum(-(-size * bits // 8) for size in sizes)  # only a tensor's last piece may end within a byte


def num_scales(sizes: Iterable[int], bits: int) -> int:
    """Number of scales of tensors: one per chunk.

    Args:
        sizes: number of elements per tensor.
        bits: per element.
    """
    chunk = _ROW if bits == 8 else _PIECE
    return sum(-(-size // chunk) for size in sizes)


def _round_rows(piece: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """Codes, and each row's step: as ``pack_vector`` at 8 bits, for many rows at a time."""
    rows_RC = functional.pad(piece, (0, -len(piece) % _ROW)).view(-1, _ROW)
    largest_R = rows_RC.abs().amax(dim=1)
    # rounded up: no value is above 127 steps, so none needs clamping
    steps_R = torch.nextafter(largest_R / 127, torch.tensor(torch.inf, device=piece.device))
    noise_RC = key.uniform(rows_RC.numel()).to(piece.device).view_as(rows_RC)
    codes_RC = noise_RC.add_(rows_RC / steps_R.double()[:, None]).floor_().add_(128).to(torch.uint8)
    return codes_RC.view(-1)[: len(piece)], steps_R
