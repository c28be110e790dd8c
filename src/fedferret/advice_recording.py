"""The training of `fedferret advise`: a recipe's own, which also sums the exact updates that Ferret encodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder, Trained


@dataclass(frozen=True, kw_only=True)
class Recording(FirstOrder):
    """The recipe's training, which also sums the clients' exact updates of a round."""

    by_examples: bool
    sums: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # Σ n_j Δ_j
    shares: list[float] = field(default_factory=list, compare=False, repr=False)  # n_j
    facts: list[tuple[float, float, float]] = field(default_factory=list, compare=False, repr=False)

    def train(self, task: Task, data: Examples, key: Key, **options: Any) -> Trained:
        """As ``FirstOrder.train``; then the update is added up.

        Args:
            task: as there.
            data: likewise.
            key: likewise.
            options: likewise.
        """
        before = tree.clone(tree.parameters(task.model))
        trained = super().train(task, data, key, **options)
        weight, absolute, square = float(len(data)) if self.by_examples else 1.0, 0.0, 0.0
        for name, delta in tree.difference(before, trained.weights):
            absolute, square = absolute + float(delta.abs().sum()), square + float(delta.square().sum())
            if name in self.sums:
                self.sums[name].add_(delta, alpha=weight)
            else:
                self.sums[name] = delta.mul_(weight)
        self.shares.append(weight)
        self.facts.append((weight, absolute, math.sqrt(square)))
        return trained

    def step_(self, weights: Mapping[str, Tensor], rate: float) -> None:
        """Step along the mean update, as FedAvg does, and begin a new round.

        Args:
            weights: changed in place.
            rate: the server's, of this round.
        """
        for name, target in weights.items():
            target.add_(self.sums[name], alpha=-rate / sum(self.shares))
        self.reset()

    def reset(self) -> None:
        """Begin a new round."""
        self.sums.clear()
        self.shares.clear()
