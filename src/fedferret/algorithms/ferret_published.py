"""Ferret as its published code has it, where that differs from the paper; for comparison alone.

    directions      one pool of columns for the whole run, the same for every block (``bases/fixed_pool.py``)
    budget          K is the share of the block with the largest norm, and no block has fewer than two
    scale           d/K where the unbiased scale is 1/(ρK)
    clip            a bound on the norm of one coordinate's share of an update

The rest is ``ferret.py``. Wire: bits/8 bytes a coordinate and L norms, where the number of coordinates depends on the
blocks' norms: from two a block to K a block. The defaults are the published code's; its server learning rate of 10 is
3.33 of ours, because the published scale is a third of the unbiased one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fedferret.algorithms.ferret import Ferret
from fedferret.algorithms.ferret_messages import FerretPublic
from fedferret.algorithms.ferret_presets import PAPER_TRAINING
from fedferret.bases.blocks import pack
from fedferret.bases.fixed_pool import FixedPool
from fedferret.bases.projector import Allocation
from fedferret.bases.published import PublishedProjector
from fedferret.bases.quantise import Bits
from fedferret.bases.registry import basis
from fedferret.bases.top_one import GroupSize
from fedferret.core import tree
from fedferret.core.algorithm import Pooling, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import FirstOrder


def _training() -> FirstOrder:
    """As in the paper's appendix."""
    return FirstOrder(**{name: None if value == "none" else value for name, value in PAPER_TRAINING.items()})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class FerretPublished(Ferret):
    """Ferret with the published code's choices."""

    name: ClassVar[str] = "ferret-published"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # the defaults are the one set
    coordinates: int = 200  # of the block with the largest norm
    basis: Literal["sign-buckets", "truncated-normal"] = "truncated-normal"
    allocation: Allocation = "norm"
    bits: Bits = 32
    group_size: GroupSize = 1  # no other: the published code sends every coordinate
    coordinate_clip: float | None = 10.0  # bound on the norm of one coordinate's share of an update; None is off
    server_learning_rate: float = 10.0
    weighting: Weighting = "equal"
    training: FirstOrder = field(default_factory=_training)

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.group_size != 1 or self.norms_every != 1
        if own or self.error_feedback or self.keys != "per-client" or self.over is not None:
            raise UserError(
                "group_size, norms_every, error_feedback, keys, over: the published code has none of these; use ferret"
            )

    @property
    def pooling(self) -> Pooling:
        """Kept apart: every client draws its columns."""
        return Pooling.EACH

    def check(self, model: nn.Module, rounds: int) -> None:
        """From two coordinates to the weights of the largest block."""
        largest = max(block.size for block in pack(tree.sizes(tree.parameters(model))))
        if not 2 <= self.coordinates <= largest:
            raise UserError(
                f"coordinates={self.coordinates:,}: this model's largest block has {largest:,} weights, "
                f"choose 2 to {largest:,}"
            )

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """From two coordinates a block, and K in one of them, to K in each."""
        blocks = [block.size for block in pack({name: math.prod(shape) for name, shape in shapes.items()})]
        most = sum(min(size, self.coordinates) for size in blocks)
        least = sum(min(size, 2) for size in blocks)
        ends = [self.coding.num_bytes(count) + len(blocks) for count in (least, most)]
        return WireCost(ends[0], ends[1], ends[0], cohort * ends[1])

    def projector(self, public: FerretPublic) -> PublishedProjector:
        """Columns of the run's one pool."""
        kind = FixedPool(basis(self.basis), self.coordinates, Key(public.seed))
        return PublishedProjector(tree.sizes(public.weights), kind, self.coordinates, self.allocation)

    def _limited(self, projector: PublishedProjector, coordinates_K: Tensor, counts: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        if self.coordinate_clip is None:
            return coordinates_K
        lowest, highest = projector.clip_bounds(self.coordinate_clip, counts)
        return coordinates_K.clamp(lowest.to(coordinates_K.device), highest.to(coordinates_K.device))
