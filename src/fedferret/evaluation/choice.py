"""Multiple choice by likelihood: which of several choices has the highest likelihood after the question?

Examples with ``choices`` in their metadata are scored: a sequence of texts, the response among them. The log-likelihood
of a choice is that of its tokens after the prompt, the end token left out. The two figures are those of
lm-evaluation-harness:

    choice             share of examples where the right choice has the highest log-likelihood ("acc")
    choice-by-length   the same with log-likelihoods divided by the choice's number of characters ("acc_norm")

The first of equal choices is taken, as there. All choices of an example have the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedferret.core.errors import UserError
from fedferret.data.batches import TokenisedData
from fedferret.data.examples import Example, Turn
from fedferret.data.templates import Template, Tokens
from fedferret.objectives.next_token import NextToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def choices_of(example: Example) -> tuple[str, ...]:
    """The choices in an example's metadata.

    Args:
        example: of a held-out set.

    Returns:
        The choices as text, in the example's order; empty if there are none.

    Raises:
        UserError: if the response is not one of the choices.
    """
    choices = tuple(map(str, example.metadata.get("choices", ())))
    if choices and example.response not in choices:
        raise UserError(f'"{example.response[:40]}" is not among its choices: the response must be one of them')
    return choices


def choice_scores(
    model: nn.Module,
    objective: NextToken,
    examples: Sequence[Example],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    stops: Collection[int],
    batch_size: int = 8,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The two figures over the examples that have choices.

    Args:
        model: a causal language model of transformers, or one that peft wraps.
        objective: gives the summed loss of a response, in nats.
        examples: of a held-out set; those without choices are left out.
        template: makes the prompts.
        tokenizer: the model's.
        max_tokens: the longest prompt with a choice, in tokens.
        stops: the tokens that end a response; they are left out at the end of a choice.
        batch_size: choices scored at a time.
        on_progress: is called after each batch.
    Returns:
        "choice" and "choice-by-length", from 0 to 1; empty if no example has choices.
    """
    asked = [example for example in examples if choices_of(example)]
    rows = [row for example in asked for row in _rows(example, template, tokenizer, max_tokens, stops)]
    if not asked:
        return {}
    losses = iter(_losses(model, objective, TokenisedData(rows), batch_size, on_progress))
    right, right_by_length = 0, 0
    for example in asked:
        choices = choices_of(example)
        sums = [next(losses) for _ in choices]
        by_length = [total / max(1, len(choice)) for total, choice in zip(sums, choices, strict=True)]
        own = choices.index(example.response)
        right += _alone_lowest(sums, own)
        right_by_length += _alone_lowest(by_length, own)
    return {"choice": right / len(asked), "choice-by-length": right_by_length / len(asked)}


def _alone_lowest(losses: Sequence[float], own: int) -> bool:
    """Whether one loss is below all others: choices that are equal once they are cut are not told apart."""
    return all(losses[own] < loss for number, loss in enumerate(losses) if number != own)


@torch.no_grad()
def _losses(
    model: nn.Module,
    objective: NextToken,
    rows: TokenisedData,
    batch_size: int,
    on_progress: Callable[[], None],
) -> list[float]:
    """The summed loss of each row, in the order of ``rows``."""
    model.eval()
    losses, order = [0.0] * len(rows), iter(rows.longest_first)
    for batch in rows.batches(batch_size, None):
        for loss in objective.by_example(model, batch)[0].tolist():
            losses[next(order)] = loss
        on_progress()
    return losses


def _rows(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    stops: Collection[int],
) -> list[Tokens]:
    """The prompt followed by each of the choices."""
    answers = []
    for choice in choices_of(example):
        chosen = replace(example, turns=(*example.turns[:-1], Turn("assistant", choice)))
        encoded = template.encode(chosen, tokenizer, max_tokens)
        answer = encoded.ids[encoded.response_start :]
        while len(answer) > 1 and answer[-1] in stops:
            answer = answer[:-1]
        answers.append(answer)
    prompt = template.prompt(example, tokenizer, max_tokens - max(map(len, answers)))
    return [Tokens(prompt + answer, len(prompt), False) for answer in answers]
