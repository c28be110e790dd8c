"""How a server's learning rate changes over a run."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Schedule: TypeAlias = Literal["constant", "linear", "cosine"]


def scheduled(schedule: Schedule, learning_rate: float, round: int, rounds: int) -> float:
    """The server's learning rate in a round: the full rate first, then constant or falling towards 0 after the last.

    Args:
        schedule: "constant", "linear" or "cosine".
        learning_rate: in round 1.
        round: from 1 to ``rounds``.
        rounds: planned in all.

    Returns:
        The rate, above 0.

    >>> [scheduled("linear", 1.0, round, 4) for round in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    progress = (round - 1) / rounds
    if schedule == "linear":
        return learning_rate * (1 - progress)
    if schedule == "cosine":
        return learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return float(learning_rate)
