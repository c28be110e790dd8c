"""The messages of a round, between the server and one client: bodies go down, replies come up.

Train   ->  ClientUpdate      the work of the round
Score   ->  ClientScores      the model of this client, scored on the data that the client holds out
others  ->  others            what a guard declares (``core/guard.py``): keys, shares, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedferret.core.messages import message
from fedferret.core.text import plain_line, printable


@message
class Train:
    """Do this client's work of the round."""

    round: int


@message
class Score:
    """Score this client's model on the examples that the client holds out."""

    round: int  # the round after which the model is scored; 0: before training
    batch_size: int


@message
class ClientUpdate:
    """What a client sends for its work."""

    payload: Any  # the method's, or Masked
    num_examples: int  # that the client states to hold
    metrics: dict[str, float]


@message
class ClientScores:
    """What a client sends of its model: sums that add up over clients (``Objective.scores``)."""

    sums: dict[str, float]


@message
class Masked:
    """A sum of integers under a guard's mask; it travels as it is, for no method's code can hold a mask."""

    sum: Any  # of the method's Sum type, its tensors int64, from 0 to modulus - 1
    modulus: int


Body: TypeAlias = Any  # Train, Score, or a message that a guard declares


@dataclass(frozen=True)
class Reply:
    """What came from a client: a reply as it left the wire."""

    client: str
    body: Any
    bytes_up: int


@dataclass(frozen=True)
class Failure:
    """A client that sent nothing of use, and why. Its words are plain text, wherever they came from."""

    client: str
    stage: str  # "local", "wire", "pool", ...
    reason: str  # one line of at most 300 printable characters

    def __post_init__(self) -> None:
        object.__setattr__(self, "client", printable(self.client))  # a client's name is printable from the start
        object.__setattr__(self, "stage", plain_line(self.stage))
        object.__setattr__(self, "reason", plain_line(self.reason))


def bodies_of(body: Body, clients: list[str]) -> Mapping[str, Body]:
    """Address one body to many clients.

    Args:
        body: the message that every client receives.
        clients: the clients' names.

    Returns:
        ``body`` by client's name, in the order of ``clients``.
    """
    return dict.fromkeys(clients, body)
