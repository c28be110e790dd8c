"""Fairness: the loss of each owner of held-out examples, and how evenly these losses are distributed.

The owner of an example is what its metadata names: a ``client``, else a ``person``, a ``task`` or a ``category``. The
main held-out set of every source but plain rows has owners. In "conversations" of chitchat and "rows" of reasoning-gym
the owners are the clients.

Figures, over the owners' mean losses per response token, each owner counting once:

    client-mean     their mean; the loss of the set counts tokens instead, so owners with many tokens dominate it
    worst-tenth     the mean of the highest tenth, rounded up to whole owners (Li et al., "Fair Resource Allocation in
                    Federated Learning", ICLR 2020, report the same of accuracies)
    deviation       their standard deviation          range     the highest less the lowest
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from fedferret.data.examples import Example
from fedferret.evaluation.loss import Losses


def losses_by_owner(examples: Sequence[Example], losses: Losses) -> dict[str, float]:
    """Each owner's mean loss, owners sorted by name; examples without an owner are left out.

    Args:
        examples: of one held-out set.
        losses: of the same examples, in the same order.
    Returns:
        Nats per response token by owner.
    """
    owned: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        if example.owner is not None:
            owned.setdefault(example.owner, []).append(index)
    return {
        owner: math.fsum(losses.sums[index] for index in indices)
        / max(1, sum(losses.tokens[index] for index in indices))
        for owner, indices in sorted(owned.items())
    }


def fairness(by_owner: Mapping[str, float]) -> dict[str, float]:
    """The fairness figures of the module's docstring.

    Args:
        by_owner: each owner's loss, in nats per token.
    Returns:
        The figures by name; empty without owners.
    """
    if not by_owner:
        return {}
    highest_first = sorted(by_owner.values(), reverse=True)
    return {
        "client-mean": statistics.fmean(highest_first),
        "worst-tenth": statistics.fmean(highest_first[: math.ceil(len(highest_first) / 10)]),
        "deviation": statistics.pstdev(highest_first),
        "range": highest_first[0] - highest_first[-1],
    }
