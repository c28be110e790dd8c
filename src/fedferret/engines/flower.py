"""Flower as a transport: letters to approved sites by name, replies as they come, a deadline on every wait.

    exchange(letters, deadline):   who is connected? -> push each letter to its site's node -> poll for replies
                                   a site that connects while others are still at work gets its letter then
                                   what is open after the deadline -> a Delivery without content

A letter is one value of a ConfigRecord, so it crosses as the bytes that it is. Nothing of Flower's own averaging,
sampling or strategies is used; its grid waits for nodes without a limit and polls every three seconds, so the loop
is ours. Grid and messages are as in flwr 1.41 (`flwr/superlink/grid/http_grid.py`).

Where sites prove themselves by keys, a node's name is the one that the server registered its key under, and never
what the site says of itself. In insecure mode there are no keys: nodes are asked for their names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedferret.engines.transport import Received

RECORD = "letter"  # the record, and the value in it
SENDINGS = 3  # of one letter in one exchange: a site that is lost and back may still answer; one that crashes does not

_LOST = frozenset(  # errors of the connection or of the site's processes: another sending may fare better
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)


@dataclass(frozen=True)
class Traffic:
    """One site's bytes in one exchange: of our messages alone, and with Flower's records and headers around them."""

    site: str
    payload_down: int = 0
    framed_down: int = 0
    payload_up: int = 0
    framed_up: int = 0
    reason: str = ""  # why nothing came up


class FlowerTransport:
    """Exchanges letters with the approved sites of one run through a Flower grid."""

    def __init__(
        self,
        grid: Grid,
        nodes: Callable[[], Mapping[str, int]],
        record: Callable[[Traffic], None] = lambda traffic: None,
        poll: float = 0.2,
    ) -> None:
        """``nodes`` says which approved sites are connected now, and as which node; ``record`` hears of every letter.

        ``poll``: seconds between two looks for replies; a look costs the server about 2 ms on loopback.
        """
        self._grid, self._nodes, self._record, self._poll = grid, nodes, record, poll
        self.workers: Sequence[str] = ()  # every client is a site

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        """Deliver each letter, yield what comes back as it comes; see Transport."""
        exchange = _Exchange(self._grid, messages, time.monotonic() + deadline)
        while exchange.open:
            if exchange.idle():
                exchange.send(self._nodes())
            for traffic, received in exchange.receive():
                self._record(traffic)
                yield received
            if exchange.open:
                time.sleep(min(self._poll, max(0.0, exchange.left())))

    def close(self) -> None:
        """Nothing to end: the grid belongs to whoever made it."""


class _Exchange:
    """The letters of one call, and what has become of each."""

    def __init__(self, grid: Grid, messages: Mapping[str, bytes], end: float) -> None:
        self._grid, self._letters, self._end = grid, messages, end
        self.open = set(messages)  # sites that no Delivery has been made for
        self._waiting: dict[str, str] = {}  # message id -> site that has it
        self._sent = dict.fromkeys(messages, 0)
        self._payload, self._framed = dict.fromkeys(messages, 0), dict.fromkeys(messages, 0)  # bytes, all sendings
        self._missing = dict.fromkeys(messages, "not connected")  # why a site has no letter now

    def left(self) -> float:
        """Seconds to the deadline."""
        return self._end - time.monotonic()

    def idle(self) -> set[str]:
        """Those who have no letter and no Delivery: not connected, or lost."""
        return self.open - set(self._waiting.values())

    def send(self, nodes: Mapping[str, int]) -> None:
        """Push the letters of those who have none and are connected."""
        for site in sorted(self.idle() & nodes.keys()):
            if self._sent[site] < SENDINGS and self.left() > 0:
                content = self._letters[site]
                message = train_message(content, nodes[site], self.left())
                self._sent[site] += 1
                self._payload[site] += len(content)
                self._framed[site] += framed_bytes(message)
                identifier = next(iter(self._grid.push_messages([message])), "")
                if identifier:
                    self._waiting[identifier] = site
                else:
                    self._missing[site] = "the server could not take the letter for it"

    def receive(self) -> Iterator[tuple[Traffic, Received]]:
        """What has come since the last look, and all that is open when nothing more can come."""
        if not self._waiting or self.left() <= 0:
            for site in sorted(self.open):
                silent = site in self._waiting.values()
                yield self._close(site, None, "no answer before the deadline" if silent else self._missing[site])
            return
        for reply in self._grid.pull_messages(list(self._waiting)):
            site = self._waiting.pop(reply.metadata.reply_to_message_id, "")
            if not site:
                continue  # nothing that was asked for
            content, reason = content_of(reply)
            if reply.has_error() and reply.error.code in _LOST:
                self._missing[site] = reason  # it may be back before the others are done
            else:
                yield self._close(site, content, reason, framed_bytes(reply))

    def _close(self, site: str, content: bytes | None, reason: str, size: int = 0) -> tuple[Traffic, Received]:
        self.open.remove(site)
        down = self._payload[site], self._framed[site]
        return Traffic(site, *down, len(content or b""), size, reason), Received(site, content, reason)


class Roster:
    """Which approved site is connected as which node."""

    def __init__(self, grid: Grid, approved: Iterable[str], asks: bool = False) -> None:
        """``asks``: nodes without a registered name are asked for it, and believed. For insecure mode alone."""
        self._grid, self._approved, self._asks = grid, frozenset(approved), asks
        self._names: dict[int, str] = {}  # of the nodes that answered
        self._asked: dict[str, int] = {}  # message id -> node that has not

    def __call__(self) -> dict[str, int]:
        """The nodes of those connected now; of two with one name, which a restart leaves, the newer."""
        nodes = sorted(self._grid.get_nodes(), key=lambda node: node.registered_at)
        if self._asks:
            self._ask(node.node_id for node in nodes if not node.name)
        named = ((node.name or self._names.get(node.node_id, ""), node.node_id) for node in nodes)
        return {name: node for name, node in named if name in self._approved}

    def _ask(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            if node not in self._names and node not in self._asked.values():
                question = Message(RecordDict(), node, MessageType.QUERY, ttl=60.0)
                self._asked.update(dict.fromkeys(self._grid.push_messages([question]), node))
        for reply in self._grid.pull_messages(list(self._asked)) if self._asked else []:
            node = self._asked.pop(reply.metadata.reply_to_message_id, 0)
            content, _ = content_of(reply)
            if node and content is not None:
                self._names[node] = content.decode(errors="replace")


def train_message(content: bytes, node: int, seconds: float) -> Message:
    """A message to a node that is void after so many seconds: a site that comes back later does no work in vain."""
    return Message(records_of(content), node, MessageType.TRAIN, ttl=seconds)


def records_of(content: bytes) -> RecordDict:
    """The records that carry ``content``."""
    return RecordDict({RECORD: ConfigRecord({RECORD: content})})


def content_of(message: Message) -> tuple[bytes | None, str]:
    """What a message carries, or None and why it carries nothing."""
    if message.has_error():
        code = message.error.code
        return None, "connection lost" if code in _LOST else str(message.error.reason or f"Flower's error {code}")
    record: Any = message.content.get(RECORD)
    content = record.get(RECORD) if isinstance(record, ConfigRecord) else None
    return (content, "") if isinstance(content, bytes) else (None, "an answer came that carries no letter")


def framed_bytes(message: Message) -> int:
    """Bytes of a message as Flower stores and sends it: the letter, its records, metadata and their headers."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())
