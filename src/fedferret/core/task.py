"""What is tuned and how it is scored; the same for every method.

A process has one working model, its replica. The replica's weights between calls mean nothing: a method writes the ones
it wants before it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.core.tree import Tree


class Examples(Protocol):
    """One client's data, as much as a method may know of it."""

    def __len__(self) -> int: ...

    def batches(self, size: int, key: Key | None) -> Iterator[Any]:
        """One pass over all examples.

        Args:
            size: examples of a batch, at most.
            key: draws the order; None gives the order of evaluation.

        Returns:
            An iterator over batches in the form that the objective reads; every example occurs once.
        """
        ...

    def take(self, rows: Sequence[int]) -> Examples:
        """Select examples, such as a curriculum's prefix.

        Args:
            rows: numbers of the examples, from 0; may repeat.

        Returns:
            The selected examples, in the order of ``rows``.
        """
        ...


class Objective(Protocol):
    """What training minimises and what evaluation counts."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss that training minimises.

        Args:
            model: the working model, with the weights to train.
            batch: from ``Examples.batches``.

        Returns:
            The mean over the batch's targets, shape (), with a gradient; for language models in nats per token.
        """
        ...

    def scores(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Evaluate one batch in sums that add up over any split of the data.

        Args:
            model: in evaluation mode.
            batch: from ``Examples.batches``.

        Returns:
            Sums over the batch by name: ``count``, the number of targets, and those of ``sums``.
        """
        ...

    @property
    def sums(self) -> Mapping[str, float]:
        """The sums that ``scores`` gives beside ``count``: by name, the most that one target adds, either side of 0."""
        ...

    def check_sums(self, sums: Mapping[str, float]) -> None:
        """Refuse sums of a client that contradict each other; each alone is within ``sums`` already.

        Args:
            sums: of ``scores``, as a client sent them.

        Raises:
            ValueError: with one line.
        """
        ...


def added_scores(
    objective: Objective,
    model: nn.Module,
    data: Examples,
    batch_size: int,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluate a model on all examples.

    Args:
        objective: counts what the model gets right.
        model: set to evaluation mode.
        data: what is scored.
        batch_size: examples at a time.
        on_progress: called after each batch.

    Returns:
        The objective's sums over all examples, by name; they add up over any split of the data.
    """
    model.eval()
    sums: dict[str, float] = {}
    with torch.no_grad():
        for batch in data.batches(batch_size, None):
            for name, value in objective.scores(model, batch).items():
                sums[name] = sums.get(name, 0.0) + value
            on_progress()
    return sums


@dataclass
class Replica:
    """The working model of a process.

    Attributes:
        model: the model, with the adapter of the present stage in it.
        stage: which stage of a staged method ``model`` is prepared for; see ``core/stages.py``.
        base: the weights that a staged method began from; None until a staged method begins.
    """

    model: nn.Module
    stage: int = 0
    base: Tree | None = None


@dataclass(frozen=True)
class Task:
    """A model, an objective, and a number of rounds.

    Attributes:
        replica: the process's working model.
        objective: the loss that training minimises, and the scores of evaluation.
        rounds: rounds planned in all; schedules are functions of round / rounds.
        store: puts public weights where they are kept: in memory, on a device or in a file.
        round: that follows the public state's version, from 1; in a stage the stage's own.
        rounding: of an entry, from which the roundings of bf16 weights in ``apply`` are drawn, tensor by tensor.
    """

    replica: Replica
    objective: Objective
    rounds: int
    store: Callable[[Mapping[str, Tensor]], Tree] = field(default=tree.clone)
    round: int = 1
    rounding: Key = field(default=Key(0))

    @classmethod
    def of(
        cls,
        model: nn.Module,
        objective: Objective,
        rounds: int,
        store: Callable[[Mapping[str, Tensor]], Tree] = tree.clone,
    ) -> Task:
        """The task of tuning ``model``.

        Args:
            model: prepared for the method; becomes the process's working model.
            objective: the loss of training and the scores of evaluation.
            rounds: planned in all.
            store: copies weights, by parameter name, to where public weights are kept.

        Returns:
            A task with a new replica, which is at stage 0.
        """
        return cls(Replica(model), objective, rounds, store)

    @property
    def model(self) -> nn.Module:
        """The working model."""
        return self.replica.model

    @property
    def device(self) -> torch.device:
        """Where the working model computes."""
        return next(self.model.parameters()).device
