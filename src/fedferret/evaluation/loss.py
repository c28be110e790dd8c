"""Mean loss and perplexity over the response tokens of a held-out set, in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fedferret.local.response_loss import ResponseLoss


class HeldOut(Protocol):
    """A set of examples to score."""

    def batches(self, size: int, key: None) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Score:
    """Of one held-out set: mean natural-log loss per response token, its exponential, and how many tokens."""

    loss: float
    perplexity: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: ResponseLoss,
    examples: HeldOut,
    batch_size: int = 8,
    tick: Callable[[], None] = lambda: None,
) -> Score:
    """Score ``model``; every response token counts the same. ``tick`` is called after each batch."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in examples.batches(batch_size, None):
        batch_loss, count = loss.total(model, batch)
        total, tokens = total + batch_loss.item(), tokens + count
        tick()
    mean = total / max(1, tokens)
    return Score(mean, math.exp(min(mean, 700.0)), tokens)
