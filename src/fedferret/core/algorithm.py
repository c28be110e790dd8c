"""The contract of a federated method.

A method is a frozen dataclass. Its fields are its hyper-parameters; its functions change nothing in
``self``. Three memories and one wire:

    public   server and every client, bit for bit the same, rebuilt from the log     (weights, momentum, ...)
    server   the server alone                                                        (seed probabilities, ...)
    client   one client alone, never on the wire                                     (error feedback, ...)

                entry ==wire==> apply ----------------+
    server  ---/                                      v
      ^                                  client: local(model, private, data, key)
      |                                               |
    update <------------- pool <=========wire====== reply

Only the entry (down) and the reply's payload (up) cross the wire; both are messages (see ``messages.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.core.tree import Tree

Public = TypeVar("Public")  # what everybody knows, bit for bit
Server = TypeVar("Server")  # what the server keeps to itself
Client = TypeVar("Client")  # what one client keeps to itself
Entry = TypeVar("Entry")  # what a round adds to the log; a message
Up = TypeVar("Up", bound="Payload")  # what a client sends; a message


class Pooling(StrEnum):
    """How the payloads of a round combine."""

    MEAN = "mean"  # weighted mean, folded in one at a time
    SUM = "sum"  # plain sum, weights ignored
    EACH = "each"  # kept apart, in client order


class Payload:
    """Base of what a client sends. Subclasses are messages; their float tensors and floats are what pools."""

    pooling: ClassVar[Pooling] = Pooling.MEAN

    def decoded(self) -> Payload:
        """The form that adds up; differs from the wire's form where that is compressed."""
        return self


@dataclass(frozen=True)
class Pooled(Generic[Up]):
    """A round's payloads, combined: one opened payload (MEAN, SUM) or all of them (EACH), in client order."""

    payloads: tuple[Up, ...]
    weights: tuple[float, ...]  # one per reply, in client order

    @property
    def only(self) -> Up:
        """The combined payload of a MEAN or SUM."""
        (payload,) = self.payloads
        return payload


@dataclass(frozen=True)
class ClientReply(Generic[Client, Up]):
    """What ``local`` returns. ``payload``, ``weight`` and ``metrics`` travel; ``client`` stays."""

    payload: Up
    weight: float  # share in a MEAN: the number of examples, or 1
    client: Client | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WireCost:
    """Bytes per client and round that a method's formula gives, framing left out; and what it keeps on each client."""

    up: float
    down: float
    client_state_bytes: float = 0.0  # a client's private state, from one of its rounds to its next


class Examples(Protocol):
    """One client's data, as much as a method may know of it."""

    def __len__(self) -> int: ...

    def batches(self, size: int, key: Key) -> Iterator[Any]:
        """One pass over all examples in batches of at most ``size``, in an order drawn by ``key``."""
        ...


@dataclass(frozen=True)
class Task:
    """What is tuned and how it is scored; the same for every method.

    ``model`` is the one working replica of a process: its weights between calls mean nothing, a method
    writes the ones it wants. ``loss`` maps (model, batch) to the mean loss over the batch's targets.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    rounds: int  # planned in all: schedules are functions of round / rounds
    store: Callable[[Mapping[str, Tensor]], Tree] = tree.clone  # where public weights live: in memory or in a file

    @property
    def device(self) -> torch.device:
        """Where the working replica computes."""
        return next(self.model.parameters()).device


class Algorithm(ABC, Generic[Public, Server, Client, Entry, Up]):
    """A federated method. Frozen dataclass; see the module's docstring for who may know what."""

    name: ClassVar[str]
    max_rounds: ClassVar[int | None] = None  # 1 for a one-shot method
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # named sets of values for the fields

    def check(self, shapes: Mapping[str, tuple[int, ...]], rounds: int) -> None:
        """Refuse impossible settings before any work: ``shapes`` are the trainable parameters'. Raises UserError."""

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """What this method tunes of a base model: all of it, or an adapter's weights beside a frozen rest.

        Every node calls this once, before ``Task``, with the same key, and gets the same bits. May change ``model`` in
        place. A model on the meta device stays there: its shapes are what ``check`` and ``wire_cost`` see. Raises
        UserError where the model lacks what the method needs.
        """
        return model

    @abstractmethod
    def wire_cost(self, shapes: Mapping[str, tuple[int, ...]], cohort: int) -> WireCost:
        """The formula in the module's docstring, for a model of these trainable tensors and so many clients a round."""

    @abstractmethod
    def init(self, task: Task, key: Key) -> tuple[Public, Server]:
        """The state before round 1, from the weights in ``task.model``. The public part is equal on every node."""

    def init_client(self, task: Task, data: Examples, key: Key) -> Client | None:
        """A client's private state before its first round: the only place where one is born."""
        return None

    @abstractmethod
    def client_update(
        self, task: Task, public: Public, client: Client | None, data: Examples, key: Key
    ) -> ClientReply[Client, Up]:
        """One client's work in one round. Changes neither ``public`` nor ``client``."""

    def accept(self, task: Task, public: Public, payload: Up) -> None:
        """Refuse, with an exception, a payload that cannot belong to this round: of a wrong type or shape, say."""

    @abstractmethod
    def server_update(
        self, task: Task, public: Public, server: Server, pooled: Pooled[Up], key: Key
    ) -> tuple[Server, Entry]:
        """The server's work in one round: what to remember and what to tell everybody. Changes no argument."""

    @abstractmethod
    def apply(self, task: Task, public: Public, entry: Entry) -> None:
        """Bring ``public`` up to date, in place; the server and every client run this same code."""

    @abstractmethod
    def model(
        self, task: Task, public: Public, client: Client | None = None
    ) -> AbstractContextManager[nn.Module | None]:
        """What this holder can run, for evaluation and export. None: no global model, clients evaluate their own."""
