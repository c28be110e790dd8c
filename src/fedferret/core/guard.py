"""The seam for privacy: what stands between a client's update and the server, as declared exchanges of pure functions.

The way of a value:

    client_update -> decoded() -> on_client -> wire -> accept -> pool -> on_server -> server_update

A guard declares the exchanges of a round in order, ``Train`` among them (secure sums: advertise, share, train, unmask).
A round's secret lives at its node for one round; it is never logged and never follows from the run's seed, which every
node knows. Randomness is the operating system's; tests hand in a source of their choice. Guards apply in order at the
client and are undone in reverse at the server. Under a guard all clients weigh equally, and metrics and counts stay at
the client.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from fedferret.core.algorithm import AnyAlgorithm, Pooled, Pooling
from fedferret.core.errors import UserError
from fedferret.core.exchanges import Body

TRAIN = "train"  # the exchange that every guard has
Received = Mapping[str, Mapping[str, Any]]  # exchange, client: the client's reply


class Randomness(Protocol):
    """A source of bytes that nobody can foretell."""

    def __call__(self, count: int) -> bytes: ...


@dataclass
class RoundSecret:
    """What one client keeps of one round, for the exchanges that follow."""

    round: int
    values: dict[str, Any] = field(default_factory=dict)


class Exchange(ABC):
    """One question to every client and its answer, both messages."""

    name: ClassVar[str]
    body: type  # of the messages that go down
    reply_type: type  # of the messages that come up; a client that sends another is out of the round

    @abstractmethod
    def bodies(self, round: int, clients: Sequence[str], received: Received) -> Mapping[str, Body]:
        """The server's message to each client that is still in the round.

        Args:
            round: number of the round.
            clients: those that replied in every exchange so far; after Train, those with an accepted update.
            received: the replies of the exchanges so far, by exchange and client; for Train the names alone, with None.

        Returns:
            Messages of the type ``self.body``, by client's name.
        """

    @abstractmethod
    def reply(self, body: Body, client: str, secret: RoundSecret, randomness: Randomness) -> tuple[Any, RoundSecret]:
        """One client's part of the exchange.

        Args:
            body: the server's message to this client.
            client: the client's name.
            secret: what this client keeps of the round so far; without values before the first exchange.
            randomness: the source of every secret draw.

        Returns:
            The reply, a message of the type ``self.reply_type``, and the secret for the round's later exchanges.
        """


class Guard:
    """A protection of the clients' sums. The base class protects nothing."""

    before: Sequence[Exchange] = ()  # exchanges before Train
    after: Sequence[Exchange] = ()  # exchanges after Train, with the clients of accepted updates
    modulus: int | None = None  # of the integer sums that clients send; None: floats, in the method's code

    def on_client(self, sum: Any, client: str, secret: RoundSecret, randomness: Randomness) -> Any:
        """Protect one client's sum before it leaves the client.

        Args:
            sum: of the type that ``Payload.decoded`` returns, or what the guard before made of such a sum.
            client: the client's name.
            secret: what this client keeps of the round's exchanges.
            randomness: the source of noise and masks.

        Returns:
            A sum of the same type; where there is a ``modulus``, its tensors hold integers from 0 to ``modulus - 1``.
        """
        return sum

    def on_server(self, pooled: Pooled[Any], answered: Sequence[str], received: Received) -> Pooled[Any]:
        """Undo at the server what ``on_client`` added, where the pooled sum allows it.

        Args:
            pooled: of what ``on_client`` gave.
            answered: the clients in the pool, in order.
            received: the replies of all exchanges.

        Returns:
            The pooled sum as the method, or the guard before this one, expects it.
        """
        return pooled


def check_guards(guards: Sequence[Guard], algorithm: AnyAlgorithm) -> None:
    """Refuse guards on payloads that are kept apart: there is no sum to guard.

    Args:
        guards: of the run; none at all fits every method.
        algorithm: the run's method.

    Raises:
        UserError: guards are given and the method's pooling is EACH.
    """
    if guards and algorithm.pooling is Pooling.EACH:
        raise UserError(
            f"{type(guards[0]).__name__}: the payloads of {algorithm.name} are kept apart and never added up, so no "
            f"guard can act on their sum; choose settings with which they are averaged"
        )


def os_randomness(count: int) -> bytes:
    """The source of a guard's randomness outside tests.

    Args:
        count: bytes to draw.

    Returns:
        ``count`` bytes of the operating system's generator.
    """
    return os.urandom(count)


def exchanges_before(guards: Sequence[Guard]) -> list[Exchange]:
    """What clients and the server exchange before training.

    Args:
        guards: of the run, in order.

    Returns:
        Every exchange before Train, in the guards' order.
    """
    return [exchange for guard in guards for exchange in guard.before]


def exchanges_after(guards: Sequence[Guard]) -> list[Exchange]:
    """What clients and the server exchange after training.

    Args:
        guards: of the run, in order.

    Returns:
        Every exchange after Train, of the last guard first.
    """
    return [exchange for guard in reversed(guards) for exchange in guard.after]


def exchange_for(guards: Sequence[Guard], body: Body) -> Exchange | None:
    """The exchange that a received body belongs to.

    Args:
        guards: of the run, in order.
        body: a message from the server.

    Returns:
        The first exchange with bodies of exactly this type; None where no guard declares one.
    """
    for exchange in [*exchanges_before(guards), *exchanges_after(guards)]:
        if type(body) is exchange.body:
            return exchange
    return None
