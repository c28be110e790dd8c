"""The server's step of FedPepTAO, on top of the clients' mean: momentum, and a control variate for each client.

    Δ = Σ p_j Δ_j                                  p_j = n_j / Σ n_j; S clients replied
    c_j <- c_j - c + Δ_j / (Σ of client j's learning rates over its K_j steps)
    c   <- (N' c + S Σ K_j (c_j - old c_j) / Σ K_j) / N       N' clients were known before the round, N are now
    v   <- μ v + (1 - μ) g + c - Σ p_j c_j         g = Δ; in the published code g = (Δ of the round before) - Δ
    the step, along which all weights move once more:  η_t v,    η_t = η max(decay^t, floor)

The published code takes one step per client and averages the results. Each begins from the same mean and the same v, so
the mean of the steps is the step along the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedferret.algorithms.fedpeptao_messages import FedPepTAOServer, SteppedDelta
from fedferret.core import tree


@dataclass(frozen=True)
class Reply:
    """One client's reply, as the server's step reads it.

    Attributes:
        client: name; "" where it is not known, and then nothing is kept of the client.
        update: accepted.
        share: p_j; the shares of all replies add up to 1.
        length: the sum of the client's learning rates over its local steps, above 0.
    """

    client: str
    update: SteppedDelta
    share: float
    length: float


def directed(
    server: FedPepTAOServer,
    replies: Sequence[Reply],
    mean: Mapping[str, Tensor],
    momentum: float,
    formula: Literal["plain", "paper-code"],
) -> tuple[FedPepTAOServer, dict[str, Tensor] | None]:
    """Update the controls and the momentum.

    Args:
        server: the memory before the round; not changed.
        replies: of the round, at least one.
        mean: Δ, by name.
        momentum: μ.
        formula: what g is.

    Returns:
        The memory after the round, and v; no v where ``formula`` needs the round before and there is none.
    """
    control = server.control or tree.zeros_like(mean)
    velocity = server.momentum or tree.zeros_like(mean)
    growth, mean_control = tree.zeros_like(mean), tree.zeros_like(mean)
    controls, all_steps = dict(server.controls), sum(reply.update.steps for reply in replies)
    for reply in replies:
        old = server.controls.get(reply.client) or tree.zeros_like(mean)
        added = {name: delta / reply.length - control[name] for name, delta in reply.update.delta.items()}
        new = {name: value + added[name] for name, value in old.items()}
        for name in mean:
            growth[name].add_(added[name], alpha=reply.update.steps / all_steps)
            mean_control[name].add_(new[name], alpha=reply.share)
        if reply.client:
            controls[reply.client] = new
    before, unnamed = len(server.controls), sum(not reply.client for reply in replies)
    now = len(controls) + unnamed
    control = {
        name: torch.add(value * (before / now), growth[name], alpha=len(replies) / now)
        for name, value in control.items()
    }
    steps, known = server.steps, formula == "plain" or bool(server.previous)
    if known:
        steps += 1
        for_g = mean if formula == "plain" else {name: server.previous[name] - delta for name, delta in mean.items()}
        velocity = {
            name: momentum * value + (1 - momentum) * for_g[name] + control[name] - mean_control[name]
            for name, value in velocity.items()
        }
    after = FedPepTAOServer(controls, control, velocity, tree.clone(mean), steps)
    return after, velocity if known else None
