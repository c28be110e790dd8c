"""Multiple choice by likelihood: which of several answers does the model find likeliest after the question?

An example takes part whose metadata holds ``choices``, a sequence of texts of which the response is one. A choice's
log-likelihood is that of its own tokens after the prompt, its end mark left out. The two figures are those of
lm-evaluation-harness:

    choice             share of examples whose right answer has the highest log-likelihood ("acc")
    choice-by-length   the same with log-likelihoods divided by the choice's number of characters ("acc_norm")

Of equal ones the first is taken, as there. All choices of an example see the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from fedferret.core.errors import UserError
from fedferret.data.batches import TokenisedData
from fedferret.data.examples import Example, Turn
from fedferret.data.templates import Template, Tokens
from fedferret.evaluation.loss import example_losses
from fedferret.local.response_loss import ResponseLoss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def choices_of(example: Example) -> tuple[str, ...]:
    """An example's choices; none where it has none. UserError where the right answer is not among them."""
    choices = tuple(map(str, example.metadata.get("choices", ())))
    if choices and example.response not in choices:
        raise UserError(f'"{example.response[:40]}" is not among its choices: the response has to be one of them')
    return choices


def choice_scores(
    model: nn.Module,
    loss: ResponseLoss,
    examples: Sequence[Example],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    stops: Collection[int],
    batch_size: int = 8,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The two figures over the examples that have choices; empty where none has."""
    asked = [example for example in examples if choices_of(example)]
    rows = [row for example in asked for row in _rows(example, template, tokenizer, max_tokens, stops)]
    if not asked:
        return {}
    losses = iter(example_losses(model, loss, TokenisedData(rows), batch_size, on_progress).sums)
    right, right_by_length = 0, 0
    for example in asked:
        choices = choices_of(example)
        sums = [next(losses) for _ in choices]
        by_length = [total / max(1, len(choice)) for total, choice in zip(sums, choices, strict=True)]
        right += choices[sums.index(min(sums))] == example.response
        right_by_length += choices[by_length.index(min(by_length))] == example.response
    return {"choice": right / len(asked), "choice-by-length": right_by_length / len(asked)}


def _rows(
    example: Example,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    stops: Collection[int],
) -> list[Tokens]:
    """The prompt with each of the choices behind it."""
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
