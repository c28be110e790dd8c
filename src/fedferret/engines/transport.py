"""The narrow waist between the round loop and the machines: sealed messages out, sealed messages back, a deadline.

    Remote (server half)  --Request-->   Seal  --bytes-->  Transport  --bytes-->  Seal  --Request-->   Trainer
                          <--Response--        <--bytes--             <--bytes--        <--Response--  (site half)

A transport knows no method, no round and no model: it delivers bytes to sites by name. The two messages below say what
the bytes are; only the codec reads and writes them: the wire carries data, never code. A seal says who sent them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedferret.core.messages import message


@dataclass(frozen=True)
class Received:
    """What came back from a site, or why nothing did."""

    site: str
    content: bytes | None  # None: nothing came
    reason: str = ""  # why not, in words for an operator
    # has the same message sent again while the exchange lasts, because what came is not the site's reply; called with
    # the reason, and returns whether the transport does so
    again: Callable[[str], bool] = field(default=lambda reason: False, compare=False, repr=False)


class Seal(Protocol):
    """Says of every message who sent it. The bytes inside are one encoded Request or Response."""

    signs: bool  # whether ``open`` refuses what another than the sender made

    def close(self, message: bytes) -> bytes:
        """Seal a message.

        Args:
            message: encoded.

        Returns:
            The message, sealed; equal messages have equal bytes while the key stays.
        """
        ...

    def open(self, sender: str, sealed: bytes) -> bytes:
        """Open a sealed message, or refuse it before anything of it is decoded.

        Args:
            sender: name of the site that must have sealed it; ``SERVER`` at a site.
            sealed: as received.

        Returns:
            The encoded message.

        Raises:
            ValueError: the sender did not seal these bytes for this direction; one line.
        """
        ...


SERVER = "server"


class NoSeal:
    """Messages as they are: in a simulation, where both ends are one program, and with ``--insecure``."""

    signs = False

    def close(self, message: bytes) -> bytes:
        """Seal a message with nothing.

        Args:
            message: encoded.

        Returns:
            ``message``.
        """
        return message

    def open(self, sender: str, sealed: bytes) -> bytes:
        """Open a message that anybody may have sent.

        Args:
            sender: believed to have sent it.
            sealed: as received.

        Returns:
            ``sealed``.
        """
        return sealed


class Messages(Mapping[str, bytes]):
    """Requests by addressee, each encoded when it is asked for: a model's snapshot to many is never held many times."""

    def __init__(self, names: Sequence[str], make: Callable[[str], bytes]) -> None:
        """Encode nothing yet.

        Args:
            names: of the addressees.
            make: encodes the request to one of them.
        """
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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

    run: str  # SHA-256 of the recipe's identity, after a line with the name of the run where sites hold the data
    epoch: int  # 0, or when the run was last rewound; higher after every rewinding
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
    counted_epoch: int  # in which that round was run: copies of the server's folder may each have run it; -1: not known
    rebuild: bool  # the site's replica was found to differ: start again from the base
    private: bytes  # a simulated client's private state; a site keeps its clients', and this is b""
    body: Any  # Train, Score or a guard's; None: only come up to date
    sequence: int  # higher in every request of a server; see ``replay.py``


@message
class Response:
    """Site to server: what became of a request."""

    run: str
    epoch: int
    round: int
    ticket: str  # the request's; SHA-256 of what came where that could not be read as a request
    client: str
    status: str  # DONE, MISSING or REFUSED
    version: int  # of the replica now; -1: there is none
    fingerprint: str  # of the replica now; "": there is none
    process: int  # id of the trainer's process
    reply: bytes  # of DONE: the reply to the body, encoded
    reason: str  # of MISSING: one of PARTS; of REFUSED, and of DONE where a state is lost: one line
    private: bytes  # a simulated client's new private state; what a site keeps is never here
    sequence: int  # the request's


DONE, MISSING, REFUSED = "done", "missing", "refused"
PARTS = ("recipe", "records", "replica")  # what can be missing
