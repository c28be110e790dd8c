"""FedPFT's synthetic features, and the training of a head on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedpft_messages import Mixtures
from fedferret.core.keys import Key
from fedferret.core.task import Replica, Task
from fedferret.local.first_order import FirstOrder, Trained
from fedferret.local.gaussian_mixtures import Kind, draw


@dataclass(frozen=True)
class FeatureBatch:
    """Features that a head reads, (B, H) fp32, and labels, (B,) int64."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Features:
    """Features as training examples.

    Attributes:
        x_NH: fp32.
        y_N: labels, int64.
    """

    x_NH: Tensor
    y_N: Tensor

    def __len__(self) -> int:
        return len(self.y_N)

    def batches(self, size: int, key: Key | None) -> Iterator[FeatureBatch]:
        """One pass, in an order that the key draws; None: in the order of the rows."""
        order_N = torch.arange(len(self)) if key is None else key.order(len(self))
        for rows in torch.split(order_N, size):
            yield FeatureBatch(self.x_NH[rows], self.y_N[rows])

    def take(self, rows: Sequence[int]) -> Features:
        """Some rows, in this order."""
        return Features(self.x_NH[list(rows)], self.y_N[list(rows)])


class HeadAlone(nn.Module):
    """A classifier's head as a model of features; its weights have their names in the classifier."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, batch: Any) -> Tensor:
        """The logits of a batch of features."""
        logits_BC: Tensor = self.head(batch.features.to(next(self.parameters()).device))
        return logits_BC


def rows_of(each: Sequence[Mixtures], weights: Sequence[float], most: int) -> list[list[int]]:
    """How many features to draw from every mixture: as many as there are examples behind the mixture.

    A client's rows are at most its weight, which the server bounds, in the unit in which the lower median of clients
    has as many rows as examples: a claim of 10^9 examples draws no more than it would weigh.

    Args:
        each: of every client.
        weights: of the clients.
        most: rows in all; above it all are fewer in proportion, and at least one.

    Returns:
        Rows by client and class.
    """
    counts = [mixtures.counts.tolist() for mixtures in each]
    totals = [sum(own) for own in counts]
    ratios = sorted(total / weight for total, weight in zip(totals, weights, strict=True))
    unit = max(1.0, ratios[(len(ratios) - 1) // 2])
    allowed = [min(total, weight * unit) for total, weight in zip(totals, weights, strict=True)]
    shared = min(1.0, most / sum(allowed))
    parts = [shared * own / total for own, total in zip(allowed, totals, strict=True)]
    return [[max(1, round(part * count)) for count in own] for own, part in zip(counts, parts, strict=True)]


def drawn_features(each: Sequence[Mixtures], rows: Sequence[Sequence[int]], kind: Kind, key: Key) -> Features:
    """Draw features from mixtures, each from a column of one random matrix.

    Args:
        each: of every client.
        rows: to draw, by client and class.
        kind: of the covariances.
        key: of all draws.

    Returns:
        The features with their labels, client by client.
    """
    x, y, column = [], [], 0
    for mixtures, own in zip(each, rows, strict=True):
        for (label, (_, mixture)), count in zip(mixtures.by_label().items(), own, strict=True):
            x.append(draw(mixture, kind, count, key, column))
            y.append(torch.full((count,), label))
            column += 1
    return Features(torch.cat(x), torch.cat(y))


def train_head(task: Task, head: nn.Module, features: Features, training: FirstOrder, key: Key) -> Trained:
    """Train a head on features, in place, with the task's objective.

    Args:
        task: its objective reads labels and the model's logits.
        head: begins from its values.
        features: what it reads, with labels.
        training: how.
        key: draws the order of the features.

    Returns:
        The head's weights, by their names in the classifier.

    Raises:
        TrainingRefused: the loss is not finite.
    """
    alone = replace(task, replica=Replica(HeadAlone(head)), rounds=1, round=1)
    return training.train(alone, features, key)
