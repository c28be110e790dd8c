"""The server sets weights: what a client's claim of examples is worth.

    equal      every client weighs 1; claims are ignored
    examples   a client weighs as many as it claims to hold

Where sites hold the data, a claim cannot be checked, so it is bounded (``Bounds``):

    1. n_j <- min(n_j, max_examples, max_over_median x the cohort's lower median)
    2. fewer than three clients: equal weights, for no median of two tells who exaggerates
    3. no share exceeds max(max_share, 1 / clients); the excess goes to the others, in proportion to their weights

In a simulation nobody exaggerates, and FedAvg stays FedAvg under skew: no bounds there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedferret.core.algorithm import Weighting

FEWEST = 3  # clients from which on claims count


@dataclass(frozen=True)
class Bounds:
    """Limits on the weight that a claim of examples gives.

    Attributes:
        max_examples: the most examples that count.
        max_over_median: the most examples that count, in units of the cohort's lower median.
        max_share: the largest share of all weight that one client has, unless the cohort is smaller than 1 / max_share.
    """

    max_examples: int = 10_000_000
    max_over_median: float = 10.0
    max_share: float = 0.5


def weights_of(claims: Sequence[int], weighting: Weighting, bounds: Bounds | None) -> tuple[float, ...]:
    """Every client's weight, in the order of the claims.

    Args:
        claims: examples that each client states, at least 1.
        weighting: of the method.
        bounds: None where claims are trusted.

    Returns:
        Positive weights; their scale has no meaning.
    """
    if weighting == "equal" or (bounds and len(claims) < FEWEST):
        return (1.0,) * len(claims)
    if bounds is None:
        return tuple(map(float, claims))
    median = sorted(claims)[(len(claims) - 1) // 2]
    most = min(bounds.max_examples, bounds.max_over_median * median)
    return _with_share_at_most([float(min(claim, most)) for claim in claims], max(bounds.max_share, 1 / len(claims)))


def bounded_clients(claims: Sequence[int], weighting: Weighting, bounds: Bounds | None) -> tuple[int, ...]:
    """The claims that counted for less than they said: "weight bounded" in the report.

    Args:
        claims: examples that each client states, at least 1.
        weighting: of the method.
        bounds: None where claims are trusted.

    Returns:
        Positions in ``claims``, from 0, ascending; none with equal weighting or without bounds.
    """
    if weighting == "equal" or bounds is None:
        return ()
    weights, total = weights_of(claims, weighting, bounds), sum(claims)
    given = sum(weights)
    return tuple(
        place
        for place, (claim, weight) in enumerate(zip(claims, weights, strict=True))
        if weight / given < claim / total * (1 - 1e-9)
    )


def _with_share_at_most(weights: list[float], share: float) -> tuple[float, ...]:
    """The weights with the excess over ``share`` of the total spread over the others, in proportion.

    Those at the limit stay there; lifting the others can bring further ones to it, so this repeats at most once a
    client.
    """
    total = math.fsum(weights)
    limit = share * total
    at_limit: set[int] = set()
    result = list(weights)
    while True:
        over = {place for place, weight in enumerate(result) if weight > limit * (1 + 1e-12)} - at_limit
        if not over:
            return tuple(result)
        at_limit |= over
        free = [place for place in range(len(weights)) if place not in at_limit]
        left = total - limit * len(at_limit)
        below = math.fsum(weights[place] for place in free)
        for place in at_limit:
            result[place] = limit
        for place in free:
            result[place] = weights[place] * left / below if below else limit
