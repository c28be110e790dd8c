"""FedAvg of the largest values: each client sends the k largest values of its update and keeps the rest for later.

Stich, Cordonnier, Jaggi. "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599, Algorithm 1, on the update of a
client's local training, as Sattler, Wiedemann, Müller, Samek, arXiv 1903.02891 (TNNLS 2020) have it.

    client j:  Δ_j = w - w_j + e_j after T local steps      S_j = the k largest |Δ_j| of the whole model
               send Δ_j on S_j in ``bits`` bits             e_j <- Δ_j minus what was sent
    server:    Δ = Σ n_j Δ_j / Σ n_j on the union of all S_j, in ``bits`` bits        everybody: w <- w - η Δ

Wire: k·bits/8 + P(k) up, u·bits/8 + P(u) down with u <= N k values in the union; P is the cost of positions, see
``bases/positions.py``: 0 for k = d, 1.1 bytes each at k = d/100. Selecting streams over the update, so what it costs in
memory is the residual, a model in fp32 that every client keeps; the server keeps a round's replies, N k values.
Deviation: the union goes down whole, where Sattler et al. cut it to k once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import Delta, FedAvgPublic
from fedferret.algorithms.full_model import deltas, loaded
from fedferret.bases.positions import Positions, num_bytes, pack_positions
from fedferret.bases.quantise import Packed, pack_vector
from fedferret.bases.stochastic_rounding import rounded_once
from fedferret.bases.top_k import top_k
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Payload, Pooled, Pooling, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.norms import euclidean_norm
from fedferret.core.pooling import MeanPool, NotFinite
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from fedferret.local.first_order import FirstOrder


@state
class TopKClient:
    """What a client has not sent so far."""

    residual: Tree


@message
class Sparse(Payload["Sparse"]):
    """Some of an update's d values; the others are zero."""

    positions: Positions
    values: Packed


