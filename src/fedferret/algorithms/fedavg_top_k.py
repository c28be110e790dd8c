"""FedAvg of the largest values: each client sends the k largest values of its update and keeps the rest for later.

Stich, Cordonnier, Jaggi. "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599, Algorithm 1, on the update of a
client's local training, as Sattler, Wiedemann, Müller, Samek, arXiv 1903.02891 (TNNLS 2020) have it.

    client j:  Δ_j = w - w_j + λ e_j after T local steps    S_j = the k largest |Δ_j| of the whole model
               send Δ_j on S_j in ``bits`` bits             e_j <- Δ_j minus what was sent
    server:    Δ = Σ n_j Δ_j / Σ n_j on the union of all S_j, in ``entry_bits`` bits  everybody: w <- w - η Δ

With 1 bit a value is a sign, and all have one magnitude (``bases/signs.py``). Down it is 16 bits then: a mean of signs
has many values, and no residual would catch what a sign loses.

Wire: ceil(k·bits/8) + P(k) up, u·entry_bits/8 + P(u) down with u <= N k values in the union; P is the cost of positions
(``bases/positions.py``): 0 for k = d, at most 2 + log2(d/k) bits each, and less where they cluster. Selecting streams
over the update, so what it costs in memory is the residual, a model in fp32 that every client keeps; the server keeps a
round's replies, N k values. Deviation: the union goes down whole, where Sattler et al. cut it to k once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.algorithms.full_model import deltas, loaded
from fedferret.algorithms.sparse_updates import (
    Residual,
    Sparse,
    SparseEntry,
    by_tensor,
    entry_bytes,
    mean_where_given,
    step_where_given_,
)
from fedferret.bases.positions import Positions, least_bytes, num_bytes, pack_positions
from fedferret.bases.quantise import Packed, pack_vector
from fedferret.bases.quantise import num_bytes as value_bytes
from fedferret.bases.signs import Signs, pack_signs
from fedferret.bases.top_k import top_k
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Pooled, Pooling, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.norms import euclidean_norm
from fedferret.core.pooling import NotFinite
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder


@dataclass(frozen=True, kw_only=True)
class FedAvgTopK(Algorithm[FedAvgPublic, None, Residual, SparseEntry, Sparse]):
    """The weighted mean of the clients' largest updates. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fedavg-top-k"
    holds_bf16: ClassVar[bool] = True
    fraction: float = 0.01  # k/d; Aji and Heafield (2017) and most since send one in a hundred
    values: int | None = None  # k itself, in place of ``fraction``; ``most_values`` gives it for a number of bytes
    bits: Literal[32, 16, 8, 1] = 16  # of a value; what fp16 rounds off is 2^-11 of it and stays in the residual
    error_feedback: bool = True  # without, weights that never change much never change; costs a model a client
    residual_decay: float = 1.0  # λ; Stich et al. forget nothing, SparseLoCo has 0.95
    server_learning_rate: float = 1.0  # FedAvg's
    weighting: Weighting = "examples"  # FedAvg's n_j; "equal" counts every client once
    training: FirstOrder = field(default_factory=FirstOrder)

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction={self.fraction}: must be above 0 and at most 1, which is FedAvg")
        if self.values is not None and self.fraction != FedAvgTopK.fraction:
            raise UserError(f"values={self.values} and fraction={self.fraction}: both say how many travel; give one")
        if self.values is not None and self.values < 1:
            raise UserError(f"values={self.values}: must be at least 1")
        if not 0 <= self.residual_decay <= 1:
            raise UserError(
                f"residual_decay={self.residual_decay}: must be from 0, which forgets, to 1, which keeps all"
            )
        if self.residual_decay != 1 and not self.error_feedback:
            raise UserError(f"residual_decay={self.residual_decay}: there is no residual with error_feedback = false")

    @property
    def pooling(self) -> Pooling:
        """Kept apart: positions differ from client to client."""
        return Pooling.EACH

    @property
    def entry_bits(self) -> int:
        """Of a mean value, down."""
        return 16 if self.bits == 1 else self.bits

    def check(self, model: nn.Module, rounds: int) -> None:
        """Refuse more values than there are weights."""
        total = tree.size(tree.parameters(model))
        if self.values is not None and self.values > total:
            raise UserError(f"values={self.values:,}: the model has {total:,} weights, and all of them are FedAvg")

    def num_kept(self, num_weights: int) -> int:
        """How many of ``num_weights`` weights a client sends: k, at least 1."""
        return max(1, round(self.fraction * num_weights)) if self.values is None else self.values

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """k values and positions up; down those of the union, k to N k values. Clients keep a residual of d."""
        total = sum(math.prod(shape) for shape in shapes.values())
        kept = self.num_kept(total)
        up = value_bytes(kept, self.bits)
        return WireCost(
            up + least_bytes(kept, total),
            up + num_bytes(kept, total),
            *entry_bytes(kept, cohort, total, self.entry_bits),
            4 * total if self.error_feedback else 0,
        )

    def init(self, task: Task, key: Key) -> tuple[FedAvgPublic, None]:
        """The base weights."""
        return FedAvgPublic(task.store(tree.parameters(task.model))), None

    def init_client(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> Residual | None:
        """Everything has been sent."""
        return Residual(tree.zeros_like(tree.parameters(task.model))) if self.error_feedback else None

    def client_update(
        self, task: Task, public: FedAvgPublic, client: Residual | None, data: Examples, key: Key
    ) -> ClientReply[Residual, Sparse]:
        """Train on the client's data; send the largest values, keep the rest."""

        def wanted() -> Iterator[tuple[str, Tensor]]:
            for name, delta in deltas(public.weights, trained):
                if client is not None:
                    delta.add_(client.residual[name].to(delta.device), alpha=self.residual_decay)
                yield name, delta

        with loaded(task, public.weights):
            trained = self.training.train(task, data, key.fold("train"))
            total = tree.size(public.weights)
            positions, values = top_k(lambda: (delta for _, delta in wanted()), self.num_kept(total))
            sent = Sparse(pack_positions(positions, total), self._packed(values, key.fold("rounding")))
            private = None
            if client is not None:
                residual, values = dict(wanted()), sent.values.unpack()
                for name, places, part in by_tensor(residual, positions):
                    residual[name].view(-1)[places] -= values[part].to(residual[name].device)
                private = Residual(residual)
        return ClientReply(sent, private, trained.metrics)

    def accept(self, task: Task, public: FedAvgPublic, payload: Sparse) -> None:
        """Refuse another number of values, positions that are none, and values that are not finite."""
        total = tree.size(public.weights)
        expected = (self.num_kept(total), total, self.num_kept(total), self.bits)
        kind: type[Signs | Packed] = Signs if self.bits == 1 else Packed
        if not isinstance(payload, Sparse):
            raise ValueError(f"a {type(payload).__name__} came where a Sparse was expected")
        positions, values = payload.positions, payload.values
        if not (isinstance(positions, Positions) and isinstance(values, kind)):
            raise ValueError(f"positions of {type(positions).__name__} and values of {type(values).__name__} came")
        bits = values.bits if isinstance(values, Packed) else 1
        if (positions.count, positions.length, values.length, bits) != expected:
            raise ValueError("the update is not k of this model's values: another model or setting sent it")
        positions.unpack()
        if not torch.isfinite(values.unpack()).all():
            raise NotFinite("values holds NaN or infinity")

    def update_norm(self, task: Task, public: FedAvgPublic, payload: Sparse) -> float:
        """η ‖Δ_j‖ of what was sent."""
        return self.server_learning_rate * euclidean_norm([payload.values.unpack()])

    def server_update(
        self, task: Task, public: FedAvgPublic, server: None, pooled: Pooled[Sparse], key: Key
    ) -> tuple[None, SparseEntry]:
        """The mean, tensor by tensor, and the positions at which it is made of anything."""
        given = [(reply.positions.unpack(), reply.values.unpack()) for reply in pooled.sums]
        union, means = mean_where_given(public.weights, given, pooled.weights)
        mean = pack_vector(means, self.entry_bits, key.fold("rounding"))
        return None, SparseEntry(
            Sparse(pack_positions(union, tree.size(public.weights)), mean), float(self.server_learning_rate)
        )

    def apply(self, task: Task, public: FedAvgPublic, entry: SparseEntry) -> None:
        """w <- w - η Δ where Δ is given, element by element."""
        step_where_given_(public.weights, entry.delta, entry.learning_rate, task.rounding)

    def _packed(self, values_K: Tensor, key: Key) -> Packed | Signs:
        """Values as they go up."""
        return pack_signs(values_K) if self.bits == 1 else pack_vector(values_K, self.bits, key)

    @contextmanager
    def model(self, task: Task, public: FedAvgPublic, client: Residual | None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model
