"""One node of a run: a working model, the public state at a version, and the only calls of a method's functions.

    catch_up   the log's update -> the public state at its version; fingerprints in the log are checked
    handle     a body for one client -> that client's reply, and the client's new private state

The server owns one node and applies its entries with it. A site's resident trainer, a simulation's worker, resuming and
exporting own one each. The in-process engine uses the server's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedferret.core import tree
from fedferret.core.algorithm import AnyAlgorithm, ClientReply, Payload
from fedferret.core.errors import RunError
from fedferret.core.exchanges import Body, ClientScores, ClientUpdate, Masked, Score, Train
from fedferret.core.guard import Guard, Randomness, RoundSecret, check_guards, exchange_for, os_randomness
from fedferret.core.keys import Key
from fedferret.core.log import LogUpdate, Record
from fedferret.core.metrics import rounded_metrics
from fedferret.core.pooling import mapped, tensors
from fedferret.core.restore import restore_tensors
from fedferret.core.task import Examples, Task, added_scores


class Codec(Protocol):
    """How messages become bytes; ``len(encode(x))`` is their cost."""

    def encode(self, value: Any) -> bytes:
        """Write a value as bytes.

        Args:
            value: a message, a state, or anything that a field of these may hold.

        Returns:
            The bytes that cross the wire or go to disk.
        """
        ...

    def decode(self, data: bytes) -> Any:
        """Read a value back.

        Args:
            data: what ``encode`` returned.

        Returns:
            The value, with its tensors on the CPU.
        """
        ...

    def size(self, value: Any) -> int:
        """Compute the cost of a value without a copy of its tensors.

        Args:
            value: as for ``encode``.

        Returns:
            ``len(encode(value))``, in bytes.
        """
        ...


class MissingRecords(ValueError):
    """An update that begins after a version that this node has not reached."""


class Diverged(RunError):
    """A replica that differs from what the log says."""


class Node:
    """The public state of one run at one version, and the work on it.

    Attributes:
        algorithm: the method.
        codec: reads and writes messages.
        public: the public state.
        version: of the log, that ``public`` has reached; 0 is the base.
        epoch: 0, or higher after every rewinding of the run; a node of another epoch starts again.
        void: an update broke off half-way: the node is of no more use.
    """

    def __init__(
        self,
        task: Task,
        algorithm: AnyAlgorithm,
        seed: int,
        codec: Codec,
        public: Any,
        *,
        guards: Sequence[Guard] = (),
        randomness: Randomness = os_randomness,
    ) -> None:
        """Stand at version 0, the base.

        Args:
            task: the working model with the base's weights.
            algorithm: the method.
            seed: of the run; keys of rounds and clients follow from it.
            codec: reads and writes messages.
            public: as ``algorithm.init`` returns it.
            guards: in the order in which clients apply them.
            randomness: of rounds' secrets; gives any number of bytes.

        Raises:
            UserError: a guard on payloads that are kept apart.
        """
        check_guards(guards, algorithm)
        self._task, self.algorithm, self.seed, self.public = task, algorithm, seed, public
        self.version, self.epoch, self.void = 0, 0, False
        self.guards = tuple(guards)
        self.codec, self._randomness = codec, randomness
        self._secrets: dict[str, RoundSecret] = {}  # by client, of the present round
        self._fingerprint: str | None = None

    @classmethod
    def start(
        cls,
        task: Task,
        algorithm: AnyAlgorithm,
        seed: int,
        codec: Codec,
        *,
        guards: Sequence[Guard] = (),
        randomness: Randomness = os_randomness,
    ) -> tuple[Node, Any]:
        """Begin a run on this node.

        Args:
            task: with the base weights in its model.
            algorithm: the method, for which the model is prepared.
            seed: of the run.
            codec: reads the log.
            guards: of the run, in order.
            randomness: for what guards draw.

        Returns:
            A node at version 0, and the server's own state, which other nodes have no use for.
        """
        public, server = algorithm.init(task, Key.of(seed, "begin"))
        return cls(task, algorithm, seed, codec, public, guards=guards, randomness=randomness), server

    @property
    def task(self) -> Task:
        """The working model, the objective, the rounds planned, and the round that follows this node's version."""
        return replace(self._task, round=self.version + 1)

    def fingerprint(self) -> str:
        """Hash the public state, once per version.

        Returns:
            SHA-256 over every tensor of the public state, as 64 hexadecimal digits.
        """
        if self._fingerprint is None:
            self._fingerprint = tree.digest(tensors(self.public))
        return self._fingerprint

    def catch_up(self, update: LogUpdate) -> None:
        """Bring the public state to the update's version. Records that the node has already are passed over.

        Args:
            update: from the log of the same run, encoded by this node's codec.

        Raises:
            RunError: an earlier update broke off half-way, so the node is void.
            MissingRecords: the update begins after this node's version and has no snapshot; the node is as before.
            ValueError: the update holds something else than the next record; the node is void.
            Diverged: a record has another fingerprint than the rebuilt state; the node is void.
        """
        if self.void:
            raise RunError("this replica broke off half-way through an update: start it again from the base")
        first = update.version - len(update.records)  # the version that the records follow
        if self.version >= update.version:
            return
        takes_snapshot = update.snapshot is not None and self.version < first
        if self.version < first and not takes_snapshot:
            raise MissingRecords(f"an update from version {first} cannot follow version {self.version}")
        self.void = True
        if takes_snapshot:
            assert update.snapshot is not None
            self.public, self.version = restore_tensors(self.task, self.codec.decode(update.snapshot)), first
            self._fingerprint = None
        for encoded in update.records[self.version - first :]:
            record = self.codec.decode(encoded)
            if not isinstance(record, Record) or record.version != self.version + 1:
                raise ValueError(f"a {type(record).__name__} came where record {self.version + 1} was expected")
            self.apply(self.codec.decode(record.entry))
            if record.fingerprint and record.fingerprint != self.fingerprint():
                raise Diverged(
                    f"version {record.version}: this machine rebuilt other weights than the log says; "
                    f"its base model, its fedferret or its memory differs"
                )
        self.void = False

    def apply(self, entry: Any) -> None:
        """Go one version on.

        Args:
            entry: the method's, decoded, of the version after this one.
        """
        self._fingerprint = None
        rounding = Key.of(self.seed, "apply", self.version + 1)  # the same on every node
        self.algorithm.apply(replace(self.task, rounding=rounding), self.public, entry)
        self.version += 1

    def leaves_state(self, round: int) -> bool:
        """Say whether a client's work leaves it a private state, by the method's formula.

        Args:
            round: of the work, from 1.

        Returns:
            False where a client without a state has lost nothing.
        """
        shapes = tree.shapes(tree.parameters(self.task.model))
        return self.algorithm.wire_cost(shapes, 1, round).client_state_bytes > 0

    def handle(
        self,
        body: Body,
        client: str,
        private: Any | None,
        data: Examples,
        training: Callable[[], Examples] | None = None,
    ) -> tuple[Any, Any | None]:
        """Answer one body for one client.

        Args:
            body: Train, Score, or the body of an exchange that a guard declares.
            client: the client's name.
            private: the client's private state after its last counted round; None before the first.
            data: for Train the client's examples, for Score those that the client holds out.
            training: for Score: gives the client's examples, from which a first private state, or one for this score
                alone, is made.

        Returns:
            The reply, a message, and the client's private state from now on.

        Raises:
            ValueError: the body is neither Train nor Score, and no guard declares its type; or Score under a guard.
        """
        if isinstance(body, Score):
            if self.guards:
                raise ValueError("clients' scores would tell what the guards of this run hide")
            return self._score(body, client, private, data, training), private
        if isinstance(body, Train):
            return self._train(body, client, private, data)
        exchange = exchange_for(self.guards, body)
        if exchange is None:
            raise ValueError(f"a {type(body).__name__} is no part of this run's rounds")
        secret = self._secret(body.round, client)
        reply, self._secrets[client] = exchange.reply(body, client, secret, self._randomness)
        return reply, private

    def _train(self, body: Train, client: str, private: Any | None, data: Examples) -> tuple[ClientUpdate, Any]:
        task, algorithm = self.task, self.algorithm
        private = self._private(client, private, data)
        key = client_key(self.seed, body.round, client)
        reply: ClientReply[Any, Any] = algorithm.client_update(task, self.public, private, data, key)
        if not self.guards:
            return ClientUpdate(reply.payload, len(data), rounded_metrics(reply.metrics)), reply.client
        # metrics and counts stay here: they would say what the guards hide
        return ClientUpdate(self._guarded(reply.payload, body.round, client, key), 1, {}), reply.client

    def _guarded(self, payload: Payload[Any], round: int, client: str, key: Key) -> Any:
        given, modulus = payload.decoded(), None
        sum = given
        for guard in self.guards:
            sum = guard.on_client(sum, client, self._secret(round, client), self._randomness)
            modulus = guard.modulus or modulus
        if modulus is not None:
            return Masked(sum, modulus)
        return payload if sum is given else payload.encoded(sum, key.fold("guarded"))

    def _score(
        self,
        body: Score,
        client: str,
        private: Any | None,
        data: Examples,
        training: Callable[[], Examples] | None,
    ) -> ClientScores:
        if not len(data):
            raise ValueError("the client holds no example out")
        if private is not None:
            private = on_device(private, self.task.device)
        if training:
            key = Key.of(self.seed, "personalise", self.version, client)
            private = self.algorithm.personalise(self.task, self.public, private, training, key)
        sums = self._scores(body, private, data)
        if sums is None and training:  # personal models alone, and a client that has none yet, or none of this stage
            sums = self._scores(body, self._private(client, None, training()), data)
        if sums is None:
            raise ValueError(f"{self.algorithm.name} gives client {client} no model to score")
        return ClientScores(sums)

    def _scores(self, body: Score, private: Any | None, data: Examples) -> dict[str, float] | None:
        with self.algorithm.model(self.task, self.public, private) as model:
            return None if model is None else added_scores(self.task.objective, model, data, body.batch_size)

    def _private(self, client: str, private: Any | None, data: Examples) -> Any | None:
        """The private state on the device that computes; made here before the client's first round."""
        if private is None:
            return self.algorithm.init_client(self.task, self.public, data, Key.of(self.seed, "join", client))
        return on_device(private, self.task.device)

    def _secret(self, round: int, client: str) -> RoundSecret:
        known = next(iter(self._secrets.values()), None)
        if known is not None and known.round != round:  # every client's secret ends with its round
            self._secrets.clear()
        return self._secrets.setdefault(client, RoundSecret(round))


def client_key(seed: int, round: int, client: str) -> Key:
    """The key of one client's work in a round.

    Args:
        seed: of the run.
        round: from 1.
        client: the client's name.

    Returns:
        A key that depends on these three and on nothing else.
    """
    return Key.of(seed, "local", round, client)


def on_device(value: Any, device: torch.device) -> Any:
    """Move a private state to where it is used; what was read from a file lies in the processor's memory.

    Args:
        value: a tensor, or dataclasses, mappings and tuples that hold tensors.
        device: to compute on.

    Returns:
        A value of the same form with every tensor on ``device``; tensors that are there already are shared.
    """
    return mapped(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)
