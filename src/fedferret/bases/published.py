"""The projector of Ferret's published code; see ``algorithms/ferret_published.py``.

counts    the block with the largest norm gets K coordinates, the others in proportion, and no block fewer than two
scale     d/K where the unbiased scale is 1/(ρK)
clip      bounds on a coordinate for which it moves the weights by at most a given norm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedferret.bases.projector import Projector


@dataclass(frozen=True)
class PublishedProjector(Projector):
    """The published code's map from updates to coordinates and back; ``coordinates`` is K of the largest block."""

    def counts(self, norms_L: Sequence[float]) -> tuple[int, ...]:
        """Coordinates per block, K_l, for updates with these norms.

        Args:
            norms_L: ‖Δ_l‖ per block, length L.
        """
        largest = max(norms_L) or 1.0
        return tuple(
            min(block.size, max(2, math.floor(self.coordinates * norm / largest)))
            for block, norm in zip(self.blocks, norms_L, strict=True)
        )

    def clip_bounds(self, bound: float, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Lowest and highest coordinates for which one coordinate moves the weights by at most ``bound``.

        Args:
            bound: norm of the step, in the units of the weights.
            counts: K_l per block, length L.
        Returns:
            Two tensors, fp32, shape (K,).
        """
        highest = [
            # a column of V has norm √(d / (s K)) on average
            bound / (math.sqrt(block.size / self.basis.unbiased_scale(block.size, count) / count))
            for block, count in zip(self.blocks, counts, strict=True)
        ]
        bounds = torch.repeat_interleave(torch.tensor(highest), torch.tensor(list(counts)))
        return -bounds, bounds

    def _scale(self, size: int, count: int) -> float:
        return size / count / self.basis.unbiased_scale(size, count)
