"""FedPFT's mixtures of one client's features, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedferret.algorithms.fedpft_messages import Mixtures
from fedferret.algorithms.fedpft_server import drawn_features, rows_of
from fedferret.core.keys import Key
from fedferret.local.feature_statistics import FeaturesRefused, feature_statistics
from fedferret.local.gaussian_mixtures import Kind, Mixture, fit, packed


@dataclass(frozen=True)
class Fitting:
    """How features become mixtures.

    Attributes:
        components: K, the most of a class.
        kind: of the covariances.
        floor: added to every variance.
        fewest: examples of a class that is sent.
    """

    components: int
    kind: Kind
    floor: float
    fewest: int

    def mixtures(
        self, features: Sequence[tuple[Tensor, Tensor]], before: Mixtures | None, most: int, key: Key
    ) -> Mixtures:
        """Fit a mixture to the features of each class.

        Args:
            features: the client's, in batches of features, fp64, and labels; at least one.
            before: mixtures so far: draws from these join the client's features, and their counts add up.
            most: draws from these, at most.
            key: of the draws, and of where EM begins.

        Returns:
            The mixtures of all classes with enough rows.

        Raises:
            FeaturesRefused: no class has enough.
        """
        parts = list(features)
        if before:
            drawn = drawn_features([before], rows_of([before], [1.0], most), self.kind, key.fold("received"))
            parts.append((drawn.x_NH.double(), drawn.y_N))
        x_NH, y_N = (torch.cat(each) for each in zip(*parts, strict=True))
        real = sum(len(own_N) for _, own_N in features)
        counts = dict(zip(before.labels.tolist(), before.counts.tolist(), strict=True)) if before else {}
        found = {}
        for label in sorted(set(y_N.tolist())):
            own_NH = x_NH[y_N == label]
            if len(own_NH) >= self.fewest:
                count = counts.get(label, 0) + int((y_N[:real] == label).sum())
                found[label] = (count, self._of_class(own_NH, x_NH, y_N, key.fold("class", label)))
        if not found:
            raise FeaturesRefused(f"no class has {self.fewest} examples at this client (min_examples)")
        return Mixtures.of(found, self.kind, self.floor)

    def _of_class(self, own_NH: Tensor, x_NH: Tensor, y_N: Tensor, key: Key) -> Mixture:
        """K components, fewer where examples are few; of one example the covariance pooled over the classes."""
        if len(own_NH) > 1:
            return fit(own_NH, min(self.components, len(own_NH) // 2), self.kind, self.floor, key)
        present, y_N = torch.unique(y_N, return_inverse=True)
        sums = feature_statistics([(x_NH, y_N)], len(present), order=2)
        assert sums.moments_CHH is not None
        pooled_HH = sums.moments_CHH.sum(dim=0) - (sums.sums_CH.T / sums.counts_C) @ sums.sums_CH
        pooled_HH /= len(y_N)
        pooled_HH.diagonal().clamp_(min=0).add_(self.floor)
        return Mixture(torch.ones(1).double(), own_NH, packed(pooled_HH, self.kind)[None])
