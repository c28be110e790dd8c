"""What is measured of a model on the held-out sets: the objective's figures, and answers where a recipe asks for any.

Sums add up over batches, so the figures of a set do not depend on how it is cut into batches. What clients hold out is
scored at the clients: see ``per_client.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from fedferret.core.task import added_scores
from fedferret.data.encoded import EncodedData
from fedferret.evaluation.answers import Answers
from fedferret.objectives.interface import ModelObjective

Results = dict[str, dict[str, float]]  # held-out set: figure: value


@dataclass(frozen=True)
class Scores:
    """The scores of one model.

    Attributes:
        results: the figures by held-out set, the main set first.
        per_client: the figures by client, each on what the client holds out.
        moved: bytes, both ways, by client that scored.
        failures: why a client that was asked has no figures, in one line.
    """

    results: Results
    per_client: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    moved: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluator:
    """Scores models on the global held-out sets."""

    examples: EncodedData
    objective: ModelObjective
    batch_size: int = 8
    answers: Answers | None = None

    def num_progress_calls(self, extra: bool) -> int:
        """How often ``score`` calls its ``on_progress``.

        Args:
            extra: as in ``score``.
        """
        counts = [len(examples) for examples in self.examples.data.held_out.values()]
        batches = sum(math.ceil(count / self.batch_size) for count in counts)
        return batches + (self.answers.num_progress_calls() if extra and self.answers else 0)

    def score(self, model: nn.Module, extra: bool, on_progress: Callable[[], None] = lambda: None) -> Results:
        """Score a model on every held-out set.

        Args:
            model: of the objective's kind.
            extra: score answers too, where the recipe asks for any.
            on_progress: is called after each batch.

        Returns:
            The figures by held-out set.
        """
        results: Results = {}
        for name in self.examples.data.held_out:
            results[name] = self.figures(model, name, on_progress)
            if extra and self.answers:
                results[name] |= self.answers.score(model, name, on_progress)
        return results

    def figures(self, model: nn.Module, name: str, on_progress: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The objective's figures of a model on one held-out set.

        Args:
            model: of the objective's kind.
            name: of the set.
            on_progress: is called after each batch.
        """
        rows = self.examples.held_out(name)
        return self.objective.figures(added_scores(self.objective, model, rows, self.batch_size, on_progress))
