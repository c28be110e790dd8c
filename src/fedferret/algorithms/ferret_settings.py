"""Ferret's settings, what they allow, and what follows from them and the public state; see ``ferret.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from fedferret.algorithms.ferret_messages import (
    FerretClient,
    FerretEntry,
    FerretPublic,
    FerretReply,
    FerretServer,
    KeyedReply,
    SharedReply,
    TopOneReply,
)
from fedferret.algorithms.ferret_norms import norms_travel
from fedferret.algorithms.over import OverAdapter
from fedferret.bases.blocks import pack
from fedferret.bases.coding import Coding
from fedferret.bases.projector import Allocation, Projector, Scale
from fedferret.bases.quantise import Bits
from fedferret.bases.registry import basis
from fedferret.bases.top_one import GroupSize
from fedferret.core import tree
from fedferret.core.algorithm import Pooling, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import FirstOrder
from fedferret.local.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class FerretSettings(OverAdapter[FerretPublic, FerretServer, FerretClient, FerretEntry, FerretReply]):
    """The settings of Ferret. See ``Algorithm`` for arguments and results."""

    coordinates: int = 664  # that travel up, over all blocks: with SmolLM2's block norms a message of 916 bytes
    norms_every: int = 1  # rounds from one in which block norms travel to the next; 0: in the first round alone
    basis: Literal["sign-buckets", "truncated-normal"] = "sign-buckets"  # one pass over memory whatever K is
    allocation: Allocation = "norm-squared"  # the same error in every weight: where gradients are long, so is curvature
    keys: Literal["shared", "per-client"] = "per-client"  # per client: allocation by own norms, from round 1 on
    scale: Scale = "unbiased"  # "shrunk": times 1/(1 + error energy), K/(K+d) of dense columns, K/d of buckets
    bits: Bits = 1  # per coordinate, up; below 8 they are rotated first
    group_size: GroupSize = 128  # coordinates for one that travels, as place and sign: less than a bit each
    entry_bits: Bits = 2  # per coordinate, down, with shared keys; 1 cost a little loss, more bought none
    server_learning_rate: float = 1.0
    schedule: Schedule = "constant"
    server_momentum: float = 0.0
    error_feedback: bool = False  # each client keeps what its coordinates did not carry, and adds it next time
    weighting: Weighting = "equal"  # the paper's: all take as many steps; the unweighted mean varies least
    training: FirstOrder = field(default_factory=FirstOrder)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.server_momentum < 1:
            raise UserError(f"server_momentum={self.server_momentum}: must lie in [0, 1)")
        if not self.server_learning_rate > 0:
            raise UserError(f"server_learning_rate={self.server_learning_rate}: must be greater than 0")
        if self.norms_every < 0:
            raise UserError(f"norms_every={self.norms_every}: must be at least 1, or 0 for the first round alone")
        if self.group_size > 1 and self.bits != 1:
            given = f"group_size={self.group_size}, bits={self.bits}"
            raise UserError(f"{given}: a top-1 coordinate travels as place and sign; set group_size=1, or bits=1")
        if self.group_size > 1 and self.error_feedback:
            given = f"error_feedback=true, group_size={self.group_size}: what a client keeps would grow without bound"
            raise UserError(f"{given}, as top-1 coordinates overshoot; set group_size=1")

    @property
    def pooling(self) -> Pooling:
        """A mean on shared directions; replies on own directions are kept apart."""
        return Pooling.MEAN if self.keys == "shared" else Pooling.EACH

    @property
    def coding(self) -> Coding:
        """How coordinates travel up."""
        return Coding(self.bits, self.group_size)

    def check(self, model: nn.Module, rounds: int) -> None:
        """At least one coordinate per block and at most one per weight."""
        super().check(model, rounds)
        sizes = tree.sizes(tree.parameters(model))
        total, blocks = sum(sizes.values()), len(pack(sizes))
        if self.error_feedback and self.scale == "unbiased" and 2 * self.coordinates < total:
            raise UserError(
                'error_feedback=true, scale="unbiased": what a client keeps back would grow without bound, as an '
                'unbiased reconstruction overshoots d/K times; set scale="shrunk"'
            )
        most = -(-total // self.group_size)
        if self.group_size > 128 and self.coordinates > most:  # at 128 the default is above it for small models
            raise UserError(
                f"coordinates={self.coordinates:,}, group_size={self.group_size}: this model has {total:,} weights, "
                f"and at most as many are projected; set coordinates to {most:,} or less, or a smaller group_size"
            )
        if not (blocks <= self._projected(total) and self.coordinates <= total):
            raise UserError(
                f"coordinates={self.coordinates:,}: this model has {blocks} blocks and {total:,} weights, "
                f"choose {-(-blocks // self.group_size)} to {total:,}"
            )

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Codes + L up; K entry_bits/8 + L down with shared keys, else every client's. Error feedback keeps d."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        total, blocks = sum(sizes.values()), len(pack(sizes))
        norms = blocks if norms_travel(self.norms_every, round) else 0
        up = self.coding.num_bytes(self._projected(total)) + norms
        state = 4 * total if self.error_feedback else 0
        if self.keys == "shared":
            return WireCost.exact(up, Coding(self.entry_bits).num_bytes(self._projected(total)) + norms, state)
        return WireCost(up, up, up, cohort * up, state)  # down: of as few as one reply

    def projector(self, public: FerretPublic) -> Projector:
        """How updates of these weights become coordinates."""
        sizes = tree.sizes(public.weights)
        return Projector(sizes, basis(self.basis), self._projected(sum(sizes.values())), self.allocation, self.scale)

    @property
    def _reply_type(self) -> type[FerretReply]:
        """What clients of this run send."""
        if self.keys == "shared":
            return SharedReply
        return KeyedReply if self.group_size == 1 else TopOneReply

    def _basis_key(self, public: FerretPublic, salt: int | None) -> Key:
        """Of the round's shared directions, or of a client's own."""
        shared = Key(public.seed).fold(public.round)
        return shared if salt is None else shared.fold(salt)

    def _with_norms(self, public: FerretPublic) -> bool:
        """Whether norms travel in the round at hand."""
        return norms_travel(self.norms_every, public.round + 1)

    def _projected(self, weights: int) -> int:
        """K: of a model of so many weights no more are projected than it has."""
        return self.coordinates if self.group_size == 1 else min(self.coordinates * self.group_size, weights)
