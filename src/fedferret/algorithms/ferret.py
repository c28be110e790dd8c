"""Ferret: all weights tuned with first-order local steps, kilobytes on the wire.

Shu, Hu, Ng, Low, Yu. "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", ICML 2025
(PMLR 267), arXiv 2409.06277, Algorithm 1.

    client j:  w_j <- T local steps from w     Δ_j = w - w_j     c_j = s V_jᵀ Δ_j, block by block, K coordinates in all
               send of every ``group_size`` coordinates the largest's place and sign, and in rounds that have them
               (``norms_every``) the L block norms in 8 bits
    server:    send all replies on; with shared keys c = Σ n_j c_j / Σ n_j, in ``entry_bits`` bits each
    everybody: Δ̃ = Σ n_j V_j c_j / Σ n_j (shared keys: V c)     m <- β m + Δ̃     w <- w - η m

K = ``coordinates`` · ``group_size``, at most d. Wire: K/128 + L bytes up per client and round (top-1 of 128), (m + 1)/8
bytes for one in 2^m; K·bits/8 + L where all are sent (``group_size`` 1); down N times that, or K·entry_bits/8 + L with
shared keys; no L in rounds without norms; and under 42 bytes of framing with the default's code. V is drawn anew every
round: with shared keys from public facts, else from a client's salt too.

Deviations from the paper, each a field: the top-1 code, fewer bits, the allocation, sign buckets, shared keys (linear:
payloads add up), weights by number of examples, the server's learning rate, schedule and momentum. The preset ``paper``
turns all of them off; ``one-bit`` sends every coordinate, on shared keys; ``private`` does so in full precision, for
sums under a guard. The published code's choices are ``ferret_published.py``. ``over.py``: an adapter in place of w.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fedferret.algorithms.ferret_messages import (
    SALTS,
    DecodedCoordinates,
    FerretClient,
    FerretEntry,
    FerretPublic,
    FerretReply,
    FerretServer,
    SharedReply,
    TopOneReply,
    check_reply,
    keyed,
    update_of,
)
from fedferret.algorithms.ferret_norms import mean_profile
from fedferret.algorithms.ferret_presets import PRESETS
from fedferret.algorithms.ferret_settings import FerretSettings
from fedferret.algorithms.full_model import check_finite, loaded, step_
from fedferret.bases.blocks import decode_norms, encode_norms, pack
from fedferret.bases.coding import Code, Coding
from fedferret.bases.projector import Projector, Step
from fedferret.bases.top_one import TopOneCode
from fedferret.core import tree
from fedferret.core.algorithm import ClientReply, Pooled
from fedferret.core.keys import Key
from fedferret.core.pooling import NotFinite
from fedferret.core.task import Examples, Task
from fedferret.local.schedules import scheduled


@dataclass(frozen=True, kw_only=True)
class Ferret(FerretSettings):
    """Projected updates on shared random directions. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "ferret"
    holds_bf16: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def update_norm(self, task: Task, public: FerretPublic, payload: FerretReply) -> float:
        """η ‖V_j c_j‖: exact for sign buckets, in expectation over keys for dense columns."""
        rate = scheduled(self.schedule, self.server_learning_rate, public.round + 1, task.rounds)
        return rate * self.projector(public).reconstructed_norm(
            self._unpacked(public, payload), self._counts(public, payload)
        )

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
            salt = key.fold("basis").value % SALTS
            basis_key, norms = self._basis_key(public, None if self.keys == "shared" else salt), public.norms
            if self.keys != "shared" and self._with_norms(public):  # allocated by this client's norms
                own_norms = projector.norms(update_of(public, client, trained))
                check_finite(own_norms, public.weights, trained)
                norms = encode_norms(own_norms)
            counts = projector.counts(decode_norms(norms))
            coordinates, own_norms = projector.project(update_of(public, client, trained), counts, basis_key)
            check_finite(own_norms, public.weights, trained)
            coding_key = key.fold("rounding") if self.keys == "shared" else basis_key.fold("code")
            code = self.coding.encode(self._limited(projector, coordinates, counts), coding_key)
            private = None
            if client is not None:
                residual = {name: delta.clone() for name, delta in update_of(public, client, trained)}
                projector.reconstruct_(residual, code.unpack(), counts, basis_key, -1.0)
                private = FerretClient(residual)
        if self.keys == "shared":
            norms = encode_norms(own_norms)
        sent = norms if self._with_norms(public) else None
        reply = SharedReply(code, sent) if self.keys == "shared" else keyed(code, sent, salt)
        return ClientReply(reply, private, trained.metrics)

    def accept(self, task: Task, public: FerretPublic, payload: FerretReply) -> None:
        """Refuse a reply of another kind, code or length, and coordinates that are not finite."""
        blocks = len(public.norms) if self._with_norms(public) else None
        check_reply(payload, self._reply_type, blocks)
        code = self._code(public, payload)
        self.coding.check(code, sum(self._counts(public, payload)))
        if self.keys != "shared" and not self.coding.is_finite(code):
            raise NotFinite("coordinates holds NaN or infinity")  # it travels on as it came, and is not pooled

    def accept_sum(self, task: Task, public: FerretPublic, sum: DecodedCoordinates) -> None:
        """Refuse a sum of other lengths."""
        counts = self.projector(public).counts(decode_norms(public.norms))
        wanted = DecodedCoordinates, (math.fsum(counts),), (len(counts) if self._with_norms(public) else 0,)
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
            norms = encode_norms(pooled.only.norms.tolist()) if self._with_norms(public) else None
            reply = SharedReply(code, norms)
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
            basis_key = self._basis_key(public, None if isinstance(reply, SharedReply) else reply.salt)
            return Step(self._unpacked(public, reply), self._counts(public, reply), basis_key, rate * share)

        steps = (step(*each) for each in zip(entry.replies, entry.shares, strict=True))
        projector.add_steps_(targets, steps, task.rounding)
        if self.server_momentum:
            step_(public.weights, public.momentum, entry.learning_rate, task.rounding)
        if self._with_norms(public):
            norms = [reply.norms for reply in entry.replies if reply.norms is not None]
            public.norms.copy_(norms[0] if self.keys == "shared" else mean_profile(norms, entry.shares))
        public.round += 1

    @contextmanager
    def model(self, task: Task, public: FerretPublic, client: FerretClient | None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model

    def _limited(self, projector: Projector, coordinates_K: Tensor, counts: tuple[int, ...]) -> Tensor:
        """The coordinates as they are; the published code bounds each."""
        return coordinates_K

    def _code(self, public: FerretPublic, reply: FerretReply) -> Code:
        """The code in a reply; a top-1 code on own directions travels without what is known of it."""
        if not isinstance(reply, TopOneReply):
            return reply.coordinates
        length = self._projected(tree.size(public.weights))
        seed = self._basis_key(public, reply.salt).fold("code").words[0]
        return TopOneCode(reply.codes, reply.scale, self.group_size, length, seed)

    def _unpacked(self, public: FerretPublic, reply: FerretReply) -> Tensor:
        """The coordinates, fp32, shape (K,); of a reply on shared directions decoded once."""
        return reply.unpacked if isinstance(reply, SharedReply) else self._code(public, reply).unpack()

    def _counts(self, public: FerretPublic, reply: FerretReply) -> tuple[int, ...]:
        """K_l per block of a reply: its allocation follows from its own norms, or from the public ones."""
        own = None if isinstance(reply, SharedReply) else reply.norms
        return self.projector(public).counts(decode_norms(public.norms if own is None else own))
