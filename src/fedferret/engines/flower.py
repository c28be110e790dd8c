"""Flower as a transport: sends messages to approved sites by name, and yields replies as they come, until a deadline.

    exchange(messages, deadline): which sites are connected? -> push each message to its site's node -> poll for replies
                                  a site that connects during the exchange is sent its message then
                                  a reply that is not the site's -> push the same message once more, as a new one of
                                  Flower's, which takes one reply to each
                                  no reply by the deadline -> a Received without content

A message of ours is one bytes value in a ConfigRecord of a Flower message. Flower's averaging, sampling and strategies
are not used. Flower's grid waits for nodes without a limit and polls every three seconds, so this module has its own
loop. Grid and messages are as in flwr 1.41 (`flwr/superlink/grid/http_grid.py`).

With node keys, a node's name is the name under which the server registered the key, and never what the node claims.
In insecure mode there are no keys: the server asks nodes for their names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedferret.engines.transport import Received

RECORD = "message"  # name of the record, and of the value in it
SENDINGS = 3  # of one message in one exchange: a site that reconnects may still reply; one that crashes does not
REPEATS = 20  # of a message to which a stranger replied; each costs as much as the message

_LOST = frozenset(  # errors of the connection or of the site's processes: sending again may succeed
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)


@dataclass(frozen=True)
class Traffic:
    """One site's bytes in one exchange: of our messages, and of the same with Flower's records and headers."""

    site: str
    payload_down: int = 0
    framed_down: int = 0
    payload_up: int = 0
    framed_up: int = 0
    reason: str = ""  # why there is no reply


class FlowerTransport:
    """Exchanges messages with the approved sites of one run through a Flower grid."""

    def __init__(
        self,
        grid: Grid,
        nodes: Callable[[], Mapping[str, int]],
        record: Callable[[Traffic], None] = lambda traffic: None,
        poll: float = 0.2,
    ) -> None:
        """Create a transport; the caller closes the grid.

        Args:
            grid: of the Flower run.
            nodes: returns the node id of each approved site that is connected now.
            record: called with every site's traffic in an exchange.
            poll: seconds between two polls for replies; a poll costs the server about 2 ms on loopback.
        """
        self._grid, self._nodes, self._record, self._poll = grid, nodes, record, poll
        self.workers: Sequence[str] = ()  # every client is a site

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        """Send each message, and yield replies as they come; see ``Transport.exchange``.

        Args:
            messages: bytes by site.
            deadline: seconds.
        """
        exchange = _Exchange(self._grid, messages, time.monotonic() + deadline)
        while exchange.open:
            if exchange.idle():
                exchange.send(self._nodes())
            for traffic, received in exchange.receive():
                self._record(traffic)
                yield replace(received, again=partial(exchange.again, received.site)) if traffic.framed_up else received
            if exchange.open:
                time.sleep(min(self._poll, max(0.0, exchange.left())))

    def close(self) -> None:
        """Do nothing: the caller closes the grid."""


class _Exchange:
    """The messages of one exchange, and the state of each."""

    def __init__(self, grid: Grid, messages: Mapping[str, bytes], end: float) -> None:
        self._grid, self._messages, self._end = grid, messages, end
        self.open = set(messages)  # sites without a Received so far
        self._waiting: dict[str, str] = {}  # message id -> site that it was sent to
        self._sent = dict.fromkeys(messages, 0)
        self._payload, self._framed = dict.fromkeys(messages, 0), dict.fromkeys(messages, 0)  # bytes, all sendings
        self._missing = dict.fromkeys(messages, "not connected")  # why a site has no message now
        self._repeats = dict.fromkeys(messages, 0)

    def left(self) -> float:
        """Seconds to the deadline."""
        return self._end - time.monotonic()

    def idle(self) -> set[str]:
        """Sites with no message and no Received: not connected, or lost."""
        return self.open - set(self._waiting.values())

    def send(self, nodes: Mapping[str, int]) -> None:
        """Push the messages of the idle sites that are connected."""
        for site in sorted(self.idle() & nodes.keys()):
            if self._sent[site] < SENDINGS and self.left() > 0:
                content = self._messages[site]
                message = train_message(content, nodes[site], self.left())
                self._sent[site] += 1
                self._payload[site] += len(content)
                self._framed[site] += framed_bytes(message)
                identifier = next(iter(self._grid.push_messages([message])), "")
                if identifier:
                    self._waiting[identifier] = site
                else:
                    self._missing[site] = "the SuperLink did not accept its message"

    def again(self, site: str, reason: str) -> bool:
        """Send to a site once more: the reply was another's. Returns False where it had its repetitions."""
        if site in self.open or self._repeats[site] >= REPEATS or self.left() <= 0:
            return False
        self.open.add(site)
        self._repeats[site] += 1
        self._sent[site] = self._payload[site] = self._framed[site] = 0
        self._missing[site] = reason
        return True

    def receive(self) -> Iterator[tuple[Traffic, Received]]:
        """What came since the last poll; once nothing more can come, every site that is still open."""
        if not self._waiting or self.left() <= 0:
            for site in sorted(self.open):
                silent = site in self._waiting.values()
                yield self._close(site, None, "no reply before the deadline" if silent else self._missing[site])
            return
        for reply in self._grid.pull_messages(list(self._waiting)):
            site = self._waiting.pop(reply.metadata.reply_to_message_id, "")
            if not site:
                continue  # a reply to no message of this exchange
            content, reason = content_of(reply)
            if reply.has_error() and reply.error.code in _LOST:
                self._missing[site] = reason  # the site may be back before the others are done
            else:
                yield self._close(site, content, reason, framed_bytes(reply))

    def _close(self, site: str, content: bytes | None, reason: str, size: int = 0) -> tuple[Traffic, Received]:
        self.open.remove(site)
        down = self._payload[site], self._framed[site]
        return Traffic(site, *down, len(content or b""), size, reason), Received(site, content, reason)


class Roster:
    """The node id of each approved site that is connected."""

    def __init__(self, grid: Grid, approved: Iterable[str], asks: bool = False) -> None:
        """Create a roster.

        Args:
            grid: of the Flower run.
            approved: names of the run's sites.
            asks: whether nodes without a registered name are asked for it, and believed: only in insecure mode.
        """
        self._grid, self._approved, self._asks = grid, frozenset(approved), asks
        self._names: dict[int, str] = {}  # of the nodes that replied
        self._asked: dict[str, int] = {}  # message id -> node that has not replied

    def __call__(self) -> dict[str, int]:
        """Return the node ids; of two nodes with one name, which a restart leaves, the newer."""
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
    """Return a message to a node that expires, so that a site that is back later does no useless work.

    Args:
        content: of our message, bytes.
        node: id.
        seconds: until expiry.
    """
    return Message(records_of(content), node, MessageType.TRAIN, ttl=seconds)


def records_of(content: bytes) -> RecordDict:
    """Return Flower's records for the bytes of a message of ours."""
    return RecordDict({RECORD: ConfigRecord({RECORD: content})})


def content_of(message: Message) -> tuple[bytes | None, str]:
    """Return the content of a Flower message.

    Returns:
        The bytes and "", or None and the reason.
    """
    if message.has_error():
        code = message.error.code
        return None, "connection lost" if code in _LOST else str(message.error.reason or f"Flower's error {code}")
    record: Any = message.content.get(RECORD)
    content = record.get(RECORD) if isinstance(record, ConfigRecord) else None
    return (content, "") if isinstance(content, bytes) else (None, "the reply holds no message")


def framed_bytes(message: Message) -> int:
    """Return the bytes of a message as Flower stores and sends it, with records, metadata and headers."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())
