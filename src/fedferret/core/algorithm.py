"""The contract of a federated method.

A method is a frozen dataclass of hyper-parameters; its functions change nothing in it. Three memories and one wire:

    public   server and every client, bit for bit the same, rebuilt from the log     (weights, momentum, ...)
    server   the server alone                                                        (seed probabilities, ...)
    client   one client alone, never on the wire                                     (error feedback, ...)

                    entry ==wire==> apply ------------------+
    server  ------/                                         v
      ^                          client: client_update(public, private, data, key)
      |                                                     |
    server_update <----- pool <----- accept <==wire====== payload

Only the entry (down) and the payload (up) cross the wire; both are messages (``core/messages.py``). The server sets
every client's weight (``core/weighting.py``); a client states how many examples it holds and no weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, cast

from torch import Tensor, nn

from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.core.wire_cost import StateBytes as StateBytes
from fedferret.core.wire_cost import WireCost as WireCost

Public = TypeVar("Public")  # what every node knows, bit for bit
Server = TypeVar("Server")  # what the server alone knows
Client = TypeVar("Client")  # what one client alone knows
Entry = TypeVar("Entry")  # what a round adds to the log; a message
Up = TypeVar("Up", bound="Payload[Any]")  # what a client sends; a message
Sum = TypeVar("Sum")  # the form of a payload that adds up

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]  # of the tensors that a method tunes
Weighting: TypeAlias = Literal["examples", "equal"]


class Pooling(StrEnum):
    """How the payloads of a round combine."""

    MEAN = "mean"  # weighted mean
    SUM = "sum"  # plain sum, weights ignored; integers add up too
    EACH = "each"  # kept apart, in client order


class Payload(Generic[Sum]):
    """Base of what a client sends. Subclasses are messages."""

    def decoded(self) -> Sum:
        """The form in which this payload adds up with others.

        Returns:
            A dataclass of tensors that pools act on; in this base class the payload itself.
        """
        return cast(Sum, self)

    def encoded(self, sum: Sum, key: Key) -> Payload[Sum]:
        """A payload of this one's form (bits, group size, ...) that carries another sum.

        Args:
            sum: of the same names and shapes as ``self.decoded()``.
            key: draws roundings and rotations where the form has any.

        Returns:
            A new payload of this type; in this base class ``sum`` itself.
        """
        return cast("Payload[Sum]", sum)


@dataclass(frozen=True)
class Pooled(Generic[Sum]):
    """A round's sums, combined: one of them (MEAN, SUM and robust pools) or every client's (EACH), in client order."""

    sums: tuple[Sum, ...]
    weights: tuple[float, ...]  # one per client, in client order
    clients: tuple[str, ...] = ()  # their names, from the round loop: what a server keeps per client is found by these

    @property
    def only(self) -> Sum:
        """The combined sum."""
        (only,) = self.sums
        return only


@dataclass(frozen=True)
class ClientReply(Generic[Client, Up]):
    """What ``client_update`` returns. ``payload`` and ``metrics`` travel, ``client`` stays at the client."""

    payload: Up
    client: Client | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Algorithm(ABC, Generic[Public, Server, Client, Entry, Up]):
    """A federated method. A frozen dataclass; the module's docstring says which memory holds what."""

    name: ClassVar[str]
    max_rounds: ClassVar[int | None] = None  # 1 for a one-shot method
    trains_at_clients: ClassVar[bool] = True  # False where clients read a frozen model once
    per_round: ClassVar[int | None] = None  # how many clients each round must have; None: any number
    holds_bf16: ClassVar[bool] = False  # whether updates are unrounded and ``apply`` rounds bf16 weights at random
    changes_base: ClassVar[bool] = False  # whether the weights under its adapter change too: no adapter holds these
    has_global_model: ClassVar[bool] = True  # False where every client has a model, and no other is of use
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # named sets of values for the fields

    @property
    def objectives(self) -> tuple[str, ...] | None:
        """The names of the objectives that this method can take; None: any."""
        return None

    @property
    def pooling(self) -> Pooling:
        """How this method's payloads combine."""
        return Pooling.MEAN

    def pooling_at(self, public: Public) -> Pooling:
        """How the payloads of one round combine; stages may differ.

        Args:
            public: the public state before that round.

        Returns:
            The kind of pooling; ``self.pooling`` where every round has the same.
        """
        return self.pooling

    def weighting_at(self, public: Public) -> Weighting:
        """How the server weights clients in one round.

        Args:
            public: the public state before that round.

        Returns:
            The field ``weighting``, or ``"equal"`` where the method has no such field.
        """
        return cast(Weighting, getattr(self, "weighting", "equal"))

    def check(self, model: nn.Module, rounds: int) -> None:
        """Refuse impossible settings before any work.

        Args:
            model: the prepared model on the meta device: names and shapes, no values.
            rounds: rounds planned.

        Raises:
            UserError: the settings fit no such model or number of rounds.
        """

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """Attach what this method tunes, such as an adapter: once at every node, with the same key, to the same bits.

        Args:
            model: the base model; may be changed in place, and stays on the meta device where it is there.
            key: draws an adapter's first values.

        Returns:
            ``model`` itself, or ``model`` frozen with an adapter attached.

        Raises:
            UserError: the model has not what the method needs.
        """
        return model

    def note(self, public: Public) -> str | None:
        """Say what users should know of a state: the stage, or the layers that were chosen.

        Args:
            public: the public state after a round.

        Returns:
            A line, noted when it differs from that of the round before; None: nothing.
        """
        return None

    def start_fingerprint(self, base: str) -> str:
        """Name what a run begins from: every node of a run must have the same.

        Args:
            base: SHA-256 of the base weights.

        Returns:
            ``base``, or where ``prepare`` reads further values from files, a hash of ``base`` and of these.

        Raises:
            UserError: a file is missing or damaged.
        """
        return base

    def release(self, model: nn.Module) -> nn.Module:
        """Merge the adapter, or detach the adapter where it cannot be merged.

        Args:
            model: what ``prepare`` returned; may be changed in place.

        Returns:
            A model of the plain architecture; ``model`` itself where the method attaches no adapter.
        """
        return model

    @abstractmethod
    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """The formula in the module's docstring.

        Args:
            shapes: of the tensors that are tuned in this round, by parameter name.
            cohort: clients in a round.
            round: from 1.

        Returns:
            Bytes per client in this round, up and down, and bytes of a client's private state.
        """

    def state_growth(self, model: nn.Module, shapes: Shapes, round: int, clients: int) -> StateBytes:
        """Bytes of states after a round that neither ``init`` makes nor ``wire_cost`` knows.

        Args:
            model: the prepared model on the meta device.
            shapes: as for ``wire_cost``.
            round: from 1.
            clients: that have taken part by then, at most.

        Returns:
            In this base class none.
        """
        return StateBytes()

    def sum_values(self, shapes: Shapes, round: int) -> int:
        """The most values that a payload's sum has in one round; under a mask each crosses the wire in 8 bytes.

        Args:
            shapes: of the tensors that are tuned in this round, by parameter name.
            round: from 1.

        Returns:
            In this base class two values per weight: a projection and its norms are shorter than the weights.
        """
        return 2 * sum(math.prod(shape) for shape in shapes.values())

    def update_norm(self, task: Task, public: Public, payload: Up) -> float | None:
        """The Euclidean norm of what ``payload`` alone would add to the public weights.

        Args:
            task: model and objective.
            public: the public state after the round before.
            payload: of one client, after ``accept``.

        Returns:
            The norm, or its expectation over random directions; None where it has no meaning.
        """
        return None

    def tuned(self, task: Task, public: Public) -> Mapping[str, Tensor]:
        """The public weights that ``apply`` changes: what ``update_norm`` is compared with.

        Args:
            task: model and objective.
            public: the public state after the round before.

        Returns:
            Tensors by name, not to be changed; ``public.weights``, and nothing where there are none.
        """
        return cast("Mapping[str, Tensor]", getattr(public, "weights", {}))

    @abstractmethod
    def init(self, task: Task, key: Key) -> tuple[Public, Server]:
        """The state before round 1.

        Args:
            task: its model has the weights to begin from.
            key: of the run, equal on every node.

        Returns:
            The public state, equal on every node, and the server's own state.
        """

    def init_client(self, task: Task, public: Public, data: Examples, key: Key) -> Client | None:
        """A client's private state before the client's first round; no other place makes one.

        Args:
            task: model and objective.
            public: the public state after the round before.
            data: the client's examples.
            key: of this client.

        Returns:
            The state, which never leaves the client; None where the method keeps none.
        """
        return None

    @abstractmethod
    def client_update(
        self, task: Task, public: Public, client: Client | None, data: Examples, key: Key
    ) -> ClientReply[Client, Up]:
        """One client's work in one round. Changes neither ``public`` nor ``client``.

        Args:
            task: model and objective.
            public: the public state after the round before.
            client: the client's private state.
            data: the client's examples.
            key: of this client in this round.

        Returns:
            The payload and metrics for the server, and the client's new private state.
        """

    def personalise(
        self, task: Task, public: Public, client: Client | None, training: Callable[[], Examples], key: Key
    ) -> Client | None:
        """Make the private state that a client is scored with; it is used once and kept nowhere.

        Args:
            task: model and objective; the working model may be overwritten.
            public: the newest public state.
            client: the client's private state; None where it has none.
            training: gives the client's training examples; called only where they are needed.
            key: of this client and version.

        Returns:
            What ``model`` is given as the client's private state; in this base class ``client``.
        """
        return client

    def accept(self, task: Task, public: Public, payload: Up) -> None:
        """Check everything that a payload claims: types, bits, groups, lengths, ranges.

        Args:
            task: model and objective.
            public: the public state after the round before.
            payload: as it came from a client, so possibly malformed.

        Raises:
            ValueError: the payload cannot belong to this round.
        """

    def accept_sum(self, task: Task, public: Public, sum: Any) -> None:
        """Check the names and shapes of a sum that came in no payload: masked, or unmasked by a guard.

        Args:
            task: model and objective.
            public: the public state after the round before.
            sum: of the type that ``Payload.decoded`` returns; under a mask its tensors are int64.

        Raises:
            ValueError: no payload of this round decodes to such a sum.
        """

    @abstractmethod
    def server_update(
        self, task: Task, public: Public, server: Server, pooled: Pooled[Any], key: Key
    ) -> tuple[Server, Entry]:
        """The server's work in one round. Changes no argument.

        Args:
            task: model and objective.
            public: the public state after the round before.
            server: the server's own state.
            pooled: the clients' sums, combined.
            key: of the server in this round.

        Returns:
            The server's new state, and the entry that every node will apply.
        """

    @abstractmethod
    def apply(self, task: Task, public: Public, entry: Entry) -> None:
        """Bring ``public`` up to date, in place; the server and every client run this same code.

        Args:
            task: model and objective; its ``rounding`` is this entry's.
            public: the public state after the round before; changed.
            entry: of this round, decoded from the log.
        """

    @abstractmethod
    def model(
        self, task: Task, public: Public, client: Client | None = None
    ) -> AbstractContextManager[nn.Module | None]:
        """The model to evaluate or export.

        Args:
            task: its working model may be overwritten.
            public: the public state of the version to evaluate.
            client: the private state of the client to evaluate; None selects the global model.

        Returns:
            A context that gives the model. It gives None where there is no global model and every client has a model.
        """


AnyAlgorithm: TypeAlias = Algorithm[Any, Any, Any, Any, Any]
