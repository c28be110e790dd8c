"""Flower as a transport: sends messages to approved sites by name, and yields replies as they come, until a deadline.

    exchange(messages, deadline): which sites are connected? -> push each message to its site's node -> poll for replies
                                  a site that connects during the exchange is sent its message then
                                  a reply that is not the site's -> push the same message once more, as a new one of
                                  Flower's, which takes one reply to each
                                  no reply by the deadline -> a Received without content

A message of ours is one bytes value in a ConfigRecord of a Flower message. Flower's averaging, sampling and strategies
are not used. Flower's grid waits for nodes without a limit and polls every three seconds, so this module has its own
loop.

Each site's reply is asked for and read apart on its own (``Inbox``): whatever it is made of becomes one Received
without content. A reply that was announced and does not come holds up no other.

With node keys, a node's name is the name under which the server registered the key, and never what the node claims.
In insecure mode there are no keys: the server asks nodes for their names.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import Message, MessageType, RecordDict

from fedferret.core.text import shortened
from fedferret.engines.flower_inbox import Inbox, Unwatched, Watch
from fedferret.engines.flower_link import PATIENCE, Link, LinkError
from fedferret.engines.flower_records import framed_bytes, records_of
from fedferret.engines.flower_reply import Reply
from fedferret.engines.transport import Received

SENDINGS = 3  # of one message in one exchange: a site that reconnects may still reply; one that crashes does not
GRACE = 10.0  # seconds for which a message outlives its deadline: a reply that is there then is still handed out
PART = "announced a reply and did not send all of it before the deadline"
REPEATS = 20  # of a message to which a stranger replied; each costs as much as the message
_LONGEST_NAME = 200  # bytes of a site's name that are looked at


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
        link: Link,
        nodes: Callable[[float], Mapping[str, int]],
        record: Callable[[Traffic], None] = lambda traffic: None,
        poll: float = 0.2,
        watch: Watch | None = None,
    ) -> None:
        """Create a transport.

        Args:
            link: to the SuperLink.
            nodes: returns the node id of each approved site that is connected now; may take so many seconds.
            record: called with every site's traffic in an exchange.
            poll: seconds between two polls for replies; a poll costs the server about 2 ms a site on loopback.
            watch: told which site's reply is being read.
        """
        self._link, self._nodes, self._record, self._poll = link, nodes, record, poll
        self._watch = watch or Unwatched()
        self.workers: Sequence[str] = ()  # every client is a site

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        """Send each message, and yield replies as they come; see ``Transport.exchange``.

        Args:
            messages: bytes by site.
            deadline: seconds.
        """
        exchange = _Exchange(self._link, messages, time.monotonic() + deadline, self._watch)
        while exchange.open:
            if exchange.idle():
                exchange.send(self._nodes(max(0.0, exchange.left())))
            for traffic, received in exchange.receive():
                self._record(traffic)
                yield replace(received, again=partial(exchange.again, received.site))
                self._watch.reading("")
            if exchange.open:
                time.sleep(min(self._poll, max(0.0, exchange.left())))

    def close(self) -> None:
        """Do nothing: the caller closes the grid."""


class _Exchange:
    """The messages of one exchange, and the state of each."""

    def __init__(self, link: Link, messages: Mapping[str, bytes], end: float, watch: Watch) -> None:
        self._messages, self._end = messages, end
        self._inbox = Inbox(link, watch)
        self.open = set(messages)  # sites without a Received so far
        self._left_out = {site: reason for site in messages if (reason := watch.unread(site))}
        self._sent = dict.fromkeys(messages, 0)
        self._payload, self._framed = dict.fromkeys(messages, 0), dict.fromkeys(messages, 0)  # bytes, all sendings
        self._missing = dict.fromkeys(messages, "not connected") | self._left_out  # why a site has no message now
        self._repeats = dict.fromkeys(messages, 0)
        self._replied: set[str] = set()  # sites for which something came

    def left(self) -> float:
        """Seconds to the deadline."""
        return self._end - time.monotonic()

    def idle(self) -> set[str]:
        """Sites with no message and no Received: not connected, or lost."""
        return self.open - set(self._inbox.waiting().values()) - self._left_out.keys()

    def send(self, nodes: Mapping[str, int]) -> None:
        """Push the messages of the idle sites that are connected."""
        for site in sorted(self.idle() & nodes.keys()):
            if self._sent[site] < SENDINGS and self.left() > 0:
                content = self._messages[site]
                message = train_message(content, nodes[site], self.left() + GRACE)
                self._sent[site] += 1
                self._payload[site] += len(content)
                self._framed[site] += framed_bytes(message)
                if not self._inbox.send(message, site, self.left()):
                    self._missing[site] = "the SuperLink did not accept its message"

    def again(self, site: str, reason: str) -> bool:
        """Send to a site once more: the reply was another's. Returns False where it had its repetitions."""
        if site in self.open or site not in self._replied or self._repeats[site] >= REPEATS or self.left() <= 0:
            return False
        self.open.add(site)
        self._repeats[site] += 1
        self._sent[site] = self._payload[site] = self._framed[site] = 0
        self._missing[site] = reason
        return True

    def receive(self) -> Iterator[tuple[Traffic, Received]]:
        """What came since the last poll; once nothing more can come, every site that is still open."""
        for site in sorted(self._left_out.keys() & self.open):
            yield self._close(site, Reply(None, self._left_out[site]))
        over = self.left() <= 0  # a reply that is there by now is counted all the same
        waiting = self._inbox.waiting()
        for identifier, site in waiting.items():
            reply = self._inbox.look(identifier, self.left())
            if reply and reply.lost:
                self._missing[site] = reply.reason  # the site may be back before the others are done
                self._replied.add(site)
                if self._sent[site] == SENDINGS:  # whoever asks decides whether these errors were the site's
                    yield self._close(site, reply)
            elif reply:
                self._replied.add(site)
                yield self._close(site, reply)
        for identifier, site in self._inbox.waiting().items() if over else ():
            announced = self._inbox.forget(identifier, self.left())
            yield self._close(site, Reply(None, PART if announced else "no reply before the deadline"))
        if over or not waiting:
            for site in sorted(self.open):
                yield self._close(site, Reply(None, self._missing[site]))

    def _close(self, site: str, reply: Reply) -> tuple[Traffic, Received]:
        self.open.remove(site)
        down, up = (self._payload[site], self._framed[site]), (len(reply.content or b""), reply.size)
        return Traffic(site, *down, *up, reply.reason), Received(site, reply.content, reply.reason)