@message
class TopKEntry:
    """The mean update where any client sent one, and the step to take along it."""

    delta: Sparse
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class FedAvgTopK(Algorithm[FedAvgPublic, None, TopKClient, TopKEntry, Sparse]):
    """The weighted mean of the clients' largest updates. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fedavg-top-k"
    holds_bf16: ClassVar[bool] = True
    fraction: float = 0.01  # k/d; Aji and Heafield (2017) and most since send one in a hundred
    bits: Literal[32, 16] = 16  # of a value, both ways; what fp16 rounds off is 2^-11 of it and stays in the residual
    error_feedback: bool = True  # without, weights that never change much never change; costs a model a client
    server_learning_rate: float = 1.0  # FedAvg's
    weighting: Weighting = "examples"  # FedAvg's n_j; "equal" counts every client once
    training: FirstOrder = field(default_factory=FirstOrder)

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction={self.fraction}: must be above 0 and at most 1, which is FedAvg")

    @property
    def pooling(self) -> Pooling:
        """Kept apart: positions differ from client to client."""
        return Pooling.EACH

    def num_kept(self, num_weights: int) -> int:
        """How many of ``num_weights`` weights a client sends: k, at least 1."""
        return max(1, round(self.fraction * num_weights))

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """k values and positions up; down those of the union, k to N k values. Clients keep a residual of d."""
        total = sum(math.prod(shape) for shape in shapes.values())
        kept = self.num_kept(total)
        union = min(cohort * kept, total)
        # all but one of the positions cost more than all of them, which cost nothing
        most = num_bytes(min(union, total - 1), total) if kept < total else 0
        least = 0 if union == total else num_bytes(kept, total)
        up = kept * self.bits / 8 + num_bytes(kept, total)
        down = kept * self.bits / 8 + least, union * self.bits / 8 + most
        return WireCost(up, up, *down, 4 * total if self.error_feedback else 0)

    def init(self, task: Task, key: Key) -> tuple[FedAvgPublic, None]:
        """The base weights."""
        return FedAvgPublic(task.store(tree.parameters(task.model))), None

    def init_client(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> TopKClient | None:
        """Everything has been sent."""
        return TopKClient(tree.zeros_like(tree.parameters(task.model))) if self.error_feedback else None

    def client_update(
        self, task: Task, public: FedAvgPublic, client: TopKClient | None, data: Examples, key: Key
    ) -> ClientReply[TopKClient, Sparse]:
        """Train on the client's data; send the largest values, keep the rest."""

        def wanted() -> Iterator[tuple[str, Tensor]]:
            for name, delta in deltas(public.weights, trained):
                yield name, delta if client is None else delta.add_(client.residual[name].to(delta.device))

        with loaded(task, public.weights):
            trained = self.training.train(task, data, key.fold("train"))
            total = tree.size(public.weights)
            positions, values = top_k(lambda: (delta for _, delta in wanted()), self.num_kept(total))
            sent = Sparse(pack_positions(positions, total), pack_vector(values, self.bits, key.fold("rounding")))
            private = None
            if client is not None:
                residual, values = dict(wanted()), sent.values.unpack()
                for name, places, part in _by_tensor(residual, positions):
                    residual[name].view(-1)[places] -= values[part].to(residual[name].device)
                private = TopKClient(residual)
        return ClientReply(sent, private, trained.metrics)

    def accept(self, task: Task, public: FedAvgPublic, payload: Sparse) -> None:
        """Refuse another number of values, positions that are none, and values that are not finite."""
        total = tree.size(public.weights)
        expected = (self.num_kept(total), total, self.num_kept(total), self.bits)
        if not isinstance(payload, Sparse):
            raise ValueError(f"a {type(payload).__name__} came where a Sparse was expected")
        positions, values = payload.positions, payload.values
        if not (isinstance(positions, Positions) and isinstance(values, Packed)):
            raise ValueError(f"positions of {type(positions).__name__} and values of {type(values).__name__} came")
        if (positions.count, positions.length, values.length, values.bits) != expected:
            raise ValueError("the update is not k of this model's values: another model or setting sent it")
        positions.unpack()
        if not torch.isfinite(values.unpack()).all():
            raise NotFinite("values holds NaN or infinity")

    def update_norm(self, task: Task, public: FedAvgPublic, payload: Sparse) -> float:
        """η ‖Δ_j‖ of what was sent."""
        return self.server_learning_rate * euclidean_norm([payload.values.unpack()])

    def server_update(
        self, task: Task, public: FedAvgPublic, server: None, pooled: Pooled[Sparse], key: Key
    ) -> tuple[None, TopKEntry]:
        """The mean, tensor by tensor, and the positions at which it is made of anything."""
        replies = [
            (reply.values.unpack(), list(_by_tensor(public.weights, reply.positions.unpack()))) for reply in pooled.sums
        ]
        union, means, start = [], [], 0
        for index, (name, weight) in enumerate(public.weights.items()):
            pool = MeanPool()  # one tensor at a time; the arithmetic of the mean is FedAvg's
            given = torch.zeros(weight.numel(), dtype=torch.bool)
            for (values, by_tensor), share in zip(replies, pooled.weights, strict=True):
                _, places, part = by_tensor[index]
                dense = torch.zeros(weight.numel())
                dense[places], given[places] = values[part], True
                pool.add(Delta({name: dense}), share)
            union.append(given.nonzero().view(-1) + start)
            means.append(pool.result().only.delta[name][given])
            start += weight.numel()
        mean = pack_vector(torch.cat(means), self.bits, key.fold("rounding"))
        return None, TopKEntry(Sparse(pack_positions(torch.cat(union), start), mean), float(self.server_learning_rate))

    def apply(self, task: Task, public: FedAvgPublic, entry: TopKEntry) -> None:
        """w <- w - η Δ where Δ is given, element by element."""
        values = entry.delta.values.unpack()
        for name, places, part in _by_tensor(public.weights, entry.delta.positions.unpack()):
            with rounded_once(public.weights[name], task.rounding.fold(name)) as moved:
                flat = moved.view(-1)
                places = places.to(flat.device)
                flat[places] = flat[places] - values[part].to(flat.device) * entry.learning_rate

    @contextmanager
    def model(self, task: Task, public: FedAvgPublic, client: TopKClient | None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model


def _by_tensor(weights: Mapping[str, Tensor], positions_K: Tensor) -> Iterator[tuple[str, Tensor, slice]]:
    """For every tensor its name, the positions within it, and which of the K they are."""
    ends = torch.tensor([weight.numel() for weight in weights.values()]).cumsum(0)
    borders = [0, *torch.searchsorted(positions_K, ends).tolist()]
    starts = [0, *ends.tolist()]
    for index, name in enumerate(weights):
        part = slice(borders[index], borders[index + 1])
        yield name, positions_K[part] - starts[index], part
