"""FedLog's head: the most probable parameters η of an exponential family, given the means of its statistics.

    p(f, y | η) ∝ exp(<η_y, f> - ‖f‖²)       A(η) = log Σ_c exp(‖η_c‖² / 4)       t_c = χ_c / ν
    minimise      A(η) - Σ_c <η_c, t_c>       convex; at the least: t_c = π_c η_c / 2, π = softmax(‖η‖² / 4)

η_c is a multiple of t_c, so that C lengths are unknown, and given L = A(η) each of them alone: with a_c = ‖t_c‖ and
u_c = ‖η_c‖² / 2

    u_c + log u_c = log 2 + 2 log a_c + 2 L        log π_c = u_c / 2 - L        and L is where Σ_c π_c = 1

log Σ π_c is convex in L and falls, so Newton's steps from L = log C approach its root from one side: no step is too
long, whatever the scale of the statistics. C numbers a step, in float64; no matrix is solved.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedferret.core.keys import Key

_STEPS = 200  # of L; about ten are taken, and some more for statistics of 1e15
_INNER = 8  # of u_c; the error is squared each time
_CLOSE = 1e-13  # of L, relative where L is large: rounding is a hundredth of it


def most_probable_head(means_CF: Tensor) -> Tensor:
    """Solve for the head.

    Args:
        means_CF: t, χ / ν: by class, the sum of features (the constant among them) over the number of all examples.

    Returns:
        η, fp64, shape (C, F), on the CPU; 0 for a class without an example.
    """
    means_CF = means_CF.detach().cpu().double()
    lengths_C = means_CF.norm(dim=1)
    there_C, zero = lengths_C > 0, torch.zeros((), dtype=torch.float64)
    doubled_C = math.log(2) + 2 * lengths_C.clamp(min=1e-300).log()
    log_sum = math.log(len(means_CF))
    for _ in range(_STEPS):
        u_C = _solved(doubled_C + 2 * log_sum).where(there_C, zero)
        # where u is large, u / 2 - L is a difference of large numbers: 2 a / ‖η‖ is the same
        near_C, far_C = u_C / 2 - log_sum, (math.log(2) + doubled_C - (2 * u_C).log()) / 2
        log_share_C = torch.where(u_C > 1, far_C, near_C)
        total = torch.logsumexp(log_share_C, dim=0)
        step = float(total / ((log_share_C - total).exp() / (1 + u_C)).sum())
        log_sum += step
        if abs(step) <= _CLOSE * max(1.0, log_sum):
            break
    head_CF: Tensor = means_CF * ((2 * u_C).sqrt() / lengths_C.clamp(min=1e-300))[:, None]
    return head_CF


def random_head(classes: int, width: int, key: Key) -> Tensor:
    """Draw a head to begin with where no statistics are at hand: near normal, mean 0 and variance 1.

    Args:
        classes: C.
        width: F.
        key: of the run.

    Returns:
        η, fp32, shape (C, F): sums of twelve uniform values, the same bits on every machine.
    """
    total = torch.full((classes * width,), -6.0, dtype=torch.float64)
    for draw in range(12):
        total += key.fold("head", draw).uniform(classes * width)
    return total.float().view(classes, width)


def residual(means_CF: Tensor, head_CF: Tensor) -> float:
    """How far a head is from the most probable one.

    Args:
        means_CF: t.
        head_CF: η.

    Returns:
        max |t - π η / 2|, the gradient's largest coordinate.
    """
    head_CF = head_CF.double()
    share_C = (head_CF.square().sum(dim=1) / 4).softmax(dim=0)
    return float((means_CF.double() - share_C[:, None] * head_CF / 2).abs().max())


def _solved(k_C: Tensor) -> Tensor:
    """The u with u + log u = k, by Newton's method."""
    u_C = torch.where(k_C > 1, k_C - k_C.clamp(min=1).log(), k_C.clamp(max=1).exp())
    for _ in range(_INNER):
        u_C = u_C * (1 + k_C - u_C.log()) / (1 + u_C)
    return u_C
