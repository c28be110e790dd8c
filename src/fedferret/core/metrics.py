"""What a client may state beside its update: the only names that are read, and the bounds of each.

METRICS    of ``ClientUpdate.metrics``     loss (mean over steps), seconds (of training), density
                                         (the share of weights that a sparse model keeps)
sums       of ``ClientScores.sums``        count (of targets), and those that the objective declares
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

METRICS = ("loss", "seconds", "density")
LARGEST_LOSS = 1e9  # of one target, on either side of 0: a guess among a billion words costs 21 nats
LONGEST_WORK = 30 * 86400.0  # seconds: a month; a client may repeat what took longer than a round's deadline
LARGEST_COUNT = 2.0**53  # above it a float counts no more


def rounded_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Round what is for people's eyes to what few bytes carry.

    Args:
        metrics: as a method gives them.

    Returns:
        Seconds and shares with eight significant bits, which is within 0.4%, and losses as fp32.
    """
    kinds = {name: torch.float32 if name == "loss" else torch.bfloat16 for name in metrics}
    return {name: float(torch.tensor(value, dtype=kinds[name])) for name, value in metrics.items()}


def check_metrics(metrics: Any) -> None:
    """Refuse metrics that this version does not know, and values that cannot be.

    Args:
        metrics: as they came from a client, of any type.

    Raises:
        ValueError: with one line.
    """
    _check_names("metric", metrics, METRICS)
    if "loss" in metrics:
        _check_range("metric", "loss", metrics["loss"], -LARGEST_LOSS, LARGEST_LOSS)
    if "seconds" in metrics:
        _check_range("metric", "seconds", metrics["seconds"], 0.0, LONGEST_WORK)
    if "density" in metrics:
        _check_range("metric", "density", metrics["density"], 0.0, 1.0)


def check_sums(sums: Any, declared: Mapping[str, float]) -> None:
    """Refuse sums that the objective does not declare, that are missing, or that contradict each other.

    Args:
        sums: as they came from a client, of any type.
        declared: the objective's: by name, the most that one target adds to a sum, on either side of 0.

    Raises:
        ValueError: with one line.
    """
    _check_names("sum", sums, ("count", *declared))
    missing = [name for name in ("count", *declared) if name not in sums]
    if missing:
        raise ValueError(f"the sum {missing[0]!r} is missing")
    _check_range("sum", "count", sums["count"], 1.0, LARGEST_COUNT)
    if sums["count"] != math.floor(sums["count"]):
        raise ValueError(f"the sum 'count' is {sums['count']:g}: must be whole")
    for name, most in declared.items():
        _check_range("sum", name, sums[name], -most * sums["count"], most * sums["count"])


def _check_names(kind: str, values: Any, known: tuple[str, ...]) -> None:
    if not isinstance(values, dict) or not all(type(value) is float for value in values.values()):
        raise ValueError(f"{kind}s came that are no numbers")
    for name in values:
        if name not in known:
            raise ValueError(f"an unknown {kind} came, {name!r:.40}: known are {', '.join(known[:8])}")


def _check_range(kind: str, name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # NaN lies nowhere
        raise ValueError(f"the {kind} {name!r} is {value:g}: must lie between {least:g} and {most:g}")
