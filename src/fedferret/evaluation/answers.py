"""What a recipe's ``[evaluation] metrics`` measure of a language model's answers, by held-out set.

Scores of generated answers to some examples, drawn once for the run, and choices by likelihood.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from fedferret.core.keys import Key
from fedferret.data.examples import Example, at_most
from fedferret.data.templates import Template
from fedferret.evaluation.choice import choice_scores, choices_of
from fedferret.evaluation.generation import generate, prompt_room, stop_tokens
from fedferret.evaluation.scorers import SCORERS, applies
from fedferret.objectives.next_token import NextToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Scores answers to the held-out sets; the settings are those of a recipe."""

    held_out: Mapping[str, Sequence[Example]]
    template: Template
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    objective: NextToken
    key: Key  # draws the examples to generate answers to
    metrics: Sequence[str]
    batch_size: int = 8
    generate_examples: int = 100
    max_new_tokens: int = 128

    def num_progress_calls(self) -> int:
        """How often ``score`` over all held-out sets calls its ``on_progress``."""
        counts = list(map(len, self._asked.values())) if self._scorers else []
        if "choice" in self.metrics:
            counts += [sum(len(choices_of(example)) for example in examples) for examples in self.held_out.values()]
        return sum(math.ceil(count / self.batch_size) for count in counts)

    def score(self, model: nn.Module, name: str, on_progress: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Score a model's answers to one held-out set.

        Args:
            model: a causal language model of transformers, or one that peft wraps.
            name: of the held-out set.
            on_progress: is called after each batch.

        Returns:
            A mean score by metric, from 0 to 1; without the metrics that apply to none of the set's examples.
        """
        return self._answers(model, name, on_progress) | self._choices(model, self.held_out[name], on_progress)

    @cached_property
    def _scorers(self) -> list[str]:
        return [metric for metric in self.metrics if metric in SCORERS]

    @cached_property
    def _asked(self) -> dict[str, tuple[Example, ...]]:
        """The examples to generate answers to, by held-out set."""
        return {
            name: at_most(
                [example for example in examples if any(applies(metric, example) for metric in self._scorers)],
                self.generate_examples,
                self.key.fold(name),
            )
            for name, examples in self.held_out.items()
        }

    def _answers(self, model: nn.Module, name: str, on_progress: Callable[[], None]) -> dict[str, float]:
        """The mean scores of generated answers in one held-out set, by metric."""
        examples = self._asked[name] if self._scorers else ()
        if not examples:
            return {}
        room = prompt_room(model, self.max_tokens, self.max_new_tokens)
        prompts = [self.template.prompt(example, self.tokenizer, room) for example in examples]
        written = generate(model, prompts, self._stops(model), self.max_new_tokens, self.batch_size, on_progress)
        answers = [str(self.tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in written]
        figures = {}
        for metric in self._scorers:
            scores = [
                SCORERS[metric](example, answer)
                for example, answer in zip(examples, answers, strict=True)
                if applies(metric, example)
            ]
            if scores:
                figures[metric] = statistics.fmean(scores)
        return figures

    def _choices(
        self, model: nn.Module, examples: Sequence[Example], on_progress: Callable[[], None]
    ) -> dict[str, float]:
        if "choice" not in self.metrics:
            return {}
        parts = (self.template, self.tokenizer, self.max_tokens, self._stops(model), self.batch_size, on_progress)
        return choice_scores(model, self.objective, examples, *parts)

    def _stops(self, model: nn.Module) -> frozenset[int]:
        examples = (example for held_out in self.held_out.values() for example in held_out)
        shortest = min(examples, key=lambda example: len(example.response))
        return stop_tokens(model, self.template, self.tokenizer, shortest, self.max_tokens)
