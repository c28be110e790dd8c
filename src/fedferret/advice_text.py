"""What ``fedferret advise`` prints: the forecast as text, or as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedferret.advice import Advice, Probe, check, extrapolated, share
from fedferret.config import Recipe
from fedferret.tracking.units import as_bytes, as_count


def text_of(found: Probe, recipe: Recipe, lines: list[Advice], gain: float | None) -> str:
    """The advice for a terminal.

    Args:
        found: by the probe.
        recipe: probed.
        lines: by ``advise``.
        gain: G(R) as given; None: extrapolated.

    Returns:
        Lines.
    """
    total = gain or extrapolated(found.losses, recipe.rounds)
    rounds, coordinates = recipe.rounds, check(recipe).coordinates
    where = "given" if gain else f"extrapolated from {len(found.losses) - 1} rounds"
    size, stays = as_count(found.weights), f"{found.persistence:.0%} stays a round on"
    head = [
        f"FedAvg's loss reduction over {rounds} rounds: {total:.3f} ({where})",
        f"an update: norm {found.norm:.3g}, spread over {as_count(found.participation)} of {size} weights",
        f"a round's noise with {coordinates:,} coordinates: norm {found.noise:.3g}; {stays}",
        f"this recipe's {coordinates:,} coordinates: {share(found, recipe, coordinates, gain):.1%} of FedAvg forecast",
    ]
    rows = [
        f"{line.share:.0%} of FedAvg: coordinates={line.coordinates:,}, {as_bytes(line.bytes_up)} a message"
        if line.enough
        else f"{line.share:.0%} of FedAvg: not with this method; the model has {found.weights:,} weights"
        for line in lines
    ]
    return "\n".join([*head, *rows, "Forecasts are rough: docs/advise.md compares them with runs."])


def plain(found: Probe, recipe: Recipe, lines: list[Advice], gain: float | None) -> dict[str, Any]:
    """The advice as JSON values.

    Args:
        found: by the probe.
        recipe: probed.
        lines: by ``advise``.
        gain: G(R) as given; None: extrapolated.
    """
    coordinates = check(recipe).coordinates
    return {
        "rounds": recipe.rounds,
        "loss_reduction": gain or extrapolated(found.losses, recipe.rounds),
        "loss_reduction_given": gain is not None,
        "probe": {name: value for name, value in asdict(found).items() if name != "shapes"},
        "coordinates": coordinates,
        "share": share(found, recipe, coordinates, gain),
        "advice": [asdict(line) for line in lines],
    }
