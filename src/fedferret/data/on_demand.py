"""Tokens of many examples, made when a batch needs them: a first step does not wait for the tokens of all.

The batches are those of ``TokenisedData``, bit for bit. A batch depends on the lengths of its window
(``data/order.py``) and on nothing else, so the examples of that window alone are tokenised. A pass that begins after
half as many were tokenised as there are tokenises all, once and for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from fedferret.core.keys import Key
from fedferret.data.batches import Batch, TokenisedData
from fedferret.data.examples import Example
from fedferret.data.order import WINDOW, batch_of, drawn

MANY = 4_096  # examples; fewer are tokenised at once


class TokenisedOnDemand:
    """The examples of one client, tokenised window by window; what needs all of them tokenises all."""

    def __init__(self, examples: Sequence[Example], encode: Callable[[Sequence[Example]], TokenisedData]) -> None:
        """Tokenise nothing yet.

        Args:
            examples: of a client.
            encode: tokenises examples.
        """
        self._examples, self._encode, self._done = examples, encode, 0

    def __len__(self) -> int:
        return len(self._examples)

    @cached_property
    def whole(self) -> TokenisedData:
        """All examples, tokenised."""
        return self._encode(self._examples)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole, name)  # lengths, counts of tokens

    def take(self, rows: Sequence[int]) -> TokenisedData:
        """Choose examples.

        Args:
            rows: indices from 0, which may repeat.

        Returns:
            The examples with these indices, in this order.
        """
        return self.whole.take(rows)

    def batches(self, size: int, key: Key | None) -> Iterator[Batch]:
        """One pass over the examples.

        Args:
            size: examples per batch.
            key: draws which examples share a batch, and the order of the batches. None gives evaluation order.

        Returns:
            The batches of ``whole``.
        """
        if key is None or self._has_whole():
            yield from self.whole.batches(size, key)
            return
        windows, numbers = drawn(len(self), size, key)
        known: dict[int, tuple[TokenisedData, list[int]]] = {}
        for number in numbers:
            window = windows[number // WINDOW]
            if number // WINDOW not in known:
                known[number // WINDOW] = self._tokenised(window)
            tokens, order = known[number // WINDOW]
            yield tokens.batch(order[batch_of(number, size)], True)

    def _tokenised(self, window: Sequence[int]) -> tuple[TokenisedData, list[int]]:
        """The examples of a window, and their order by length."""
        tokens = self._encode([self._examples[row] for row in window])
        self._done += len(window)
        return tokens, sorted(range(len(window)), key=tokens.lengths.__getitem__)

    def _has_whole(self) -> bool:
        return "whole" in self.__dict__ or 2 * self._done > len(self)
