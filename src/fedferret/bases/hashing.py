"""Shared randomness, defined bit for bit: random signs and uniform values from 32-bit integer hashing.

All arithmetic is on 32-bit words modulo 2^32; ``^`` is exclusive or, ``>>`` shifts zeros in, ``w0, w1 = key.words``::

    mix(x):      x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97;  x ^= x >> 15
    hash(n, c):  mix(mix(n ^ w0) ^ c)
    sign(p):     lane = p mod 256, bit = (p div 256) mod 32, tile = p div 8192
                 minus where that bit of hash(256 tile + lane, w1) is set; bit 0 is the lowest
    u(p, k):     (2 j + 1) / 2^24 where j is the signed integer in the top 24 bits of hash(p, mix(k ^ w1))

One hash gives 32 signs. A run of 256 neighbouring positions takes the same bit of 256 words, which compilers can
vectorise. A sign depends on its position only: chunks, offset, dtype and number of coordinates do not change it.
``mix`` is a bijection, so no two words of a key's signs, nor of a column, come from the same state. Positions of signs
stay under 2^37 and those of uniforms under 2^32, where the counter n would wrap. Two keys that differ only in the low
bits of w0 would have the same signs in another order; keys are hashes, so this does not occur. The constants of ``mix``
are from Wellons' search for finalisers of low bias ("hash-prospector").

Cost: 1/32 hash and three integer operations per sign, one hash per uniform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedferret.core.keys import Key

LANES = 256
TILE = 32 * LANES
MAX_SIGN_POSITION = 2**37
MAX_UNIFORM_POSITION = 2**32

_SIGN_BIT = -(2**31)


def signed(word: int) -> int:
    """The low 32 bits of ``word`` as a signed integer: the value that torch's int32 has for these bits."""
    return (word + 2**31) % 2**32 - 2**31


_MULTIPLIER_1 = signed(0x21F0AAAD)
_MULTIPLIER_2 = signed(0x735A2D97)


def mix_(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Hash words in place.

    Args:
        x: int32, any shape.
        scratch: int32, the shape of ``x``, overwritten; saves an allocation.
    Returns:
        ``x``.
    """
    scratch = torch.empty_like(x) if scratch is None else scratch
    _fold_down_(x, 16, scratch)
    x *= _MULTIPLIER_1
    _fold_down_(x, 15, scratch)
    x *= _MULTIPLIER_2
    _fold_down_(x, 15, scratch)
    return x


def _fold_down_(x: Tensor, amount: int, scratch: Tensor) -> None:
    """x ^= x >> amount."""
    torch.bitwise_right_shift(x, amount, out=scratch)
    scratch &= (1 << (32 - amount)) - 1  # torch's shift copies the sign, the definition shifts zeros in
    x ^= scratch


def counter(start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """The integers ``start`` to ``stop - 1`` modulo 2^32.

    Args:
        start: first integer.
        stop: one after the last integer.
        device: of the result.
    Returns:
        int32, shape (stop - start,).
    """
    return torch.arange(stop - start, dtype=torch.int32, device=device).add_(signed(start))


def sign_masks(key: Key, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """The signs of positions as masks to XOR onto the bits of fp32 values: 0, or -2^31 for a minus.

    Args:
        key: of the block.
        start: first position.
        stop: one after the last position.
        device: of the result.
    Returns:
        int32, shape (stop - start,).
    """
    low, high = key.words
    first, last = start // TILE, -(-stop // TILE)
    words = mix_(counter(first * LANES, last * LANES, device) ^ signed(low))
    words = mix_(words ^ signed(high)).view(-1, 1, LANES)
    to_top = torch.arange(31, -1, -1, dtype=torch.int32, device=device).view(32, 1)
    masks = torch.bitwise_left_shift(words, to_top).bitwise_and_(_SIGN_BIT)  # (tiles, 32, LANES)
    return masks.view(-1)[start - first * TILE : stop - first * TILE]


def flip_signs(values_N: Tensor, key: Key, start: int) -> Tensor:
    """Values times the signs of their positions.

    Args:
        values_N: any float dtype, shape (N,).
        key: of the block.
        start: position of the first value.
    Returns:
        A new tensor, fp32, shape (N,).
    """
    masks = sign_masks(key, start, start + values_N.numel(), values_N.device)
    return masks.bitwise_xor_(values_N.float().view(torch.int32)).view(torch.float32)


def flip_signs_at(values_K: Tensor, key: Key, positions_K: Tensor) -> Tensor:
    """Values times the signs of positions in any order: those that ``flip_signs`` gives them.

    Args:
        values_K: any float dtype, shape (K,).
        key: of the block.
        positions_K: int64, below 2^37, shape (K,), on the device of ``values_K``.
    Returns:
        A new tensor, fp32, shape (K,).
    """
    low, high = key.words
    words = positions_K // TILE * LANES + positions_K % LANES
    words_K = ((words + 2**31) % 2**32 - 2**31).int()  # the same bits as a signed integer
    words_K = mix_(mix_(words_K ^ signed(low)) ^ signed(high))
    bits_K = words_K >> (positions_K // LANES % 32).int()
    return torch.where(bits_K & 1 == 1, -values_K.float(), values_K.float())


def position_states(key: Key, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """The inner half of the uniforms' hash, ``mix(p ^ w0)``, of positions p.

    Args:
        key: of the block.
        start: first position.
        stop: one after the last position.
        device: of the result.
    Returns:
        int32, shape (stop - start,).
    """
    return mix_(counter(start, stop, device) ^ signed(key.words[0]))


def column_states(key: Key, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """The outer constant of the uniforms' hash, ``mix(k ^ w1)``, of columns k.

    Args:
        key: of the block.
        start: first column.
        stop: one after the last column.
        device: of the result.
    Returns:
        int32, shape (stop - start,).
    """
    return mix_(counter(start, stop, device) ^ signed(key.words[1]))


def uniforms(columns_B: Tensor, positions_N: Tensor) -> Tensor:
    """Uniforms in (-1, 1), odd multiples of 2^-24: symmetric about zero, never zero, each exact in fp32.

    Args:
        columns_B: ``column_states``, int32, shape (B,).
        positions_N: ``position_states``, int32, shape (N,).
    Returns:
        fp32, shape (B, N).
    """
    words = torch.bitwise_xor(columns_B[:, None], positions_N[None, :])
    scratch = torch.empty_like(words)
    mix_(words, scratch)
    words >>= 7  # with the sign: the top 24 bits, and one more bit that becomes the 1 of 2 j + 1
    words |= 1
    return scratch.view(torch.float32).copy_(words).mul_(2.0**-24)
