"""Ferret: all weights tuned with first-order local steps, kilobytes on the wire.

Shu, Hu, Ng, Low, Yu. "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", ICML 2025
(PMLR 267), arXiv 2409.06277, Algorithm 1.

    client j:  w_j <- T local steps from w     Δ_j = w - w_j     c_j = s V_jᵀ Δ_j, block by block, K numbers in all
               send the L block norms in 8 bits, and of every ``group_size`` numbers the largest's place and sign
    server:    send all replies on; with shared keys c = Σ n_j c_j / Σ n_j, in ``entry_bits`` bits each
    everybody: Δ̃ = Σ n_j V_j c_j / Σ n_j (shared keys: V c)     m <- β m + Δ̃     w <- w - η m

K = ``coordinates`` · ``group_size``, at most d. Wire: K/128 + L bytes up per client and round, K/16 + L for the largest
of 8, K·bits/8 + L where all are sent (``group_size`` 1); down N times that, or K·entry_bits/8 + L with shared keys; and
under 140 bytes of framing. V is drawn anew every round: with shared keys from public facts, else from a client's key.

Deviations from the paper, each a field: the largest of several, fewer bits, the allocation, sign buckets, shared keys
(linear: payloads add up), weights by examples, the server's learning rate, schedule and momentum. The preset ``paper``
turns all of them off; ``paper-code`` makes the published code's choices instead; ``one-bit`` sends every coordinate, on
shared keys. The shrunk scale is 1/(1 + error energy): K/(K+d) of dense columns, K/d of buckets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedferret.algorithms.full_model import Weighting, change, loaded, weight_of
from fedferret.algorithms.schedule import Schedule, scheduled
from fedferret.bases.basis import basis
from fedferret.bases.blocks import Block, decode_norms, encode_norms, pack
from fedferret.bases.fixed_pool import FixedPool
from fedferret.bases.projector import Allocation, Budget, Projector, Scale
from fedferret.bases.quantise import Packed, pack_vector
from fedferret.bases.top_one import TopOneCode, encode_top_one, top_one_bytes
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Examples, Payload, Pooled, Pooling, Task, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.pooling import NotFinite
from fedferret.core.tree import Tree
from fedferret.local.first_order import FirstOrder

Bits: TypeAlias = Literal[32, 16, 8, 4, 2, 1]

# section 5 and appendix: ten steps of four accumulated single examples
_PAPER_TRAINING = {"learning_rate": 1e-4, "batch_size": 1, "accumulate": 4, "steps": 10, "clip": "none"}


@state
class FerretPublic:
    """Weights, what the server's momentum was made of, and what the next round's directions follow from."""

    weights: Tree
    momentum: Tree  # empty without momentum
    norms: Tensor  # (L,) uint8, of the last entry's blocks: the next allocation follows from them
    round: int
    seed: int  # of the directions


@state
class FerretServer:
    """Rounds done, for the schedule."""

    round: int


@state
class FerretClient:
    """What a client's coordinates could not say so far (error feedback)."""

    residual: Tree


@message
class DecodedCoordinates:
    """Coordinates (K,) and block norms (L,), both fp32: what adds up."""

    coordinates: Tensor
    norms: Tensor


@message
class SharedReply(Payload):
    """Coordinates on the round's shared directions."""

    pooling: ClassVar[Pooling] = Pooling.MEAN
    coordinates: Packed | TopOneCode
    norms: Tensor  # (L,) uint8

    def decoded(self) -> DecodedCoordinates:  # type: ignore[override]
        """The numbers behind the bits."""
        return DecodedCoordinates(self.coordinates.unpack(), torch.tensor(decode_norms(self.norms)))


@message
class KeyedReply(Payload):
    """Coordinates on the client's own directions."""

    pooling: ClassVar[Pooling] = Pooling.EACH
    coordinates: Packed | TopOneCode
    norms: Tensor  # (L,) uint8; this client's allocation follows from them
    key: int


@message
class FerretEntry:
    """One reply for all (shared keys) or every client's, each with its share of the step."""

    replies: tuple[SharedReply | KeyedReply, ...]
    shares: tuple[float, ...]
    learning_rate: float


Up: TypeAlias = SharedReply | KeyedReply


