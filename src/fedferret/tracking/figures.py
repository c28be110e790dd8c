"""Which figures of a held-out set are shown where."""

from __future__ import annotations

from collections.abc import Mapping


def extra_metrics(scores: Mapping[str, float]) -> dict[str, float]:
    """A held-out set's figures without its loss, what follows from it, and the number of targets."""
    hidden = ("loss", "perplexity", "tokens", "examples")
    return {name: value for name, value in scores.items() if name not in hidden}


def headline(scores: Mapping[str, float]) -> dict[str, float]:
    """The extra figures that progress and the report's head show: over clients, only their mean and worst tenth."""
    hidden = ("macro-f1", "calibration-error", "deviation", "range")
    return {name: value for name, value in extra_metrics(scores).items() if name not in hidden}


def compared(scores: Mapping[str, float]) -> dict[str, float]:
    """The extra figures that are columns of a comparison: over clients, their mean, worst tenth and deviation."""
    return {name: value for name, value in extra_metrics(scores).items() if name != "range"}
