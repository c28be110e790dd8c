"""Rounding to bf16 at random: up or down with the probabilities that keep the mean, by a key.

bf16 is the upper half of fp32's bits. With ``w0, w1 = key.words`` and ``hash`` as in hashing.py, the value at position
p of a tensor becomes

    (bits + hash(p, w1) div 2^16) div 2^16          the lower half is the probability, times 2^16, of going up

so E[rounded] = value, the error is below one rounding step, and a value that bf16 has stays what it is. Rounding to the
nearest instead would lose updates below half a rounding step, 2^-9 of a weight, one after the other. NaN and infinity
stay what they are. The same bits on every device, for every thread count.

Cost: two hashes per element. Compiled where there is a C compiler (native.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedferret.bases import native
from fedferret.bases.hashing import mix_, position_states, signed
from fedferret.core.keys import Key

_CHUNK = 1 << 16  # elements per chunk of the PyTorch fallback: they fit in a core's cache
_CHUNK_ACCELERATOR = 1 << 24  # so many that the time to launch kernels is negligible


def round_into_(target: Tensor, source: Tensor, key: Key) -> Tensor:
    """Overwrite a tensor with fp32 values, rounded at random where the tensor is bf16.

    Args:
        target: bf16, or another float dtype, which takes the nearest values; any layout.
        source: fp32, of the shape and on the device of ``target``.
        key: of this tensor and this rounding.

    Returns:
        ``target``.
    """
    with torch.no_grad():
        if target.dtype != torch.bfloat16:
            return target.copy_(source)
        whole = target.is_contiguous()
        flat_N = target.view(-1) if whole else torch.empty(target.numel(), dtype=target.dtype, device=target.device)
        source_N = source.detach().reshape(-1).contiguous()
        if compiled := native.kernels(target.device):
            compiled.round_to_bf16(source_N, flat_N, key)
        else:
            _round(source_N, flat_N, key)
        if not whole:
            target.copy_(flat_N.view(target.shape))
    return target


@contextmanager
def rounded_once(weight: Tensor, key: Key) -> Iterator[Tensor]:
    """Change a weight in fp32, and round it once, after all changes.

    Args:
        weight: fp32 or bf16.
        key: of this weight and this change.

    Returns:
        A context that gives an fp32 tensor to change in place: ``weight`` itself where it is fp32, else a copy, which
        is rounded at random into ``weight`` when the context ends without an error.
    """
    if weight.dtype != torch.bfloat16:
        yield weight
        return
    wide = weight.float()
    yield wide
    round_into_(weight, wide, key)


def _round(source_N: Tensor, target_N: Tensor, key: Key) -> None:
    chunk = _CHUNK if source_N.device.type == "cpu" else _CHUNK_ACCELERATOR
    for start in range(0, source_N.numel(), chunk):
        piece_N = source_N[start : start + chunk]
        words_N = position_states(key, start, start + piece_N.numel(), piece_N.device)
        words_N = mix_(words_N ^ signed(key.words[1]))
        words_N >>= 16
        words_N &= 0xFFFF  # torch's shift copies the sign
        words_N += piece_N.view(torch.int32)
        rounded_N = (words_N >> 16).to(torch.int16).view(torch.bfloat16)
        nearest_N = piece_N.to(torch.bfloat16)
        target_N[start : start + chunk] = torch.where(piece_N.isfinite(), rounded_N, nearest_N)
