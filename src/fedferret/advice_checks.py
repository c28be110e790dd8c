"""What `fedferret advise` refuses: recipes that the formula is not for, and probes that no advice follows from."""

from __future__ import annotations

import math

from fedferret.algorithms.ferret import Ferret
from fedferret.config import Recipe
from fedferret.core.errors import UserError
from fedferret.core.rounds import RoundRecord, reasons

ROUNDING = 2.0**-20  # of a loss: eight units in the last place of fp32, below which no difference is measured


def check(recipe: Recipe) -> Ferret:
    """Refuse a recipe that the formula is not for.

    Args:
        recipe: resolved.

    Returns:
        The recipe's method.

    Raises:
        UserError: for another method, or settings that the formula or the probe's mean leaves out.
    """
    method = recipe.algorithm
    if not isinstance(method, Ferret) or method.name != "ferret":
        raise UserError(f'algorithm.name="{method.name}": advise knows the noise of "ferret" alone; give such a recipe')
    if method.server_momentum or method.error_feedback:
        given = f"server_momentum={method.server_momentum}, error_feedback={str(method.error_feedback).lower()}"
        raise UserError(f"{given}: the formula is for neither; set server_momentum=0 and error_feedback=false")
    if recipe.model.dtype != "fp32":
        raise UserError(f'model.dtype="{recipe.model.dtype}": advise measures noise in fp32; set model.dtype="fp32"')
    if recipe.pool.name != "mean":
        raise UserError(f'pool.name="{recipe.pool.name}": advise compares with FedAvg\'s mean; set pool.name="mean"')
    if recipe.clients.bounds() and method.weighting == "examples":
        given = 'clients.bound_weights=true, algorithm.weighting="examples"'
        raise UserError(f"{given}: advise weights by examples without bounds; set bound_weights=false")
    return method


def check_rounds(recipe: Recipe, probed: int) -> None:
    """Refuse to probe more rounds than there are.

    Args:
        recipe: resolved.
        probed: rounds.

    Raises:
        UserError: for more rounds than the recipe's.
    """
    if probed > recipe.rounds:
        raise UserError(
            f"--rounds {probed}: the recipe has rounds={recipe.rounds}, and no more can be probed; "
            f"give --rounds {recipe.rounds}, or a recipe with more rounds"
        )


def check_gain(gain: float | None, before: float) -> None:
    """Refuse a loss reduction that no model has.

    Args:
        gain: as given, nats per token; None: it is extrapolated.
        before: the held-out loss before round 1.

    Raises:
        UserError: the loss would fall below 0, or by less than can be measured.
    """
    if gain is None or not math.isfinite(before):
        return
    if gain > before:
        raise UserError(
            f"--reduction {gain:g}: the held-out loss before round 1 is {before:.4f}, and no loss falls below 0; "
            f"give at most that, or leave --reduction out"
        )
    if gain <= ROUNDING * before:
        raise UserError(
            f"--reduction {gain:g}: below {ROUNDING * before:.1g}, what rounding leaves of a loss of {before:.4f}, "
            f"nothing is measured; give more, or leave --reduction out"
        )


def check_complete(record: RoundRecord) -> None:
    """Refuse a probe that an update is missing from: its mean would differ from FedAvg's by more than noise.

    Args:
        record: of a probed round.

    Raises:
        UserError: an update was refused, or a client failed.
    """
    if not record.failures:
        return
    why = reasons(record.failures, shown=1)
    hint = 'raise pool.norm_ratio, or set pool.norm_limit="off"' if "pool.norm_" in why else "mend what failed"
    raise UserError(
        f"round {record.round}: {len(record.failures)} of {len(record.cohort)} updates were left out ({why}); "
        f"advise compares means of all; {hint}"
    )
