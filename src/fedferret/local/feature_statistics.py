"""What a classifier's head reads, and its sums by class: for methods that send statistics of features.

    x = features of an example, a row of H         n_c = Σ 1      s_c = Σ x      M_c = Σ x xᵀ      over class c

Features are read once, in evaluation order, without a gradient and with dropout off; sums are fp64 on the CPU. Sums of
two clients add up to the sums of all their examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedferret.core.task import Examples, Task

BATCH = 64  # examples at once; no result depends on it beyond rounding


class FeaturesRefused(RuntimeError):
    """A client's features that cannot be counted: there are none, or they hold NaN or infinity."""


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over the features of each of C classes.

    Attributes:
        counts_C: n_c, int64.
        sums_CH: s_c, fp64.
        moments_CHH: M_c, fp64; None where only first moments were asked for.
    """

    counts_C: Tensor
    sums_CH: Tensor
    moments_CHH: Tensor | None = None


def features_of(task: Task, data: Examples, batch_size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Read the features of a client's examples from ``task.model`` as it stands.

    Args:
        task: a classifier, and the objective of classification.
        data: the client's examples.
        batch_size: examples at once.

    Yields:
        Features, fp64, shape (N, H), and labels, int64, shape (N,), batch by batch, on the CPU.

    Raises:
        FeaturesRefused: the client holds no example, or a feature is NaN or infinite.
    """
    if not len(data):
        raise FeaturesRefused("the client holds no example")
    task.model.eval()
    for batch in data.batches(batch_size, None):
        with torch.no_grad():
            x_NH, y_N = task.objective.features(task.model, batch)  # type: ignore[attr-defined]  # of classification
        x_NH, y_N = x_NH.cpu().double(), y_N.cpu()
        wrong = int((~x_NH.isfinite()).any(dim=1).sum())
        if wrong:
            raise FeaturesRefused(f"features of {wrong} of {len(x_NH)} examples hold NaN or infinity: look at the data")
        yield x_NH, y_N


def feature_statistics(
    features: Iterable[tuple[Tensor, Tensor]], classes: int, order: Literal[1, 2] = 1
) -> FeatureStatistics:
    """Sum features by class.

    Args:
        features: batches of features, shape (N, H), and labels below ``classes``, shape (N,); at least one batch.
            ``features_of`` gives them, and a caller may transform them on the way.
        classes: C.
        order: 2 sums the second moments too, C H² values.

    Returns:
        The sums, zeros for a class without an example.

    Raises:
        FeaturesRefused: there is no batch.
    """
    found: FeatureStatistics | None = None
    for x_NH, y_N in features:
        x_NH, width = x_NH.double(), x_NH.shape[1]
        if found is None:
            moments_CHH = torch.zeros(classes, width, width, dtype=torch.float64) if order == 2 else None
            counts_C = torch.zeros(classes, dtype=torch.int64)
            found = FeatureStatistics(counts_C, torch.zeros(classes, width, dtype=torch.float64), moments_CHH)
        found.counts_C.add_(torch.bincount(y_N, minlength=classes))
        for label in set(y_N.tolist()):
            own_NH = x_NH[y_N == label]
            found.sums_CH[label] += own_NH.sum(dim=0)
            if found.moments_CHH is not None:
                found.moments_CHH[label] += own_NH.T @ own_NH
    if found is None:
        raise FeaturesRefused("the client holds no example")
    return found
