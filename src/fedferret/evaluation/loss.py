"""Mean loss and perplexity over the response tokens of a held-out set, in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fedferret.objectives.next_token import NextToken


class HeldOut(Protocol):
    """A set of examples to score."""

    def __len__(self) -> int: ...

    def batches(self, size: int, key: None) -> Iterator[Any]:
        """Batches of examples, the longest examples first.

        Args:
            size: examples per batch.
            key: None; evaluation does not shuffle.

        Returns:
            An iterator over batches in which every example occurs once.
        """
        ...

    @property
    def longest_first(self) -> list[int]:
        """The examples' indices in the order of ``batches``."""
        ...


@dataclass(frozen=True)
class Score:
    """The score on one held-out set."""

    loss: float  # mean over response tokens, in nats per token
    perplexity: float  # the exponential of the loss
    tokens: int  # response tokens


@dataclass(frozen=True)
class Losses:
    """Each example's loss, in the order of the set."""

    sums: Sequence[float]  # over the example's response tokens, in nats
    tokens: Sequence[int]  # the example's response tokens

    @property
    def score(self) -> Score:
        """The score over all examples; every response token counts the same."""
        tokens = sum(self.tokens)
        mean = math.fsum(self.sums) / max(1, tokens)
        return Score(mean, math.exp(min(mean, 700.0)), tokens)


@torch.no_grad()
def example_losses(
    model: nn.Module,
    objective: NextToken,
    examples: HeldOut,
    batch_size: int = 8,
    on_progress: Callable[[], None] = lambda: None,
) -> Losses:
    """Every example's loss.

    Args:
        model: a causal language model of transformers, or one that peft wraps.
        objective: gives the summed loss of a response.
        examples: the held-out set.
        batch_size: examples at a time.
        on_progress: is called after each batch.

    Returns:
        Losses in nats, summed over each response, and the responses' tokens; in the order of the set.
    """
    model.eval()
    sums, tokens = [0.0] * len(examples), [0] * len(examples)
    order = iter(examples.longest_first)
    for batch in examples.batches(batch_size, None):
        for row_sum, row_tokens in zip(*objective.by_row(model, batch), strict=True):
            example = next(order)
            sums[example], tokens[example] = row_sum, row_tokens
        on_progress()
    return Losses(sums, tokens)


def evaluate(
    model: nn.Module,
    objective: NextToken,
    examples: HeldOut,
    batch_size: int = 8,
    on_progress: Callable[[], None] = lambda: None,
) -> Score:
    """The score of a model; every response token counts the same.

    Args:
        model: a causal language model of transformers, or one that peft wraps.
        objective: gives the summed loss of a response.
        examples: the held-out set.
        batch_size: examples at a time.
        on_progress: is called after each batch.

    Returns:
        Mean loss in nats per token, perplexity and number of tokens.
    """
    return example_losses(model, objective, examples, batch_size, on_progress).score
