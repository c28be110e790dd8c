"""Base of methods that average short updates: all tuned values as one vector, in 32 to 1 bits a value.

    client j:  w_j <- T local steps from w        v_j = all of w - w_j, one after the other        send Q(v_j)
    server:    v = Q'(Σ n_j Q(v_j) / Σ n_j)       everybody: w <- w - η v

Q is ``bases/quantise.py``: exact in 32 bits, and then this is FedAvg, to the bit; below 8 bits the whole vector is
rotated first, since its values are of unlike size. Wire: ceil(d bits / 8) bytes up and ceil(d entry_bits / 8) down. A
classifier's head is tuned too, and is a part of the vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.algorithms.full_model import deltas, loaded, step_
from fedferret.bases.quantise import Bits, Packed, num_bytes, pack_vector
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Payload, Pooled, Shapes, Weighting, WireCost
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message
from fedferret.core.norms import euclidean_norm
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder


@message
class DecodedVector:
    """An update of all tuned values, fp32, shape (d,): the form that adds up."""

    vector: Annotated[Tensor, Form(rank=1)]  # under a mask it is int64


@message
class PackedVector(Payload[DecodedVector]):
    """A client's update in few bits."""

    vector: Packed

    def decoded(self) -> DecodedVector:
        """The values behind the bits."""
        return DecodedVector(self.vector.unpack())

    def encoded(self, sum: DecodedVector, key: Key) -> PackedVector:
        """Another update in as many bits."""
        return PackedVector(pack_vector(sum.vector, self.vector.bits, key))


@message
class PackedEntry:
    """The mean update in few bits, and the step to take along it."""

    vector: Packed
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class PackedAverage(Algorithm[FedAvgPublic, None, None, PackedEntry, PackedVector]):
    """The weighted mean of updates as one vector. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "packed-average"
    bits: Bits = 32  # of a value's update, up
    entry_bits: Bits = 32  # of a value's update, down
    server_learning_rate: float = 1.0  # FedAvg's
    weighting: Weighting = "examples"  # FedAvg's n_j; "equal" counts every client once
    training: FirstOrder = field(default_factory=FirstOrder)

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """The bits of all values, in whole bytes."""
        values = sum(math.prod(shape) for shape in shapes.values())
        return WireCost.exact(num_bytes(values, self.bits), num_bytes(values, self.entry_bits))

    def sum_values(self, shapes: Shapes, round: int) -> int:
        """One a tuned value."""
        return sum(math.prod(shape) for shape in shapes.values())

    def init(self, task: Task, key: Key) -> tuple[FedAvgPublic, None]:
        """The first values of what is tuned."""
        return FedAvgPublic(task.store(tree.parameters(task.model))), None

    def client_update(
        self, task: Task, public: FedAvgPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, PackedVector]:
        """Train on the client's data; send the update, packed."""
        with self.loaded(task, public):
            trained = self.training.train(task, data, key.fold("train"))
            vector_d = torch.cat([delta.view(-1) for _, delta in deltas(public.weights, trained)])
        return ClientReply(PackedVector(pack_vector(vector_d, self.bits, key.fold("rounding"))), None, trained.metrics)

    def accept(self, task: Task, public: FedAvgPublic, payload: PackedVector) -> None:
        """Refuse an update of another length or in other bits."""
        if not (isinstance(payload, PackedVector) and isinstance(payload.vector, Packed)):
            raise ValueError(f"a {type(payload).__name__} came where a PackedVector was expected")
        if (payload.vector.length, payload.vector.bits) != (tree.size(public.weights), self.bits):
            raise ValueError("the update's length or bits are not the model's: another model or setting sent it")
        payload.vector.check()

    def accept_sum(self, task: Task, public: FedAvgPublic, sum: DecodedVector) -> None:
        """Refuse a sum of another length."""
        if not isinstance(sum, DecodedVector):
            raise ValueError(f"a sum of type {type(sum).__name__} came where a DecodedVector was expected")
        if tuple(sum.vector.shape) != (tree.size(public.weights),):
            raise ValueError("the update's length is not the model's: another model or setting sent it")

    def update_norm(self, task: Task, public: FedAvgPublic, payload: PackedVector) -> float:
        """η ‖v_j‖."""
        return self.server_learning_rate * euclidean_norm([payload.vector.unpack()])

    def server_update(
        self, task: Task, public: FedAvgPublic, server: None, pooled: Pooled[DecodedVector], key: Key
    ) -> tuple[None, PackedEntry]:
        """The mean, packed once more."""
        packed = pack_vector(pooled.only.vector, self.entry_bits, key.fold("rounding"))
        return None, PackedEntry(packed, float(self.server_learning_rate))

    def apply(self, task: Task, public: FedAvgPublic, entry: PackedEntry) -> None:
        """w <- w - η v, element by element."""
        step_(public.weights, _parts(public.weights, entry.vector.unpack()), entry.learning_rate, task.rounding)

    @contextmanager
    def model(self, task: Task, public: FedAvgPublic, client: None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with self.loaded(task, public) as model:
            yield model

    def loaded(self, task: Task, public: FedAvgPublic) -> AbstractContextManager[nn.Module]:
        """The task's model as the public state has it.

        Args:
            task: its working model is overwritten.
            public: the public state after the round before.

        Returns:
            A context that gives the model; nothing is put back after it.
        """
        return loaded(task, public.weights)


def _parts(weights: Mapping[str, Tensor], vector_d: Tensor) -> dict[str, Tensor]:
    """A vector's part of each tensor, flat."""
    parts = torch.split(vector_d, [weight.numel() for weight in weights.values()])
    return dict(zip(weights, parts, strict=True))
