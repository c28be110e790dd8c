"""Figures over clients, each scored on what it holds out itself, each counting once.

They are taken of the objective's primary figure: the loss of a language model, the accuracy of a classifier.

    client-mean     their mean; the figure of the set counts targets instead, so clients with many dominate it
    worst-tenth     the mean of the worst tenth, rounded up to whole clients (Li et al., "Fair Resource Allocation in
                    Federated Learning", ICLR 2020, report the same of accuracies)
    deviation       their standard deviation          range     the highest less the lowest
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping


def spread(by_client: Mapping[str, float], higher_is_better: bool = False) -> dict[str, float]:
    """The figures of the module's docstring.

    Args:
        by_client: each client's primary figure.
        higher_is_better: of the figure.

    Returns:
        The figures by name, NaN where a client's is not finite; empty without clients.
    """
    if not by_client:
        return {}
    if not all(map(math.isfinite, by_client.values())):
        return dict.fromkeys(("client-mean", "worst-tenth", "deviation", "range"), math.nan)
    worst_first = sorted(by_client.values(), reverse=not higher_is_better)
    return {
        "client-mean": statistics.fmean(worst_first),
        "worst-tenth": statistics.fmean(worst_first[: math.ceil(len(worst_first) / 10)]),
        "deviation": statistics.pstdev(worst_first),
        "range": abs(worst_first[0] - worst_first[-1]),
    }
