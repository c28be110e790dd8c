"""A round's updates on their way into the pool: each is checked when it comes, and pooled when its weight is known.

    weight known at once, fewer than four updates     pooled at once: one update in memory
    weights or norms bounded by those of all          accepted payloads wait in a temporary file until all are known

Whatever an update holds becomes one failure with one line; nothing that a client sends raises here.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedferret.core.algorithm import Payload, Pooled, Pooling, Weighting
from fedferret.core.exchanges import ClientUpdate, Failure, Masked, Reply
from fedferret.core.metrics import check_metrics
from fedferret.core.node import Codec, Node
from fedferret.core.norms import FEWEST, NormLimits
from fedferret.core.pooling import basic_pool, tensors
from fedferret.core.spool import Place, Spool
from fedferret.core.weighting import bounded_clients, weights_of

if TYPE_CHECKING:
    from fedferret.core.rounds import Plan

SMALL = 1 << 23  # bytes of waiting sums that stay in memory


@dataclass(frozen=True)
class Accepted:
    """What stays of an accepted update once its payload is in the pool."""

    num_examples: int
    metrics: Mapping[str, float]
    bytes_up: int
    norm: float | None = None  # of what the update alone would add to the weights


class Waiting:
    """Sums that wait until their round's updates are all in: decoded, or from ``SMALL`` bytes on encoded in a file."""

    def __init__(self, codec: Codec) -> None:
        self._codec, self._room = codec, SMALL
        self._sums: dict[str, Any] = {}
        self._places: dict[str, Place] = {}
        self._spool: Spool | None = None

    def put(self, client: str, payload: Any, sum: Any) -> None:
        """Keep a client's sum, or the payload that it is decoded from.

        Args:
            client: name; once a round.
            payload: accepted.
            sum: what the payload decodes to.
        """
        size = 64 + int(math.fsum(tensor.nbytes for _, tensor in tensors(sum)))
        if size <= self._room:
            self._room -= size
            self._sums[client] = sum
            return
        if self._spool is None:
            self._spool = Spool(tempfile.TemporaryFile())  # noqa: SIM115  # closed with the round's intake
        self._places[client] = self._spool.put(self._codec.encode(payload))

    def pop(self, client: str) -> Any:
        """Give a client's sum back, once.

        Args:
            client: name.

        Returns:
            The sum that was put, to the bit.
        """
        if client in self._sums:
            return self._sums.pop(client)
        assert self._spool is not None
        payload = self._codec.decode(self._spool.get(self._places.pop(client)))
        return payload if isinstance(payload, Masked) else payload.decoded()


