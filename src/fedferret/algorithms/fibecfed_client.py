"""What one client of FibecFed measures on its examples: the order of its curriculum, and the neurons that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedferret.algorithms.fibecfed_messages import FibecFedClient, factors_of
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.curriculum import Order, ordered, prefix, share_at
from fedferret.local.first_order import TrainingRefused
from fedferret.local.fisher import fisher, neuron_masks


@dataclass(frozen=True, kw_only=True)
class FisherCurriculum:
    """Settings of what is measured by Fisher information, and the measurements."""

    order: Order = "easy-first"  # the paper's; the others are there for comparison
    curriculum_start: float = 0.2  # β: enough examples for some steps
    curriculum_end: float = 0.8  # α: the last fifth of the rounds has all examples
    kept_neurons: float = 0.5  # share of the rows of each factor that train; 1: all, and none is scored
    fisher_momentum: float = 0.9  # γ: common for running means
    refresh: int = 5  # R: one more pass over the examples in five rounds
    reorder: bool = (
        False  # the paper's order is chosen once; a drawn head knows nothing then, and the order says nothing
    )

    def check_shares(self) -> None:
        """Refuse impossible settings. Raises UserError."""
        for name in ("curriculum_start", "curriculum_end", "kept_neurons"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: must be a share above 0 and at most 1")
        if not 0 <= self.fisher_momentum < 1:
            raise UserError(f"fisher_momentum={self.fisher_momentum}: must be at least 0 and below 1")
        if self.refresh < 1:
            raise UserError(f"refresh={self.refresh}: must be at least 1")

    @property
    def measures(self) -> bool:
        """Whether clients have a curriculum or a mask."""
        return self.curriculum_start < 1 or self.kept_neurons < 1

    def first_measured(self, task: Task, data: Examples, key: Key) -> FibecFedClient:
        """Measure before a client's first round.

        Args:
            task: the model has the weights to measure.
            data: the client's examples.
            key: draws the random order.

        Returns:
            The client's state, without weights.

        Raises:
            TrainingRefused: the client has no examples.
        """
        if not len(data):
            raise TrainingRefused("the client holds no example")
        grows, masked = self.curriculum_start < 1, self.kept_neurons < 1
        difficulties, scores = torch.zeros(len(data)), {}
        if masked or (grows and self.order != "random"):
            found = fisher(task, data, factors_of(tree.parameters(task.model)))
            difficulties, scores = found.by_example, found.by_neuron if masked else {}
        order = ordered(difficulties if grows else difficulties[:0], self.order, key.fold("order"))
        return FibecFedClient({}, order, scores, neuron_masks(scores, self.kept_neurons))

    def refreshed(self, task: Task, client: FibecFedClient, data: Examples, share: float, key: Key) -> FibecFedClient:
        """Measure again, where R rounds have passed or a client holds another number of examples than before.

        Args:
            task: the model has the client's weights.
            client: the state to go on from.
            data: all of the client's examples.
            share: of the examples, in the round at hand.
            key: draws the random order.

        Returns:
            ``client`` itself, or a new state.
        """
        changed = len(client.order) not in (0, len(data))
        again = changed or (self.reorder and len(client.order) > 0)
        if not changed and (client.trained < self.refresh or not (client.fisher or again)):
            return client
        part = data if again else self.part(client, data, share)
        found = fisher(task, part, factors_of(tree.parameters(task.model)))
        order = ordered(found.by_example, self.order, key.fold("order")) if again else client.order
        scores: Any = found.by_neuron if client.fisher else {}
        return client.measured(scores, self.fisher_momentum, self.kept_neurons, order)

    def part(self, client: FibecFedClient, data: Examples, share: float) -> Examples:
        """The examples of a round.

        Args:
            client: the client's state.
            data: all of the client's examples.
            share: of the examples.

        Returns:
            ``data`` itself where the curriculum uses all.
        """
        return prefix(data, client.order, share) if len(client.order) else data

    def share(self, round: int, rounds: int) -> float:
        """The share of the examples in a round.

        Args:
            round: that trains, from 1.
            rounds: that train.

        Returns:
            The curriculum's share.
        """
        return share_at(round, rounds, self.curriculum_start, self.curriculum_end)
