"""The narrow waist between the round loop and the machines: sealed letters out, sealed letters back, a deadline.

    Remote (server half)  --Order-->  Transport  --bytes-->  Trainer (site half)
                          <-Receipt-             <-bytes--

A transport knows no method, no round and no model: it delivers bytes to sites by name. What the bytes are is said by
the two messages below, which only the codec reads and writes: the wire carries data, never code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

from fedferret.core.messages import message


@dataclass(frozen=True)
class Received:
    """What came back from a site, or why nothing did."""

    site: str
    content: bytes | None  # None: nothing came
    reason: str = ""  # why not, in words for an operator


class Transport(Protocol):
    """How letters reach sites."""

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        """Deliver each letter to the site it is addressed to; yield what comes back, as it comes.

        After ``deadline`` seconds yields a Delivery without content for every site that is still silent. Never waits
        longer, never raises for a site. ``messages`` may make a letter anew each time that it is asked for.
        """
        ...

    def close(self) -> None:
        """End whatever the transport started."""
        ...


@message
class Request:
    """Server to site: come up to date, then do this client's work of this round."""

    run: str  # SHA-256 of the recipe's identity
    recipe: str  # that recipe as TOML; "" where the site has it
    base: str  # SHA-256 of the weights that the run began from
    client: str  # whose work; "": nobody's, only come up to date
    round: int
    ticket: str  # new for every sending: a reply that names another is late, or a second one
    version: int  # of the log that this order brings the site to
    fingerprint: str  # of the server's public state at that version
    since: int  # the version that the snapshot or the records start after
    snapshot: bytes  # b"": none
    records: tuple[bytes, ...]
    counted: int  # last round in which an answer of this client was counted; its private state is that round's. 0: none
    rebuild: bool  # the site's replica was found to differ: forget it, and start from the base
    private: bytes  # a simulated client's private state; a site keeps its own, and this is b""


@message
class Response:
    """Site to server: what became of an order."""

    run: str
    round: int
    ticket: str
    client: str
    outcome: str  # "ok", "missing" or "refused"
    version: int  # of the replica now; -1: there is none
    fingerprint: str  # of the replica now; "": there is none
    process: int  # id of the trainer's process
    content: bytes  # of an answer: an Envelope, encoded
    reason: str  # of "missing": "recipe", "records" or "replica"; of "refused": one line
    private: bytes  # a simulated client's new private state; what a site keeps is never here


def check_fields(received: Request | Response) -> None:
    """Raise ValueError where a received letter holds something else than its fields' types: the codec checks none."""
    for field in fields(received):
        expected, _, item = str(field.type).partition("[")
        value = getattr(received, field.name)
        if type(value).__name__ != expected or (item and not all(isinstance(each, bytes) for each in value)):
            raise ValueError(f"{field.name} of a received {type(received).__name__} is no {field.type}")
