"""What ``fedferret advise`` prints: the forecast as text, or as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedferret.advice import Advice, Probe, extrapolated, most, share, used
from fedferret.advice_checks import check
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
    rounds, method, coordinates = recipe.rounds, check(recipe), used(found, recipe)
    where = "given" if gain else f"extrapolated from {len(found.losses) - 1} rounds"
    size, stays = as_count(found.weights), f"{found.persistence:.0%} stays a round on"
    group, highest = method.group_size, most(found, recipe)
    forecast = share(found, recipe, coordinates, gain)
    part = f"{forecast:.1%}" if forecast > 0 else "none"
    head = [
        f"FedAvg's loss reduction over {rounds} rounds: {total:.4g} ({where})",
        f"an update: norm {found.norm:.3g}, spread over {as_count(found.participation)} of {size} weights",
        f"a round's noise with {coordinates:,} coordinates: norm {found.noise:.3g}; {stays}",
        f"this recipe's {coordinates:,} coordinates: {part} of FedAvg forecast",
    ]
    if method.coordinates > highest:
        head.append(
            f"coordinates={method.coordinates:,} counts as {highest:,}: {size} weights have no more groups of {group}"
        )
    each = "a message" if method.norms_every == 1 else "a message, the mean over rounds"
    beyond = f"not with this method; the model has {found.weights:,} weights"
    if group > 1:
        beyond = f"not with group_size={group}, which has {highest:,} coordinates at most; set a smaller one"
    rows = [
        f"{line.share:.0%} of FedAvg: coordinates={line.coordinates:,}, {as_bytes(line.bytes_up)} {each}"
        if line.enough
        else f"{line.share:.0%} of FedAvg: {beyond}"
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
    coordinates = used(found, recipe)
    return {
        "rounds": recipe.rounds,
        "loss_reduction": gain or extrapolated(found.losses, recipe.rounds),
        "loss_reduction_given": gain is not None,
        "probe": {name: value for name, value in asdict(found).items() if name != "shapes"},
        "coordinates": coordinates,
        "most_coordinates": most(found, recipe),
        "share": max(0.0, share(found, recipe, coordinates, gain)),
        "advice": [asdict(line) for line in lines],
    }
