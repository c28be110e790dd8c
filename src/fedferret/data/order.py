"""The order of examples in batches.

An epoch: shuffle the examples with the key; sort each window of 16 batches by length; cut into batches; shuffle the
batches with the key. Every example occurs exactly once. Evaluation goes from the longest example to the shortest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedferret.core.keys import Key

WINDOW = 16  # batches per window that is sorted by length


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Evaluation order: no later batch needs more memory than the first.

    Args:
        lengths: of the examples, in tokens.

    Returns:
        The indices of the examples, longest first; equal lengths keep their order.
    """
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def grouped(lengths: Sequence[int], size: int, key: Key | None) -> list[list[int]]:
    """The examples of each batch in one pass.

    Args:
        lengths: of the examples, in tokens; equal where examples have no length.
        size: examples per batch; one batch may be smaller.
        key: draws which examples share a batch, and the order of the batches. None gives evaluation order.

    Returns:
        Indices of the examples, batch by batch; every example once.
    """
    if key is None:
        order = longest_first(lengths)
        return [order[start : start + size] for start in range(0, len(order), size)]
    windows, groups = drawn(len(lengths), size, key)
    for window in windows:
        window.sort(key=lambda row: lengths[row])
    return [windows[number // WINDOW][batch_of(number, size)] for number in groups]


def drawn(count: int, size: int, key: Key) -> tuple[list[list[int]], list[int]]:
    """What the key draws of one pass, before any length is known.

    Args:
        count: of the examples.
        size: examples per batch.
        key: draws both.

    Returns:
        The windows, each of at most ``WINDOW * size`` examples and still to be sorted by length; and the numbers of the
        batches, in the order of the pass.
    """
    order, span = key.fold("examples").permutation(count), WINDOW * size
    windows = [order[start : start + span] for start in range(0, count, span)]
    return windows, key.fold("batches").permutation(-(-count // size))


def batch_of(number: int, size: int) -> slice:
    """Where a batch lies in its window, the window with the number ``number // WINDOW``.

    Args:
        number: of the batch, as ``drawn`` numbers them.
        size: examples per batch.
    """
    start = number % WINDOW * size
    return slice(start, start + size)
