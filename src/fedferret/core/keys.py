"""Keyed randomness: every random choice is a pure function of words, never of history.

A :class:`Key` is 64 bits. ``key.fold(word, ...)`` hashes further words in (BLAKE2b), so
``Key.of(seed, "local", round, client)`` is the same on every machine, in any order of calls, and no
two purposes share a stream. Words are folded, never added: neighbouring seeds have nothing in common.

Vectors of random bits come from a counter-based generator, ``mix(key, position)`` (SplitMix64's finaliser
on wrapping 64-bit integers): bit-equal on every device, for every chunk size and thread count.
No global generator is read or seeded anywhere in the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit integer: torch has no wrapping uint64 arithmetic
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Key:
    """64 bits from which a stream of random choices follows."""

    value: int

    @classmethod
    def of(cls, seed: int, *words: int | str) -> Key:
        """The key of one purpose in one run.

        Args:
            seed: of the run; any integer.
            words: name the purpose, such as ``"local", round, client``.

        Returns:
            A key that depends on the seed and on every word, in order.
        """
        return cls(0).fold(seed, *words)

    def fold(self, *words: int | str) -> Key:
        """Derive a key for a narrower purpose.

        Args:
            words: name the purpose; the integer 7 and the string "7" differ.

        Returns:
            A new key that depends on this one and on every word, in order.
        """
        value = self.value
        for word in words:
            # the tag keeps the word 7 apart from the word "7"
            tagged = b"i%d" % word if isinstance(word, int) else b"s" + word.encode()
            digest = hashlib.blake2b(value.to_bytes(8, "little") + tagged, digest_size=8).digest()
            value = int.from_bytes(digest, "little")
        return Key(value)

    @property
    def words(self) -> tuple[int, int]:
        """The key as two unsigned 32-bit words (low, high), for 32-bit hashing."""
        return self.value & 0xFFFFFFFF, self.value >> 32

    def bits(self, count: int) -> Tensor:
        """Draw random bits.

        Args:
            count: number of values; a larger count extends the same stream.

        Returns:
            Independent values, uniform over all 64 bits, int64 on the CPU, shape (count,).
        """
        signed = self.value - 2**64 if self.value >= 2**63 else self.value
        x = torch.arange(1, count + 1, dtype=torch.int64) * _GOLDEN + signed
        x = (x ^ _shift_right(x, 30)) * _MIX_1
        x = (x ^ _shift_right(x, 27)) * _MIX_2
        return x ^ _shift_right(x, 31)

    def uniform(self, count: int) -> Tensor:
        """Draw real numbers.

        Args:
            count: number of values; a larger count extends the same stream.

        Returns:
            Values in [0, 1), each a multiple of 2^-53, fp64 on the CPU, shape (count,).
        """
        return _shift_right(self.bits(count), 11).double() * 2.0**-53

    def permutation(self, count: int) -> list[int]:
        """Draw an order.

        Args:
            count: number of places.

        Returns:
            The numbers 0 to ``count - 1`` in an order drawn by this key.
        """
        return self.order(count).tolist()

    def order(self, count: int) -> Tensor:
        """Draw an order, as ``permutation`` does.

        Args:
            count: number of places.

        Returns:
            The same numbers, int64, shape (count,): of many places a quarter of a list's memory.
        """
        return torch.argsort(self.bits(count), stable=True)

    def sample(self, population: Sequence[T], count: int) -> list[T]:
        """Draw without replacement.

        Args:
            population: members to draw from; equal members count as different.
            count: members to draw; a smaller population is returned whole.

        Returns:
            The drawn members, in the population's order.
        """
        chosen = sorted(self.permutation(len(population))[:count])
        return [population[index] for index in chosen]


def _shift_right(x: Tensor, amount: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return (x >> amount) & ((1 << (64 - amount)) - 1)
