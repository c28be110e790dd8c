"""What SpaFL does to a client's weights and thresholds: the sparsity term while they train, and d after a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.local.steppers import Adjust
from fedferret.models.adapters import threshold_names

AlphaSchedule: TypeAlias = Literal["constant", "sigmoid"]
FEWEST = 0.01  # of a layer's rows: with so few, or fewer, its thresholds begin again at 0


HIGHEST = 100.0  # of a threshold, either side of 0: mean magnitudes of a row's weights are far below it


def check_pressure(alpha: float, rounds: int, threshold: float) -> None:
    """Refuse a pressure or a first threshold that cannot be. Raises UserError."""
    if not -HIGHEST <= threshold <= HIGHEST:
        raise UserError(f"initial_threshold={threshold}: allowed are -{HIGHEST:g} to {HIGHEST:g}; 0 masks none")
    if not 0 <= alpha < math.inf:
        raise UserError(f"alpha={alpha}: must not be negative; 0 leaves the loss alone")
    if rounds < 1:
        raise UserError(f"alpha_rounds={rounds}: give at least 1 round")


def alpha_of(alpha: float, schedule: AlphaSchedule, rounds: int, round: int) -> float:
    """α in a round.

    Args:
        alpha: the setting.
        schedule: "sigmoid": α / (1 + exp(5 - 10 t / n)), t from 0.
        rounds: n.
        round: t + 1.

    Returns:
        α, times the schedule's factor.
    """
    if schedule == "constant":
        return alpha
    return alpha / (1 + math.exp(5 - 10 * min((round - 1) / rounds, 4)))  # 1 to fp64 from there on


def sparsity(masks: Callable[[], Mapping[str, Tensor]], alpha: float) -> Adjust:
    """The gradient of α Σ exp(-τ), and the rule for layers of which next to nothing is left.

    Args:
        masks: gives every layer's mask of ones and zeros, by the name of the layer's thresholds.
        alpha: α, at least 0.

    Returns:
        An adjustment between backward and step. The thresholds of a layer with a mask of at most 1% ones become 0, and
        this step leaves them there.
    """

    @torch.no_grad()
    def adjust(parameters: Mapping[str, nn.Parameter]) -> None:
        for name, mask_R in masks().items():
            threshold = parameters[name]
            if float(mask_R.mean()) <= FEWEST:
                threshold.zero_()
                threshold.grad = None
            elif threshold.grad is not None:
                threshold.grad.sub_(threshold.neg().exp(), alpha=alpha)

    return adjust


@torch.no_grad()
def caught_up(
    weights: Mapping[str, Tensor], missed: Mapping[str, Tensor], fan_in: Literal["kernel", "whole"]
) -> dict[str, Tensor]:
    """Move weights by what the thresholds moved: w_ik <- w_ik - sign(Σ_k w_ik) d_i / c, round by round.

    Args:
        weights: a client's, by name; not changed.
        missed: d of each round in order, by threshold, shape (rounds, R).
        fan_in: "kernel": c of a convolution is k²; "whole": its inputs times k². A linear module's c is its inputs.

    Returns:
        Tensors by the names of ``weights``; those without a threshold are the given ones.
    """
    moved = dict(weights)
    for threshold, weight in threshold_names(list({**weights, **missed})):
        if weight in weights and threshold in missed:
            for change_R in missed[threshold]:
                moved[weight] = importance_step(moved[weight], change_R, fan_in)
    return moved


def importance_step(weight: Tensor, change_R: Tensor, fan_in: Literal["kernel", "whole"]) -> Tensor:
    """Move one module's rows by one round's d.

    Args:
        weight: shape (R, inputs) or (R, inputs, k, k), fp32.
        change_R: d, shape (R,).
        fan_in: as in ``caught_up``.

    Returns:
        A new tensor. Signs are of sums in fp64, so that they depend on no order of adding.
    """
    flat = weight.flatten(1)
    count = weight[0, 0].numel() if fan_in == "kernel" and weight.dim() == 4 else flat.shape[1]
    step_R = flat.double().sum(dim=1).sign() * change_R.to(weight.device).double() / count
    return (flat - step_R.float()[:, None]).view_as(weight)