class Roster:
    """The node id of each approved site that is connected."""

    def __init__(self, link: Link, approved: Iterable[str], asks: bool = False) -> None:
        """Create a roster.

        Args:
            link: to the SuperLink.
            approved: names of the run's sites.
            asks: whether nodes without a registered name are asked for it, and believed: only in insecure mode.
        """
        self._link, self._approved, self._asks = link, frozenset(approved), asks
        self._inbox = Inbox(link)
        self._names: dict[int, str] = {}  # of the nodes that replied with the name of an approved site
        self._replies: Counter[int] = Counter()  # by node: of one that has no such name
        self._unlisted: dict[int, str] = {}  # what such a node is told when it is asked again

    def approve(self, names: Iterable[str]) -> None:
        """Replace the names of the run's sites."""
        if self._approved != (approved := frozenset(names)):
            self._approved = approved
            self._replies.clear()  # a node may have replied with a name that was none then
            self._unlisted.clear()

    def __call__(self, seconds: float = PATIENCE) -> dict[str, int]:
        """Return the node ids; of two nodes with one name, which a restart leaves, the newer.

        Args:
            seconds: that this may take.
        """
        end = time.monotonic() + seconds
        try:
            nodes = sorted(self._link.nodes(seconds), key=lambda node: node.registered_at)
        except LinkError:
            return {}  # asked again at the next poll
        if self._asks:
            self._ask([node.node_id for node in nodes if not node.name], end)
        named = ((node.name or self._names.get(node.node_id, ""), node.node_id) for node in nodes)
        return {name: node for name, node in named if name in self._approved}

    def _ask(self, nodes: Sequence[int], end: float) -> None:
        asked = set(self._inbox.waiting().values())
        for node in nodes:
            known = node in self._names or str(node) in asked or self._replies[node] == SENDINGS
            if not known and time.monotonic() < end:
                # a node that was asked before has no name of this run: the question says so
                content = records_of(self._unlisted[node].encode()) if node in self._unlisted else RecordDict()
                question = Message(content, node, MessageType.QUERY, ttl=60.0)
                self._inbox.send(question, str(node), end - time.monotonic())
        for identifier, number in self._inbox.waiting().items():
            reply = self._inbox.look(identifier, end - time.monotonic())
            if reply and not reply.lost:
                self._replies[int(number)] += 1
                name = (reply.content or b"")[:_LONGEST_NAME].decode(errors="replace")
                if name in self._approved:
                    self._names[int(number)] = name
                else:
                    self._unlisted[int(number)] = f"{shortened(name)} is not on this run's list of sites"


def train_message(content: bytes, node: int, seconds: float) -> Message:
    """Return a message to a node that expires, so that a site that is back later does no useless work.

    Args:
        content: of our message, bytes.
        node: id.
        seconds: until expiry.
    """
    return Message(records_of(content), node, MessageType.TRAIN, ttl=seconds)
