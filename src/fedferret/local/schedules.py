"""How a learning rate changes over the steps of a training or the rounds of a run, without a state.

    first W of N       (i + 1) / (W + 1)             i counts from 0; W = warm-up's share of N, rounded
    then, constant     1
          linear       1 - (i - W) / (N - W)         falling towards 0, which would follow the last
          cosine       (1 + cos π (i - W) / (N - W)) / 2

No step has the factor 0. Without warm-up the two are torch's LinearLR to 0 and CosineAnnealingLR.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from fedferret.core.errors import UserError

Schedule: TypeAlias = Literal["constant", "linear", "cosine"]


def check_warmup(warmup: float) -> None:
    """Refuse a warm-up that leaves nothing after it.

    Args:
        warmup: share of the steps or rounds.

    Raises:
        UserError: the share is below 0, or 1 and above.
    """
    if not 0 <= warmup < 1:
        raise UserError(f"warmup={warmup}: give a share of the schedule's steps or rounds, from 0 to below 1")


def factor(schedule: Schedule, warmup: float, number: int, count: int) -> float:
    """What the learning rate is multiplied by in one step or round.

    Args:
        schedule: after warm-up.
        warmup: share of ``count`` in which the factor rises, from 0 to below 1.
        number: of the step or round, from 0; one beyond ``count`` is as the last.
        count: steps or rounds planned in all.

    Returns:
        A factor above 0 and at most 1.

    >>> [factor("linear", 0.0, number, 4) for number in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    >>> [factor("constant", 0.5, number, 6) for number in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    rising = min(round(warmup * count), count - 1)
    number = min(number, count - 1)
    if number < rising:
        return (number + 1) / (rising + 1)
    progress = (number - rising) / (count - rising)
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


def scheduled(schedule: Schedule, learning_rate: float, round: int, rounds: int) -> float:
    """A learning rate in a round, without warm-up.

    Args:
        schedule: over the rounds.
        learning_rate: in round 1.
        round: from 1 to ``rounds``.
        rounds: planned in all.

    Returns:
        The rate, above 0.
    """
    return learning_rate * factor(schedule, 0.0, round - 1, rounds)
