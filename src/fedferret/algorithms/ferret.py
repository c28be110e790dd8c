"""Ferret: all weights tuned with first-order local steps, kilobytes on the wire.

Shu, Hu, Ng, Low, Yu. "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", ICML 2025
(PMLR 267), arXiv 2409.06277, Algorithm 1.

    client j:  w_j <- T local steps from w     Δ_j = w - w_j     c_j = s V_jᵀ Δ_j, block by block, K coordinates in all
               send the L block norms in 8 bits, and of every ``group_size`` coordinates the largest's place and sign
    server:    send all replies on; with shared keys c = Σ n_j c_j / Σ n_j, in ``entry_bits`` bits each
    everybody: Δ̃ = Σ n_j V_j c_j / Σ n_j (shared keys: V c)     m <- β m + Δ̃     w <- w - η m

K = ``coordinates`` · ``group_size``, at most d. Wire: K/128 + L bytes up per client and round (top-1 of 128), K/16 + L
for top-1 of 8, K·bits/8 + L where all are sent (``group_size`` 1); down N times that, or K·entry_bits/8 + L with shared
keys; and under 140 bytes of framing. V is drawn anew every round: with shared keys from public facts, else from a
client's key.

Deviations from the paper, each a field: the top-1 code, fewer bits, the allocation, sign buckets, shared keys (linear:
payloads add up), weights by number of examples, the server's learning rate, schedule and momentum. The preset ``paper``
turns all of them off; ``one-bit`` sends every coordinate, on shared keys; ``private`` does so in full precision, for
sums under a guard. The published code's choices are ``ferret_published.py``. ``over.py``: an adapter in place of w.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from fedferret.algorithms.ferret_messages import (
    DecodedCoordinates,
    FerretClient,
    FerretEntry,
    FerretPublic,
    FerretReply,
    FerretServer,
    KeyedReply,
    SharedReply,
    check_reply,
    update_of,
)
from fedferret.algorithms.ferret_norms import mean_profile, norms_travel
from fedferret.algorithms.ferret_presets import PRESETS
from fedferret.algorithms.full_model import check_finite, loaded, step_
from fedferret.algorithms.over import OverAdapter
from fedferret.bases.blocks import decode_norms, encode_norms, pack
from fedferret.bases.coding import Coding
from fedferret.bases.projector import Allocation, Projector, Scale, Step
from fedferret.bases.registry import basis
from fedferret.core import tree
from fedferret.core.algorithm import ClientReply, Pooled, Pooling, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import NotFinite
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder
from fedferret.local.schedules import Schedule, scheduled

Bits: TypeAlias = Literal[32, 16, 8, 4, 2, 1]


@dataclass(frozen=True, kw_only=True)
class Ferret(OverAdapter[FerretPublic, FerretServer, FerretClient, FerretEntry, FerretReply]):
    """Projected updates on shared random directions. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "ferret"
    holds_bf16: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    coordinates: int = 664  # that travel up, over all blocks: with SmolLM2's block norms 997 bytes (docs/results.md)
    norms_every: int = 1  # rounds from one in which block norms travel to the next; 0: in the first round alone
    basis: Literal["sign-buckets", "truncated-normal"] = "sign-buckets"  # one pass over memory whatever K is
    allocation: Allocation = "norm-squared"  # the same error in every weight: where gradients are long, so is curvature
    keys: Literal["shared", "per-client"] = "per-client"  # per client: allocation by own norms, from round 1 on
    scale: Scale = "unbiased"  # "shrunk": times 1/(1 + error energy), K/(K+d) of dense columns, K/d of buckets
    bits: Bits = 1  # per coordinate, up; below 8 they are rotated first
    group_size: Literal[1, 8, 128] = 128  # coordinates for one that travels, as place and sign: less than a bit each
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

    def update_norm(self, task: Task, public: FerretPublic, payload: FerretReply) -> float:
        """η ‖V_j c_j‖: exact for sign buckets, in expectation over keys for dense columns."""
        rate = scheduled(self.schedule, self.server_learning_rate, public.round + 1, task.rounds)
        return rate * self.projector(public).reconstructed_norm(payload.unpacked, self._counts(public, payload))

    def init(self, task: Task, key: Key) -> tuple[FerretPublic, FerretServer]:
        """Base weights, no momentum, every weight expected to move alike."""
        weights = task.store(tree.parameters(task.model))
        momentum = tree.zeros_like(weights) if self.server_momentum else {}
        # the guess before anything is known: the same norm for every weight
        norms = encode_norms([math.sqrt(block.size) for block in pack(tree.sizes(weights))])
        return FerretPublic(weights, momentum, norms, 0, key.fold("basis").value), FerretServer(0)

    def init_client(self, task: Task, public: FerretPublic, data: Examples, key: Key) -> FerretClient | None:
        """No residual yet."""
        return FerretClient(tree.zeros_like(tree.parameters(task.model))) if self.error_feedback else None

    def client_update(
        self, task: Task, public: FerretPublic, client: FerretClient | None, data: Examples, key: Key
    ) -> ClientReply[FerretClient, FerretReply]:
        """Train on the client's data; send the update's coordinates."""
        projector = self.projector(public)
        with loaded(task, public.weights):
            trained = self.training.train(task, data, key.fold("train"))
            basis_key = self._shared_key(public) if self.keys == "shared" else key.fold("basis")
            norms = public.norms
            if self.keys != "shared" and self._with_norms(public):  # allocated by this client's norms
                own_norms = projector.norms(update_of(public, client, trained))
                check_finite(own_norms, public.weights, trained)
                norms = encode_norms(own_norms)
            counts = projector.counts(decode_norms(norms))
            coordinates, own_norms = projector.project(update_of(public, client, trained), counts, basis_key)
            check_finite(own_norms, public.weights, trained)
            code = self.coding.encode(self._limited(projector, coordinates, counts), key.fold("rounding"))
            private = None
            if client is not None:
                residual = {name: delta.clone() for name, delta in update_of(public, client, trained)}
                projector.reconstruct_(residual, code.unpack(), counts, basis_key, -1.0)
                private = FerretClient(residual)
        if self.keys == "shared":
            norms = encode_norms(own_norms)
        sent = norms if self._with_norms(public) else norms.new_empty(0)
        reply = SharedReply(code, sent) if self.keys == "shared" else KeyedReply(code, sent, basis_key.value)
        return ClientReply(reply, private, trained.metrics)

    def accept(self, task: Task, public: FerretPublic, payload: FerretReply) -> None:
        """Refuse a reply of another kind, code or length, and coordinates that are not finite."""
        check_reply(payload, SharedReply if self.keys == "shared" else KeyedReply, self._norms(public))
        self.coding.check(payload.coordinates, sum(self._counts(public, payload)))
        if isinstance(payload, KeyedReply) and not self.coding.is_finite(payload.coordinates):
            raise NotFinite("coordinates holds NaN or infinity")  # it travels on as it came, and is not pooled

    def accept_sum(self, task: Task, public: FerretPublic, sum: DecodedCoordinates) -> None:
        """Refuse a sum of other lengths."""
        counts = self.projector(public).counts(decode_norms(public.norms))
        wanted = DecodedCoordinates, (math.fsum(counts),), (self._norms(public),)
        if (type(sum), tuple(sum.coordinates.shape), tuple(sum.norms.shape)) != wanted:
            raise ValueError("a sum of other coordinates or blocks came than the round's")

    def server_update(
        self, task: Task, public: FerretPublic, server: FerretServer, pooled: Pooled[Any], key: Key
    ) -> tuple[FerretServer, FerretEntry]:
        """Shared keys: the mean coordinates, rounded once more. Otherwise: every client's, with its share."""
        number = server.round + 1
        rate = scheduled(self.schedule, self.server_learning_rate, number, task.rounds)
        if self.keys == "shared":
            code = Coding(self.entry_bits).encode(pooled.only.coordinates, key.fold("rounding"))
            reply = SharedReply(code, encode_norms(pooled.only.norms.tolist()))
            return FerretServer(number), FerretEntry((reply,), (1.0,), rate)
        shares = tuple(weight / sum(pooled.weights) for weight in pooled.weights)
        return FerretServer(number), FerretEntry(pooled.sums, shares, rate)

    def apply(self, task: Task, public: FerretPublic, entry: FerretEntry) -> None:
        """Reconstruct the update from the coordinates and step along it."""
        projector = self.projector(public)
        targets, rate = public.weights, -entry.learning_rate
        if self.server_momentum:
            targets, rate = public.momentum, 1.0
            for momentum in targets.values():
                momentum.mul_(self.server_momentum)

        def step(reply: FerretReply, share: float) -> Step:
            basis_key = Key(reply.key) if isinstance(reply, KeyedReply) else self._shared_key(public)
            return Step(reply.coordinates.unpack(), self._counts(public, reply), basis_key, rate * share)

        steps = (step(*each) for each in zip(entry.replies, entry.shares, strict=True))
        projector.add_steps_(targets, steps, task.rounding)
        if self.server_momentum:
            step_(public.weights, public.momentum, entry.learning_rate, task.rounding)
        if self._with_norms(public):
            norms = [reply.norms for reply in entry.replies]
            public.norms.copy_(norms[0] if self.keys == "shared" else mean_profile(norms, entry.shares))
        public.round += 1

    @contextmanager
    def model(self, task: Task, public: FerretPublic, client: FerretClient | None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model

    def projector(self, public: FerretPublic) -> Projector:
        """How updates of these weights become coordinates."""
        sizes = tree.sizes(public.weights)
        return Projector(sizes, basis(self.basis), self._projected(sum(sizes.values())), self.allocation, self.scale)

    def _limited(self, projector: Projector, coordinates_K: Tensor, counts: tuple[int, ...]) -> Tensor:
        """The coordinates as they are; the published code bounds each."""
        return coordinates_K

    def _shared_key(self, public: FerretPublic) -> Key:
        return Key(public.seed).fold(public.round)

    def _counts(self, public: FerretPublic, reply: FerretReply) -> tuple[int, ...]:
        """K_l per block of a reply: its allocation follows from its own norms, or from the public ones."""
        own = isinstance(reply, KeyedReply) and self._with_norms(public)
        norms = reply.norms if own else public.norms
        return self.projector(public).counts(decode_norms(norms))

    def _with_norms(self, public: FerretPublic) -> bool:
        """Whether norms travel in the round at hand."""
        return norms_travel(self.norms_every, public.round + 1)

    def _norms(self, public: FerretPublic) -> int:
        """How many norms a reply of the round at hand has."""
        return len(public.norms) if self._with_norms(public) else 0

    def _projected(self, weights: int) -> int:
        """K: of a model of so many weights no more are projected than it has."""
        return self.coordinates if self.group_size == 1 else min(self.coordinates * self.group_size, weights)
