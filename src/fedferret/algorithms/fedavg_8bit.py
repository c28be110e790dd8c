"""FedAvg in 8 bits a weight, both ways: changes rounded at random, so that they stay right in the mean.

Alistarh, Grubic, Li, Tomioka, Vojnovic. "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
NIPS 2017, arXiv 1610.02132, section 3, on the change of a client's local training. Below 8 bits: DRIVE and EDEN, see
``bases/quantise.py``.

    client j:  Δ_j = w - w_j after T local steps       send Q(Δ_j), ``bits`` bits a weight and a scale a chunk
    server:    Δ = Q(Σ n_j Q(Δ_j) / Σ n_j)             everybody: w <- w - η Δ

Wire: d·bits/8 + 4 C bytes both ways for C chunks, d/1,024 of them at 8 bits (d/65,536 below), each tensor rounded up;
and up to 4 bytes a tensor. Deviations: the scale is the largest magnitude of a chunk, where QSGD takes a bucket's norm:
fewer levels are left unused; no entropy code; what the server sends is rounded like what it receives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.algorithms.full_model import Weighting, change, loaded, weight_of
from fedferret.bases.chunks import Chunked, num_bytes, num_scales, pack_tensors
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Examples, Payload, Pooled, Task, WireCost
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.local.first_order import FirstOrder


@message
class DecodedDelta:
    """A change of every tensor, flat, fp32: what adds up."""

    tensors: tuple[Tensor, ...]


@message
class QuantizedDelta(Payload):
    """A client's change in few bits."""

    change: Chunked

    def decoded(self) -> DecodedDelta:  # type: ignore[override]
        """The numbers behind the bits."""
        return DecodedDelta(self.change.unpack())


@message
class QuantizedEntry:
    """The mean change in few bits, and the step to take along it."""

    change: Chunked
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class FedAvg8Bit(Algorithm[FedAvgPublic, None, None, QuantizedEntry, QuantizedDelta]):
    """The weighted mean of changes of 8 bits a weight."""

    name: ClassVar[str] = "fedavg-8bit"
    bits: Literal[8, 4, 2, 1] = 8  # of a weight's change, on its way up
    entry_bits: Literal[8, 4, 2, 1] = 8  # of a weight's change, on its way down
    server_learning_rate: float = 1.0  # FedAvg's
    weighting: Weighting = "examples"  # FedAvg's n_j; "equal" counts every client once
    training: FirstOrder = field(default_factory=FirstOrder)

    def wire_cost(self, shapes: Mapping[str, tuple[int, ...]], cohort: int) -> WireCost:
        """The bits of all weights, each tensor in whole bytes, and the chunks' scales."""
        sizes = [math.prod(shape) for shape in shapes.values()]
        up, down = (num_bytes(sizes, bits) + 4 * num_scales(sizes, bits) for bits in (self.bits, self.entry_bits))
        return WireCost(up, down)

    def init(self, task: Task, key: Key) -> tuple[FedAvgPublic, None]:
        """The base weights."""
        return FedAvgPublic(task.store(tree.parameters(task.model))), None

    def client_update(
        self, task: Task, public: FedAvgPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, QuantizedDelta]:
        """Train on the client's data; send the change, rounded."""
        with loaded(task, public.weights) as model:
            metrics = self.training.train(task, data, key.fold("train"))
            deltas = (delta for _, delta in change(public.weights, model))
            rounded = QuantizedDelta(pack_tensors(deltas, self.bits, key.fold("rounding")))
        return ClientReply(rounded, weight_of(data, self.weighting), None, metrics)

    def accept(self, task: Task, public: FedAvgPublic, payload: QuantizedDelta) -> None:
        """Refuse a change of other tensors or in other bits."""
        expected = (tuple(weight.numel() for weight in public.weights.values()), self.bits)
        if (payload.change.sizes, payload.change.bits) != expected:
            raise ValueError("the change's tensors are not the model's: another model or setting sent it")

    def server_update(
        self, task: Task, public: FedAvgPublic, server: None, pooled: Pooled[QuantizedDelta], key: Key
    ) -> tuple[None, QuantizedEntry]:
        """The mean, rounded once more."""
        mean: Any = pooled.only  # of what opened() gave
        rounded = pack_tensors(mean.tensors, self.entry_bits, key.fold("rounding"))
        return None, QuantizedEntry(rounded, self.server_learning_rate)

    def apply(self, task: Task, public: FedAvgPublic, entry: QuantizedEntry) -> None:
        """w <- w - η Δ, element by element."""
        for weight, delta in zip(public.weights.values(), entry.change.unpack(), strict=True):
            weight.sub_(delta.to(weight.device).view_as(weight) * entry.learning_rate)

    @contextmanager
    def model(self, task: Task, public: FedAvgPublic, client: None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model
