"""SparseLoCo: of every chunk of an update the largest values travel, in 2 bits; the rest fades and waits.

Sarfi, Thérien, Lidin, Belilovsky. "Communication Efficient LLM Pre-training with SparseLoCo", arXiv 2508.15706,
Algorithm 1; details from the authors' code, github.com/tplr-ai/templar, ``src/tplr/compress.py``.

    client j:  Δ_j = w - w_j after T local steps       e_j <- λ e_j + Δ_j
               S_j = of every chunk of 4,096 values of a tensor the k largest |e_j|
               send s_j = Q(e_j on S_j): 2 bits a value and 12 bits a place       e_j <- e_j - s_j
    server:    Δ = Σ s_j / N on the union of all S_j                       everybody: w <- w - η Δ

e_j stays at the client and stands for the momentum that DiLoCo's server has, so clients must return.

Wire up: V values of all chunks (k of each, fewer of a shorter one): ceil(12 V/8) + ceil(2 V/8) bytes, and two
magnitudes of 4 bytes per tensor. Down: 2 u + P(u), with u <= N V values in the union and P as in ``fedavg_top_k.py``.

Deviations: a chunk is 4,096 consecutive values, where the code cuts matrices into blocks of 64 x 64 and vectors into
pieces of up to 64. Q is ours: a sign and one of two magnitudes of the tensor, fitted with the least squared error. The
code has equal bins about the tensor's mean and sends each bin's mean. The mean is over all clients, as in the paper;
the code's is over those that sent the place, after clipping to the median norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.algorithms.full_model import deltas, loaded
from fedferret.algorithms.sparse_loco_messages import ChunkedSparse, pack_values
from fedferret.algorithms.sparse_updates import (
    Residual,
    Sparse,
    SparseEntry,
    entry_bytes,
    mean_where_given,
    step_where_given_,
)
from fedferret.bases.chunk_top_k import Chunks, chunk_positions
from fedferret.bases.positions import pack_positions
from fedferret.bases.quantise import num_bytes, pack_vector
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Pooled, Pooling, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.norms import euclidean_norm
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from fedferret.local.first_order import FirstOrder


@dataclass(frozen=True, kw_only=True)
class SparseLoCo(Algorithm[FedAvgPublic, None, Residual, SparseEntry, ChunkedSparse]):
    """The mean of the largest values of every chunk. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "sparse-loco"
    holds_bf16: ClassVar[bool] = True
    values_per_chunk: int = 64  # k: 1.6 % of a chunk; the paper keeps 1 to 3 %, its code's default is 32
    chunk_size: int = 4096  # the code's 64 x 64: a place has 12 bits
    bits: Literal[32, 2] = 2  # of a value, up; the paper's
    residual_decay: float = 0.95  # λ, the paper's
    server_learning_rate: float = 1.0  # the outer SGD's, without momentum
    weighting: Weighting = "equal"  # the paper's: its workers hold equal shards
    training: FirstOrder = field(default_factory=FirstOrder)

    def __post_init__(self) -> None:
        if not 2 <= self.chunk_size <= 2**16:
            raise UserError(f"chunk_size={self.chunk_size}: must be from 2 to 65,536; a place has its bits")
        if not 1 <= self.values_per_chunk <= self.chunk_size:
            raise UserError(
                f"values_per_chunk={self.values_per_chunk}: must be from 1 to chunk_size={self.chunk_size}, "
                f"with which all travel"
            )
        if not 0 <= self.residual_decay <= 1:
            raise UserError(
                f"residual_decay={self.residual_decay}: must be from 0, which forgets, to 1, which keeps all"
            )

    @property
    def pooling(self) -> Pooling:
        """Kept apart: places differ from client to client."""
        return Pooling.EACH

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """V values, places and magnitudes up; down those of the union. Clients keep a residual of d."""
        sizes = [math.prod(shape) for shape in shapes.values()]
        chunks, total = self._chunks(sizes), sum(sizes)
        taken = int(chunks.taken.sum())
        up = chunks.num_index_bytes + num_bytes(taken, self.bits) + (8 * len(sizes) if self.bits == 2 else 0)
        return WireCost(up, up, *entry_bytes(taken, cohort, total, self._entry_bits), 4 * total)

    def init(self, task: Task, key: Key) -> tuple[FedAvgPublic, None]:
        """The base weights."""
        return FedAvgPublic(task.store(tree.parameters(task.model))), None

    def init_client(self, task: Task, public: FedAvgPublic, data: Examples, key: Key) -> Residual:
        """Everything has been sent."""
        return Residual(tree.zeros_like(tree.parameters(task.model)))

    def client_update(
        self, task: Task, public: FedAvgPublic, client: Residual | None, data: Examples, key: Key
    ) -> ClientReply[Residual, ChunkedSparse]:
        """Train on the client's data; send the largest values of every chunk, keep the rest."""
        assert client is not None  # ``init_client`` made it
        residual: Tree = {}
        places, values, start = [], [], 0
        with loaded(task, public.weights):
            trained = self.training.train(task, data, key.fold("train"))
            for name, delta in deltas(public.weights, trained):
                residual[name] = delta.add(client.residual[name].to(delta.device), alpha=self.residual_decay)
                flat = residual[name].view(-1)
                chosen = chunk_positions(flat, self.chunk_size, self.values_per_chunk)
                values.append(flat[chosen.to(flat.device)].cpu())
                places.append(chosen + start)
                start += len(flat)
        chunks = self._chunks(tree.sizes(public.weights).values())
        codes, magnitudes = pack_values(values, self.bits)
        sent = ChunkedSparse(chunks.pack(torch.cat(places)), codes, magnitudes)
        parts = torch.split(sent.values(chunks, self.bits), [len(part) for part in values])
        start = 0
        for whole, chosen, part in zip(residual.values(), places, parts, strict=True):
            whole.view(-1)[(chosen - start).to(whole.device)] -= part.to(whole.device)
            start += whole.numel()
        return ClientReply(sent, Residual(residual), trained.metrics)

    def accept(self, task: Task, public: FedAvgPublic, payload: ChunkedSparse) -> None:
        """Refuse other numbers of values, places beyond their chunk, and values that are not finite."""
        if not isinstance(payload, ChunkedSparse):
            raise ValueError(f"a {type(payload).__name__} came where a ChunkedSparse was expected")
        chunks = self._chunks(tree.sizes(public.weights).values())
        payload.check(chunks, self.bits)
        chunks.unpack(payload.indices)

    def update_norm(self, task: Task, public: FedAvgPublic, payload: ChunkedSparse) -> float:
        """η ‖s_j‖."""
        chunks = self._chunks(tree.sizes(public.weights).values())
        return self.server_learning_rate * euclidean_norm([payload.values(chunks, self.bits)])

    def server_update(
        self, task: Task, public: FedAvgPublic, server: None, pooled: Pooled[ChunkedSparse], key: Key
    ) -> tuple[None, SparseEntry]:
        """The mean, and the places at which it is made of anything."""
        chunks = self._chunks(tree.sizes(public.weights).values())
        given = [(chunks.unpack(each.indices), each.values(chunks, self.bits)) for each in pooled.sums]
        union, means = mean_where_given(public.weights, given, pooled.weights)
        mean = pack_vector(means, self._entry_bits, key.fold("rounding"))
        return None, SparseEntry(
            Sparse(pack_positions(union, tree.size(public.weights)), mean), float(self.server_learning_rate)
        )

    def apply(self, task: Task, public: FedAvgPublic, entry: SparseEntry) -> None:
        """w <- w - η Δ where Δ is given, element by element."""
        step_where_given_(public.weights, entry.delta, entry.learning_rate, task.rounding)

    @contextmanager
    def model(self, task: Task, public: FedAvgPublic, client: Residual | None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model

    @property
    def _entry_bits(self) -> int:
        """Of a mean value, down: a mean of several clients' levels has many values."""
        return 16 if self.bits == 2 else self.bits

    def _chunks(self, sizes: Iterable[int]) -> Chunks:
        """The chunks of tensors of these sizes."""
        return Chunks(tuple(sizes), self.chunk_size, self.values_per_chunk)