class Intake:
    """Takes one round's outcomes in client order."""

    def __init__(self, node: Node, plan: Plan, longest: float, asked: int = 0) -> None:
        """Begin a round.

        Args:
            node: the server's, before the round.
            plan: of the run.
            longest: bytes that an update may have.
            asked: clients that were asked for an update.
        """
        self._started = time.perf_counter()
        self.accepted: dict[str, Accepted] = {}
        self.failures: list[Failure] = []
        self._node, self._plan, self._longest = node, plan, longest
        self._weighting: Weighting = "equal" if node.guards else node.algorithm.weighting_at(node.public)
        self._masked = next((guard.modulus for guard in node.guards if guard.modulus is not None), None)
        pooling = node.algorithm.pooling_at(node.public)
        self._pool = plan.pool.pool(pooling) if self._masked is None else basic_pool(Pooling.SUM)
        self._limits = NormLimits(node, plan.pool)
        bounded = plan.bounds is not None and self._weighting == "examples"
        waits = bounded or (self._limits.on and asked >= FEWEST)  # for all weights, or for the others' norms
        self._waiting = Waiting(node.codec) if waits else None

    @property
    def clients(self) -> list[str]:
        """The clients of accepted updates, in order."""
        return list(self.accepted)

    def take(self, outcome: Reply | Failure) -> Reply | Failure:
        """Accept a reply, or note the failure.

        Args:
            outcome: of one client, in client order.

        Returns:
            The reply where it was accepted, and otherwise a failure.

        Raises:
            OSError: the disk is full; no fault of a client raises.
        """
        if isinstance(outcome, Reply):
            try:
                self._accept(outcome)
                return outcome
            except ValueError as error:
                outcome = Failure(outcome.client, "pool", str(error))
            except OSError:
                raise  # the disk is full: no fault of this client
            except Exception as error:  # whatever a strange payload may raise
                outcome = Failure(outcome.client, "pool", f"{type(error).__name__}: {error}")
        self.failures.append(outcome)
        return outcome

    def refuse_outliers(self) -> list[Failure]:
        """Refuse, now that all updates are in, those with a norm far above the cohort's median.

        Returns:
            One failure per update that was accepted before and is not any more.
        """
        wrong = self._limits.outliers({client: update.norm for client, update in self.accepted.items()})
        refused = [Failure(client, "norm", reason) for client, reason in wrong.items()]
        for failure in refused:
            del self.accepted[failure.client]
        self.failures += refused
        return refused

    def result(self) -> Pooled[Any]:
        """Pool what was accepted; called once, after the last reply.

        Returns:
            The combined sum, or every sum where they are kept apart, with the weights in client order.
        """
        if self._waiting is not None:
            for (client, update), weight in zip(self.accepted.items(), self._weights(), strict=True):
                self._pool.add(self._waiting.pop(client), weight, update.norm, checked=True)  # when it came
            self._waiting = None
        return self._pool.result()

    def bounded(self) -> tuple[str, ...]:
        """The clients with a claim of examples that counted for less than it said.

        Returns:
            Names, in client order.
        """
        clients = self.clients
        places = bounded_clients(self._claims(), self._weighting, self._plan.bounds)
        return tuple(clients[place] for place in places)

    def _accept(self, reply: Reply) -> None:
        update = reply.body
        if not isinstance(update, ClientUpdate):
            raise ValueError(f"sent a {type(update).__name__} where a ClientUpdate was expected")
        if reply.bytes_up > self._longest:
            raise ValueError(f"sent {reply.bytes_up:,} bytes; an update of this round has at most {self._longest:,.0f}")
        check_examples(update.num_examples)
        check_metrics(update.metrics)
        node = self._node
        if self._masked is not None:
            check_masked(update.payload, self._masked)
            node.algorithm.accept_sum(node.task, node.public, update.payload.sum)
        elif not isinstance(update.payload, Payload):
            raise ValueError(f"a {type(update.payload).__name__} came where a payload was expected")
        else:
            node.algorithm.accept(node.task, node.public, update.payload)
        norm = self._limits.norm(update.payload)
        sum = update.payload if isinstance(update.payload, Masked) else update.payload.decoded()
        if self._waiting is None:
            weight = 1.0 if self._weighting == "equal" else float(update.num_examples)
            self._pool.add(sum, weight, norm)
        else:
            self._pool.check(sum)  # otherwise the pool would see it only when the round ends
            self._waiting.put(reply.client, update.payload, sum)
        # the payload is in the pool; keeping it would cost a model per client
        self.accepted[reply.client] = Accepted(update.num_examples, self._timed(update.metrics), reply.bytes_up, norm)

    def _timed(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """The metrics with no more seconds than the round can have given; a stored reply may have taken longer."""
        most = max(self._plan.deadline, time.perf_counter() - self._started)
        return {name: min(value, most) if name == "seconds" else value for name, value in metrics.items()}

    def _claims(self) -> list[int]:
        return [update.num_examples for update in self.accepted.values()]

    def _weights(self) -> tuple[float, ...]:
        return weights_of(self._claims(), self._weighting, self._plan.bounds)


def check_examples(examples: Any) -> None:
    """Refuse a number of examples that cannot be.

    Args:
        examples: as a client states it, of any type.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ValueError(f"states {examples!r} examples: must be a whole number, at least 1")


def check_masked(payload: Any, modulus: int) -> None:
    """Refuse what is no sum of integers below a modulus.

    Args:
        payload: as it came from a client, of any type.
        modulus: of the run's guard.

    Raises:
        ValueError: it is no ``Masked`` of this modulus, or its tensors are not int64 from 0 to ``modulus`` - 1.
    """
    if not isinstance(payload, Masked) or payload.modulus != modulus:
        raise ValueError(f"a {type(payload).__name__} came where a sum modulo {modulus} was expected")
    for name, tensor in tensors(payload.sum):
        fits = not tensor.numel() or 0 <= int(tensor.min()) <= int(tensor.max()) < modulus
        if tensor.dtype != torch.int64 or not fits:  # the first sum's data type would have to be everybody's
            raise ValueError(f"{name} holds values that are no integers from 0 to {modulus - 1}")
