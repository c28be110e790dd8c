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
    order = key.fold("examples").permutation(len(lengths))
    span = WINDOW * size
    for start in range(0, len(order), span):
        order[start : start + span] = sorted(order[start : start + span], key=lambda row: lengths[row])
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [groups[index] for index in key.fold("batches").permutation(len(groups))]
