"""Curricula over examples: an order, and a prefix of it that grows from round to round.

share of the examples in round t of T:    min(1, start + (1 - start) t / (end T))
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from torch import Tensor

from fedferret.core.keys import Key
from fedferret.core.task import Examples

Order: TypeAlias = Literal["easy-first", "random", "hard-first"]


def part_of(count: int, share: float) -> int:
    """A share of some things, rounded up.

    Args:
        count: of all.
        share: above 0, at most 1.

    Returns:
        A number from 1 to ``count``; 0.1 of 30 is 3, whatever the product is in floating point.
    """
    return max(1, math.ceil(round(share * count, 9)))


def share_at(round: int, rounds: int, start: float, end: float) -> float:
    """The share of the examples that a round uses.

    Args:
        round: t, from 1.
        rounds: T.
        start: share before the first round, above 0, at most 1.
        end: share of the rounds after which all examples are used, above 0, at most 1.

    Returns:
        A share above 0, never less than in an earlier round, and 1 in the last.
    """
    return min(1.0, start + (1 - start) * round / (end * rounds))


def ordered(difficulties: Tensor, order: Order, key: Key) -> Tensor:
    """Put examples into a curriculum's order.

    Args:
        difficulties: of each example, shape (N,); equal ones stay in their order.
        order: which come first.
        key: draws the random order.

    Returns:
        Numbers of the examples, int32, shape (N,).
    """
    if order == "random":
        return key.order(len(difficulties)).int()
    return difficulties.argsort(stable=True, descending=order == "hard-first").int()


def prefix(data: Examples, order: Tensor, share: float) -> Examples:
    """The first examples of an order, as a set in the data's own order.

    Args:
        data: N examples.
        order: of the N examples.
        share: of the examples, rounded up.

    Returns:
        ``data`` itself where the prefix is all of it.
    """
    count = part_of(len(data), share)
    if count >= len(data):
        return data
    return data.take(sorted(order[:count].tolist()))