@dataclass(frozen=True, kw_only=True)
class Ferret(Algorithm[FerretPublic, FerretServer, FerretClient, FerretEntry, Up]):
    """Projected updates on shared random directions."""

    name: ClassVar[str] = "ferret"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "coordinates": 4096,  # not printed; about what the published script sends
            "basis": "truncated-normal",
            "allocation": "norm",
            "keys": "per-client",
            "bits": 32,
            "group_size": 1,
            "weighting": "equal",
            "training": _PAPER_TRAINING,
        },
        "paper-code": {
            "coordinates": 200,  # of the block with the largest norm
            "budget": "largest-block",
            "basis": "truncated-normal",
            "allocation": "norm",
            "keys": "fixed-pool",
            "scale": "published-code",
            "bits": 32,
            "group_size": 1,
            "coordinate_clip": 10.0,
            "server_learning_rate": 10.0,  # 3.33 of ours: the published scale is a third of the unbiased one
            "weighting": "equal",
            "training": _PAPER_TRAINING,
        },
        # what is added up before it is looked at: for large cohorts, whose replies would all come down otherwise
        "one-bit": {
            "coordinates": 4096,
            "group_size": 1,
            "allocation": "norm-sqrt-dim",
            "keys": "shared",
            "weighting": "examples",
        },
    }
    coordinates: int = 664  # that travel up, over all blocks: with SmolLM2's block norms 997 bytes (docs/results.md)
    basis: Literal["sign-buckets", "truncated-normal"] = "sign-buckets"  # one pass over memory whatever K is
    allocation: Allocation = "norm-squared"  # the same error in every weight: where gradients are long, so is curvature
    keys: Literal["shared", "per-client", "fixed-pool"] = "per-client"  # allots by its own norms, from round 1 on
    scale: Scale = "unbiased"
    budget: Budget = "total"
    bits: Bits = 1  # per coordinate, up; below 8 they are rotated first
    group_size: Literal[1, 8, 128] = 128  # measured for one that travels, as place and sign: less than a bit each
    entry_bits: Bits = 2  # per coordinate, down, with shared keys; 1 cost a little loss, more bought none
    coordinate_clip: float | None = None  # bound on the norm of one coordinate's share of an update
    server_learning_rate: float = 1.0
    schedule: Schedule = "constant"
    server_momentum: float = 0.0
    error_feedback: bool = False  # each client keeps what its coordinates could not say, and adds it next time
    weighting: Weighting = "equal"  # the paper's: all take as many steps, and a mean of equals has the least noise
    training: FirstOrder = field(default_factory=FirstOrder)

    def __post_init__(self) -> None:
        if not 0 <= self.server_momentum < 1:
            raise UserError(f"server_momentum={self.server_momentum}: must lie in [0, 1)")
        if not self.server_learning_rate > 0:
            raise UserError(f"server_learning_rate={self.server_learning_rate}: must be greater than 0")
        if self.group_size > 1 and self.bits != 1:
            raise UserError(
                f"group_size={self.group_size}, bits={self.bits}: what is picked travels as its place and its sign; "
                f"set group_size=1 for bits={self.bits}, or bits=1"
            )
        if self.group_size > 1 and self.error_feedback:
            raise UserError(
                f"error_feedback=true, group_size={self.group_size}: what a client keeps back would grow without "
                f"bound, as the largest alone overshoot; set group_size=1"
            )

    def check(self, shapes: Mapping[str, tuple[int, ...]], rounds: int) -> None:
        """At least one coordinate per block and at most one per weight."""
        sizes = [block.size for block in blocks_of(shapes)]
        total, blocks, largest = sum(sizes), len(sizes), max(sizes)
        measured = self._measured(total)
        if self.error_feedback and self.scale == "unbiased" and 2 * self.coordinates < total:
            raise UserError(
                'error_feedback=true, scale="unbiased": what a client keeps back would grow without bound, as an '
                'unbiased reconstruction overshoots d/K times; set scale="shrunk"'
            )
        if self.budget == "largest-block" and not 2 <= measured <= largest:
            raise UserError(
                f"coordinates={self.coordinates:,}: this model's largest block has {largest:,} weights, "
                f"choose 2 to {largest:,}"
            )
        if self.budget == "total" and not (blocks <= measured and self.coordinates <= total):
            raise UserError(
                f"coordinates={self.coordinates:,}: this model has {blocks} blocks and {total:,} weights, "
                f"choose {-(-blocks // self.group_size)} to {total:,}"
            )

    def wire_cost(self, shapes: Mapping[str, tuple[int, ...]], cohort: int) -> WireCost:
        """Codes + L up (module); K entry_bits/8 + L down with shared keys, else every client's. Error feedback keeps d.

        With the budget "largest-block" the figures are bounds: K depends on the blocks' norms.
        """
        blocks = blocks_of(shapes)
        coordinates = self._measured(sum(block.size for block in blocks))
        if self.budget == "largest-block":
            coordinates = sum(min(block.size, coordinates) for block in blocks)
        codes = coordinates * self.bits / 8 if self.group_size == 1 else top_one_bytes(coordinates, self.group_size)
        up = codes + len(blocks)
        down = coordinates * self.entry_bits / 8 + len(blocks) if self.keys == "shared" else cohort * up
        return WireCost(up, down, 4 * sum(block.size for block in blocks) if self.error_feedback else 0)

    def init(self, task: Task, key: Key) -> tuple[FerretPublic, FerretServer]:
        """Base weights, no momentum, every weight expected to change alike."""
        weights = task.store(tree.parameters(task.model))
        momentum = tree.zeros_like(weights) if self.server_momentum else {}
        # the guess before anything is known: every weight changes alike
        norms = encode_norms([math.sqrt(block.size) for block in pack(sizes_of(weights))])
        return FerretPublic(weights, momentum, norms, 0, key.fold("basis").value), FerretServer(0)

    def init_client(self, task: Task, data: Examples, key: Key) -> FerretClient | None:
        """No residual yet."""
        return FerretClient(tree.zeros_like(tree.parameters(task.model))) if self.error_feedback else None

    def client_update(
        self, task: Task, public: FerretPublic, client: FerretClient | None, data: Examples, key: Key
    ) -> ClientReply[FerretClient, Up]:
        """Train on the client's data; send the change's coordinates."""
        projector = self.projector(public)
        with loaded(task, public.weights) as model:
            metrics = self.training.train(task, data, key.fold("train"))
            basis_key, norms = self._shared_key(public), public.norms
            if self.keys != "shared":  # free to choose: its own directions, its own allocation
                basis_key = key.fold("basis")
                own_norms = projector.norms(self._change(public, client, model))
                norms = encode_norms(self._finite(own_norms, public, model))
            counts = projector.counts(decode_norms(norms))
            coordinates, own_norms = projector.project(self._change(public, client, model), counts, basis_key)
            self._finite(own_norms, public, model)
            packed = self._packed(self._clipped(projector, coordinates, counts), key.fold("rounding"))
            private = None
            if client is not None:
                residual = {name: delta.clone() for name, delta in self._change(public, client, model)}
                projector.reconstruct_(residual, packed.unpack(), counts, basis_key, -1.0)
                private = FerretClient(residual)
        shared = self.keys == "shared"
        payload = SharedReply(packed, encode_norms(own_norms)) if shared else KeyedReply(packed, norms, basis_key.value)
        return ClientReply(payload, weight_of(data, self.weighting), private, metrics)

    def accept(self, task: Task, public: FerretPublic, payload: Up) -> None:
        """Refuse coordinates or norms of the wrong kind or number, and coordinates that are not finite."""
        projector = self.projector(public)
        if not isinstance(payload, SharedReply if self.keys == "shared" else KeyedReply):
            raise ValueError(f"a {type(payload).__name__} came: the client plays with other settings")
        if isinstance(payload, KeyedReply) and not 0 <= payload.key < 2**64:
            raise ValueError(f"{payload.key} is no key")
        norms = public.norms if isinstance(payload, SharedReply) else payload.norms
        if len(payload.norms) != len(projector.blocks):
            raise ValueError(f"{len(payload.norms)} block norms came, {len(projector.blocks)} were expected")
        expected = sum(projector.counts(decode_norms(norms)))
        if payload.coordinates.length != expected:
            raise ValueError(f"{payload.coordinates.length} coordinates came, {expected} were expected")
        # what pools is opened, and checked, when it does; what is kept apart travels on as it came
        if isinstance(payload, KeyedReply) and not torch.isfinite(payload.coordinates.unpack()).all():
            raise NotFinite("coordinates holds NaN or infinity")

    def server_update(
        self, task: Task, public: FerretPublic, server: FerretServer, pooled: Pooled[Up], key: Key
    ) -> tuple[FerretServer, FerretEntry]:
        """Shared keys: the mean coordinates, rounded once more. Otherwise: every client's, with its share."""
        number = server.round + 1
        rate = scheduled(self.schedule, self.server_learning_rate, number, task.rounds)
        if self.keys == "shared":
            opened: Any = pooled.only  # a mean of what SharedReply.opened gave
            packed = pack_vector(opened.coordinates, self.entry_bits, key.fold("rounding"))
            reply = SharedReply(packed, encode_norms(opened.norms.tolist()))
            return FerretServer(number), FerretEntry((reply,), (1.0,), rate)
        total = sum(pooled.weights)
        shares = tuple(weight / total for weight in pooled.weights)
        return FerretServer(number), FerretEntry(pooled.payloads, shares, rate)

    def apply(self, task: Task, public: FerretPublic, entry: FerretEntry) -> None:
        """Rebuild the change from the coordinates and step along it."""
        projector = self.projector(public)
        targets, rate = public.weights, -entry.learning_rate
        if self.server_momentum:
            targets, rate = public.momentum, 1.0
            for momentum in targets.values():
                momentum.mul_(self.server_momentum)
        for reply, share in zip(entry.replies, entry.shares, strict=True):
            shared = isinstance(reply, SharedReply)
            counts = projector.counts(decode_norms(public.norms if shared else reply.norms))
            basis_key = self._shared_key(public) if isinstance(reply, SharedReply) else Key(reply.key)
            projector.reconstruct_(targets, reply.coordinates.unpack(), counts, basis_key, rate * share)
        if self.server_momentum:
            for name, weight in public.weights.items():
                weight.sub_(public.momentum[name] * entry.learning_rate)
        if self.keys == "shared":
            public.norms.copy_(entry.replies[0].norms)
        public.round += 1

    @contextmanager
    def model(self, task: Task, public: FerretPublic, client: FerretClient | None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model

    def projector(self, public: FerretPublic) -> Projector:
        """How changes of these weights become coordinates."""
        sizes = sizes_of(public.weights)
        kind, measured = basis(self.basis), self._measured(sum(sizes.values()))
        if self.keys == "fixed-pool":
            kind = FixedPool(kind, measured, Key(public.seed))
        return Projector(sizes, kind, measured, self.allocation, self.budget, self.scale)

    def _shared_key(self, public: FerretPublic) -> Key:
        return Key(public.seed).fold(public.round)

    def _change(
        self, public: FerretPublic, client: FerretClient | None, model: nn.Module
    ) -> Iterator[tuple[str, Tensor]]:
        """What this client wants to say: its training's change, and the residual of earlier rounds."""
        for name, delta in tree.difference(public.weights, tree.parameters(model)):
            yield name, delta if client is None else delta.add_(client.residual[name])

    def _finite(self, norms_L: list[float], public: FerretPublic, model: nn.Module) -> list[float]:
        """The norms; NaN and infinity survive into them, and a second look then names the tensor: UpdateRefused."""
        if not all(map(math.isfinite, norms_L)):
            for _ in change(public.weights, model):
                pass
        return norms_L

    def _measured(self, weights: int) -> int:
        """K: of a model of so many weights no more are measured than it has."""
        return self.coordinates if self.group_size == 1 else min(self.coordinates * self.group_size, weights)

    def _packed(self, coordinates_K: Tensor, key: Key) -> Packed | TopOneCode:
        if self.group_size == 1:
            return pack_vector(coordinates_K, self.bits, key)
        return encode_top_one(coordinates_K, self.group_size, key)

    def _clipped(self, projector: Projector, coordinates_K: Tensor, counts: tuple[int, ...]) -> Tensor:
        if self.coordinate_clip is None:
            return coordinates_K
        lowest, highest = projector.clip_bounds(self.coordinate_clip, counts)
        return coordinates_K.clamp(lowest.to(coordinates_K.device), highest.to(coordinates_K.device))


def blocks_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Block, ...]:
    """The blocks of a model whose tensors have these shapes."""
    return pack({name: math.prod(shape) for name, shape in shapes.items()})


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Elements per tensor, in the model's order."""
    return {name: weight.numel() for name, weight in weights.items()}
