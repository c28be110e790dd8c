"""The narrow waist between the round loop and the machines: sealed messages out, sealed messages back, a deadline.

    Remote (server half)  --Request-->   Transport  --bytes-->  Trainer (site half)
                          <--Response--             <--bytes--

A transport knows no method, no round and no model: it delivers bytes to sites by name. The two messages below say what
the bytes are; only the codec reads and writes them: the wire carries data, never code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from fedferret.core.messages import message


@dataclass(frozen=True)
class Received:
    """What came back from a site, or why nothing did."""

    site: str
    content: bytes | None  # None: nothing came
    reason: str = ""  # why not, in words for an operator


class Transport(Protocol):
    """How messages reach sites."""

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        """Deliver each message to the site it is addressed to.

        An exchange never waits longer than the deadline, and never raises for a site.

        Args:
            messages: by site; may make a message anew each time that it is asked for.
            deadline: seconds, after which a Received without content is yielded for every site that is still silent.

        Returns:
            What comes back, as it comes.
        """
        ...

    def close(self) -> None:
        """End whatever the transport started."""
        ...


@message
class Request:
    """Server to site: come up to date, then answer a body for this client."""

    run: str  # SHA-256 of the recipe's identity
    epoch: int  # how often the run was rewound
    round: int
    ticket: str  # new for every sending: a response that names another is late, or a second one
    client: str  # the client to work for; "": none, only come up to date
    recipe: str  # the recipe's identity as TOML; "" where the site has it
    base: str  # SHA-256 of the weights that the run began from
    version: int  # of the log that this request brings the site to
    fingerprint: str  # of the server's public state at that version
    snapshot: bytes  # of the public state at the version that the records follow; b"": none
    records: tuple[bytes, ...]
    counted: int  # last round in which an update of this client was counted; its private state is that round's. 0: none
    rebuild: bool  # the site's replica was found to differ: start again from the base
    private: bytes  # a simulated client's private state; a site keeps its clients', and this is b""
    body: Any  # Train, Score or a guard's; None: only come up to date


@message
class Response:
    """Site to server: what became of a request."""

    run: str
    epoch: int
    round: int
    ticket: str
    client: str
    status: str  # DONE, MISSING or REFUSED
    version: int  # of the replica now; -1: there is none
    fingerprint: str  # of the replica now; "": there is none
    process: int  # id of the trainer's process
    reply: bytes  # of DONE: the reply to the body, encoded
    reason: str  # of MISSING: "recipe", "records" or "replica"; of REFUSED, and of DONE where a state is lost: one line
    private: bytes  # a simulated client's new private state; what a site keeps is never here


DONE, MISSING, REFUSED = "done", "missing", "refused"


def check_fields(received: Request | Response) -> None:
    """Refuse a received message that holds something else than the types of its fields.

    Args:
        received: as decoded; decoding checks no types of fields.

    Raises:
        ValueError: a field holds a value of another type, or ``records`` holds anything but bytes.
    """
    for field in fields(received):
        expected, _, item = str(field.type).partition("[")
        value = getattr(received, field.name)
        if expected == "Any":
            continue
        if type(value).__name__ != expected or (item and not all(isinstance(each, bytes) for each in value)):
            raise ValueError(f"{field.name} of a received {type(received).__name__} is no {field.type}")
