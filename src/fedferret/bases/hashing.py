"""The shared randomness, defined bit for bit: signs and uniforms from 32-bit integer hashing.

All arithmetic is on 32-bit words modulo 2^32; ``^`` is exclusive or, ``>>`` shifts zeros in, ``w0, w1 = key.words``::

    mix(x):      x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97;  x ^= x >> 15
    hash(n, c):  mix(mix(n ^ w0) ^ c)
    sign(p):     lane = p mod 256, bit = (p div 256) mod 32, tile = p div 8192
                 minus where that bit of hash(256 tile + lane, w1) is set, bit 0 being the lowest
    u(p, k):     (2 j + 1) / 2^24 where j is the signed number in the top 24 bits of hash(p, mix(k ^ w1))

One hash gives 32 signs, and a run of 256 neighbours takes the same bit of 256 words: compilers can vectorise it.
A sign depends on its position alone, so no chunking, offset, dtype or number of coordinates can change it. ``mix`` is a
bijection, so no two words of a key's signs, nor of a column, come from the same state. Positions of signs stay under
2^37 and those of uniforms under 2^32, where the counter n would wrap. Two keys that differ in the low bits of w0 alone
would hold each other's signs, permuted; keys are hashes themselves, so none do. The constants of ``mix`` are from
Wellons' search for finalisers of low bias ("hash-prospector").

Cost: 1/32 hash and three integer operations for a sign, one hash for a uniform.
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
    """The low 32 bits of ``word`` as a signed number, which is how torch's int32 holds them."""
    return (word + 2**31) % 2**32 - 2**31


_MULTIPLIER_1 = signed(0x21F0AAAD)
_MULTIPLIER_2 = signed(0x735A2D97)


def mix_(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Hash the int32 tensor ``x`` in place; ``scratch`` of the same shape saves an allocation. Returns ``x``."""
    scratch = torch.empty_like(x) if scratch is None else scratch
    _fold_down_(x, 16, scratch)
    x *= _MULTIPLIER_1
    _fold_down_(x, 15, scratch)
    x *= _MULTIPLIER_2
    _fold_down_(x, 15, scratch)
    return x


def _fold_down_(x: Tensor, amount: int, scratch: Tensor) -> None:
    torch.bitwise_right_shift(x, amount, out=scratch)
    scratch &= (1 << (32 - amount)) - 1  # torch's shift copies the sign; the definition's shifts zeros in
    x ^= scratch


def counter(start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """The numbers ``start`` to ``stop - 1`` modulo 2^32, int32 (stop - start,)."""
    return torch.arange(stop - start, dtype=torch.int32, device=device).add_(signed(start))


def sign_masks(key: Key, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """For positions ``start`` to ``stop - 1`` the bit to XOR onto an fp32 number: 0, or -2^31 for a minus. int32."""
    low, high = key.words
    first, last = start // TILE, -(-stop // TILE)
    words = mix_(counter(first * LANES, last * LANES, device) ^ signed(low))
    words = mix_(words ^ signed(high)).view(-1, 1, LANES)
    to_top = torch.arange(31, -1, -1, dtype=torch.int32, device=device).view(32, 1)
    masks = torch.bitwise_left_shift(words, to_top).bitwise_and_(_SIGN_BIT)  # (tiles, 32, LANES)
    return masks.view(-1)[start - first * TILE : stop - first * TILE]


def flip_signs(values_N: Tensor, key: Key, start: int) -> Tensor:
    """A fresh fp32 tensor: 1-D ``values_N`` (any float dtype) times the signs of positions ``start`` onwards."""
    masks = sign_masks(key, start, start + values_N.numel(), values_N.device)
    return masks.bitwise_xor_(values_N.float().view(torch.int32)).view(torch.float32)


def position_states(key: Key, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """The inner half of the uniforms' hash, ``mix(p ^ w0)``, for positions ``start`` to ``stop - 1``. int32."""
    return mix_(counter(start, stop, device) ^ signed(key.words[0]))


def column_states(key: Key, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """The outer constant of the uniforms' hash, ``mix(k ^ w1)``, for columns ``start`` to ``stop - 1``. int32."""
    return mix_(counter(start, stop, device) ^ signed(key.words[1]))


def uniforms(columns_B: Tensor, positions_N: Tensor) -> Tensor:
    """fp32 (B, N) in (-1, 1), odd multiples of 2^-24: symmetric about zero, never zero, each exact in fp32."""
    words = torch.bitwise_xor(columns_B[:, None], positions_N[None, :])
    scratch = torch.empty_like(words)
    mix_(words, scratch)
    words >>= 7  # keeps the sign: the top 24 bits and one more, which becomes the 1 of 2 j + 1
    words |= 1
    return scratch.view(torch.float32).copy_(words).mul_(2.0**-24)
