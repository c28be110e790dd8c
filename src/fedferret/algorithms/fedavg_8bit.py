"""FedAvg in 8 bits a weight, both ways: updates rounded at random, so that they stay right in the mean.

Alistarh, Grubic, Li, Tomioka, Vojnovic. "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
NIPS 2017, arXiv 1610.02132, section 3, on the update of a client's local training. Below 8 bits: DRIVE and EDEN, see
``bases/quantise.py``.

    client j:  Δ_j = w - w_j after T local steps       send Q(Δ_j), ``bits`` bits a weight and a scale a chunk
    server:    Δ = Q(Σ n_j Q(Δ_j) / Σ n_j)             everybody: w <- w - η Δ

Wire: d·bits/8 + 4 C bytes both ways for C chunks, d/1,024 of them at 8 bits (d/65,536 below), each tensor rounded up;
and up to 4 bytes a tensor. Deviations: the scale is the largest magnitude of a chunk, where QSGD takes a bucket's norm:
fewer levels are left unused; no entropy code; what the server sends is rounded like what it receives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn

from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.algorithms.full_model import deltas, loaded, step_
from fedferret.bases.chunks import Chunked, num_bytes, num_scales, pack_tensors
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Payload, Pooled, Shapes, Weighting, WireCost
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.norms import euclidean_norm
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder


@message
class DecodedDelta:
    """An update of every tensor, flat, fp32: the form that adds up."""

    tensors: tuple[Annotated[Tensor, Form(rank=1)], ...]  # under a mask they are int64


@message
class QuantizedDelta(Payload[DecodedDelta]):
    """A client's update in few bits."""

    delta: Chunked

    def decoded(self) -> DecodedDelta:
        """The values behind the bits."""
        return DecodedDelta(self.delta.unpack())

    def encoded(self, sum: DecodedDelta, key: Key) -> QuantizedDelta:
        """Another update in as many bits."""
        return QuantizedDelta(pack_tensors(sum.tensors, self.delta.bits, key))


@message
class QuantizedEntry:
    """The mean update in few bits, and the step to take along it."""

    delta: Chunked
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class FedAvg8Bit(Algorithm[FedAvgPublic, None, None, QuantizedEntry, QuantizedDelta]):
    """The weighted mean of updates in 8 bits a weight. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fedavg-8bit"
    holds_bf16: ClassVar[bool] = True
    bits: Literal[8, 4, 2, 1] = 8  # of a weight's update, up
    entry_bits: Literal[8, 4, 2, 1] = 8  # of a weight's update, down
    server_learning_rate: float = 1.0  # FedAvg's
    weighting: Weighting = "examples"  # FedAvg's n_j; "equal" counts every client once
    training: FirstOrder = field(default_factory=FirstOrder)

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """The bits of all weights, each tensor in whole bytes, and the chunks' scales."""
        sizes = [math.prod(shape) for shape in shapes.values()]
        up, down = (num_bytes(sizes, bits) + 4 * num_scales(sizes, bits) for bits in (self.bits, self.entry_bits))
        return WireCost.exact(up, down)

    def init(self, task: Task, key: Key) -> tuple[FedAvgPublic, None]:
        """The base weights."""
        return FedAvgPublic(task.store(tree.parameters(task.model))), None

    def client_update(
        self, task: Task, public: FedAvgPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, QuantizedDelta]:
        """Train on the client's data; send the update, rounded."""
        with loaded(task, public.weights):
            trained = self.training.train(task, data, key.fold("train"))
            tensors = (delta for _, delta in deltas(public.weights, trained))
            rounded = QuantizedDelta(pack_tensors(tensors, self.bits, key.fold("rounding")))
        return ClientReply(rounded, None, trained.metrics)

    def accept(self, task: Task, public: FedAvgPublic, payload: QuantizedDelta) -> None:
        """Refuse an update of other tensors or in other bits."""
        sizes = tuple(weight.numel() for weight in public.weights.values())
        if not (isinstance(payload, QuantizedDelta) and isinstance(payload.delta, Chunked)):
            raise ValueError(f"a {type(payload).__name__} came where a QuantizedDelta was expected")
        if (payload.delta.sizes, payload.delta.bits) != (sizes, self.bits):
            raise ValueError("the update's tensors are not the model's: another model or setting sent it")
        payload.delta.check()

    def accept_sum(self, task: Task, public: FedAvgPublic, sum: DecodedDelta) -> None:
        """Refuse a sum of other sizes."""
        if not isinstance(sum, DecodedDelta):
            raise ValueError(f"a sum of type {type(sum).__name__} came where a DecodedDelta was expected")
        if [tuple(tensor.shape) for tensor in sum.tensors] != [(weight.numel(),) for weight in public.weights.values()]:
            raise ValueError("the update's tensors are not the model's: another model or setting sent it")

    def update_norm(self, task: Task, public: FedAvgPublic, payload: QuantizedDelta) -> float:
        """η ‖Δ_j‖."""
        return self.server_learning_rate * euclidean_norm(payload.delta.unpack())

    def server_update(
        self, task: Task, public: FedAvgPublic, server: None, pooled: Pooled[DecodedDelta], key: Key
    ) -> tuple[None, QuantizedEntry]:
        """The mean, rounded once more."""
        rounded = pack_tensors(pooled.only.tensors, self.entry_bits, key.fold("rounding"))
        return None, QuantizedEntry(rounded, float(self.server_learning_rate))

    def apply(self, task: Task, public: FedAvgPublic, entry: QuantizedEntry) -> None:
        """w <- w - η Δ, element by element."""
        deltas = dict(zip(public.weights, entry.delta.unpack(), strict=True))
        step_(public.weights, deltas, entry.learning_rate, task.rounding)

    @contextmanager
    def model(self, task: Task, public: FedAvgPublic, client: None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model
