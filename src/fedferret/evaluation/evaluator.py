"""Everything that a recipe's ``[evaluation]`` table measures of one model, by held-out set.

always          loss and perplexity on every example
per client      on the main set, the loss of each owner of examples, and the fairness figures over owners
on request      scores of generated answers to some examples, drawn once for the run; choices by likelihood
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from fedferret.core.keys import Key
from fedferret.data.batches import FederatedTokens
from fedferret.data.examples import Example, at_most
from fedferret.data.templates import Template
from fedferret.evaluation.choice import choice_scores, choices_of
from fedferret.evaluation.generation import generate, prompt_room, stop_tokens
from fedferret.evaluation.loss import example_losses
from fedferret.evaluation.personal import fairness, losses_by_owner
from fedferret.evaluation.scorers import SCORERS, applies
from fedferret.objectives.next_token import NextToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Results = dict[str, dict[str, float]]  # held-out set: figure: value


@dataclass(frozen=True)
class Scores:
    """The scores of one model."""

    results: Results
    per_client: Mapping[str, float] = field(default_factory=dict)  # each owner's loss on the main set; nats per token
    moved: Mapping[str, int] = field(default_factory=dict)  # bytes, both ways, by client that scored its own model


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Scores models on the held-out sets of ``tokens.data``; the settings are those of a recipe."""

    tokens: FederatedTokens
    template: Template
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    objective: NextToken
    key: Key  # draws the examples to generate answers to
    metrics: Sequence[str] = ()
    batch_size: int = 8
    generate_examples: int = 100
    max_new_tokens: int = 128
    per_client: bool = False

    def num_progress_calls(self, extra: bool) -> int:
        """How often ``score`` calls its ``on_progress``.

        Args:
            extra: as in ``score``.

        Returns:
            Batches of all passes over all held-out sets.
        """
        counts = [len(examples) for examples in self.tokens.data.held_out.values()]
        if extra and self._scorers:
            counts += map(len, self._asked.values())
        if extra and "choice" in self.metrics:
            held_out = self.tokens.data.held_out.values()
            counts += [sum(len(choices_of(example)) for example in examples) for examples in held_out]
        return sum(math.ceil(count / self.batch_size) for count in counts)

    def score(self, model: nn.Module, extra: bool, on_progress: Callable[[], None] = lambda: None) -> Scores:
        """Score a model on every held-out set.

        Args:
            model: a causal language model of transformers, or one that peft wraps.
            extra: measure all metrics, not the loss, perplexity and fairness alone.
            on_progress: is called after each batch.

        Returns:
            Metrics by held-out set, losses in nats per token, and the losses of the main set's owners.
        """
        results: Results = {}
        per_client: dict[str, float] = {}
        for name, examples in self.tokens.data.held_out.items():
            losses = example_losses(model, self.objective, self.tokens.held_out(name), self.batch_size, on_progress)
            results[name] = asdict(losses.score)
            if self.per_client and len(results) == 1:
                per_client = losses_by_owner(examples, losses)
                results[name] |= fairness(per_client)
            if extra:
                results[name] |= self._answers(model, name, on_progress) | self._choices(model, examples, on_progress)
        return Scores(results, per_client)

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
            for name, examples in self.tokens.data.held_out.items()
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
        examples = (example for held_out in self.tokens.data.held_out.values() for example in held_out)
        shortest = min(examples, key=lambda example: len(example.response))
        return stop_tokens(model, self.template, self.tokenizer, shortest, self.max_tokens)
