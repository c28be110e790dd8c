"""Mean loss and perplexity over the response tokens of a held-out set, in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fedferret.local.response_loss import ResponseLoss


class HeldOut(Protocol):
    """A set of examples to score."""

    def __len__(self) -> int: ...

    def batches(self, size: int, key: None) -> Iterator[Any]: ...

    @property
    def longest_first(self) -> list[int]:
        """The examples' numbers in the order in which ``batches`` gives them."""
        ...


@dataclass(frozen=True)
class Score:
    """Of one held-out set: mean natural-log loss per response token, its exponential, and how many tokens."""

    loss: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class Losses:
    """Each example's summed loss and its response tokens, in the set's order."""

    sums: Sequence[float]
    tokens: Sequence[int]

    @property
    def score(self) -> Score:
        """Over all of them; every response token counts the same."""
        tokens = sum(self.tokens)
        mean = math.fsum(self.sums) / max(1, tokens)
        return Score(mean, math.exp(min(mean, 700.0)), tokens)


@torch.no_grad()
def example_losses(
    model: nn.Module,
    loss: ResponseLoss,
    examples: HeldOut,
    batch_size: int = 8,
    on_progress: Callable[[], None] = lambda: None,
) -> Losses:
    """Every example's loss. ``on_progress`` is called after each batch."""
    model.eval()
    sums, tokens = [0.0] * len(examples), [0] * len(examples)
    order = iter(examples.longest_first)
    for batch in examples.batches(batch_size, None):
        for row_sum, row_tokens in zip(*loss.by_row(model, batch), strict=True):
            example = next(order)
            sums[example], tokens[example] = row_sum, row_tokens
        on_progress()
    return Losses(sums, tokens)


def evaluate(
    model: nn.Module,
    loss: ResponseLoss,
    examples: HeldOut,
    batch_size: int = 8,
    on_progress: Callable[[], None] = lambda: None,
) -> Score:
    """Score ``model``; every response token counts the same. ``on_progress`` is called after each batch."""
    return example_losses(model, loss, examples, batch_size, on_progress).score
