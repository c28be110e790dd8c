"""Messages that wait for their replies, each looked for and read apart on its own.

    look(message)  ->  nothing announced, or not all of it there    None: look again
                       malformed, or refused by the SuperLink       a Reply without content, which says so
                       whole                                        a Reply

Nothing that a reply is made of raises, and none waits for another. A ``Watch`` is told before a reply is read, so that
a process that ends over one is known to have ended over this site.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message

from fedferret.engines.flower_link import Announced, Link, LinkError, Unavailable
from fedferret.engines.flower_reply import Malformed, Reply, read_reply

REFUSALS = 5  # calls about one message that fail before it is given up: a database may be busy for a while


class Watch(Protocol):
    """Told which site's reply is being read."""

    def unread(self, site: str) -> str:
        """Return why this site is left out of an exchange that begins; "" if it is not."""
        ...

    def reading(self, site: str, message: str = "") -> None:
        """Note that this site's reply is being read from now on.

        Args:
            site: name; "": none is being read.
            message: id of the reply; "": that of the site's last one.
        """
        ...


class Unwatched:
    """Notes nothing."""

    def unread(self, site: str) -> str:
        """Return ""."""
        return ""

    def reading(self, site: str, message: str = "") -> None:
        """Do nothing."""


@dataclass
class _Sent:
    """A message on its way."""

    site: str
    root: str = ""  # id of the reply, once it is announced
    refusals: int = 0


class Inbox:
    """The messages of one process that wait for replies."""

    def __init__(self, link: Link, watch: Watch | None = None) -> None:
        """Create an empty inbox.

        Args:
            link: to the SuperLink.
            watch: told which site's reply is being read.
        """
        self._link, self._watch = link, watch or Unwatched()
        self._waiting: dict[str, _Sent] = {}  # by message id

    def send(self, message: Message, site: str, seconds: float) -> bool:
        """Send a message; return whether the SuperLink took it.

        Args:
            message: to a node.
            site: name to give to the reply.
            seconds: that this may take.
        """
        identifier = ""
        with suppress(LinkError):
            identifier = self._link.push(message, seconds)
        if identifier:
            self._waiting[identifier] = _Sent(site)
        return bool(identifier)

    def waiting(self) -> dict[str, str]:
        """Return the sites that were sent a message and have not replied, by the message's id."""
        return {identifier: sent.site for identifier, sent in self._waiting.items()}

    def look(self, identifier: str, seconds: float) -> Reply | None:
        """Return the reply to a message, which then waits no more; None if there is none yet.

        Args:
            identifier: of the message.
            seconds: that each call may take.
        """
        sent = self._waiting[identifier]
        try:
            if not sent.root:
                for found in self._link.announced(identifier, seconds):
                    self._announce(found, seconds)
            if not sent.root:
                return None
            self._watch.reading(sent.site, sent.root)
            reply = read_reply(sent.root, lambda each: self._link.fetch(each, seconds))
        except Unavailable:
            self._watch.reading("")
            return None
        except Malformed as error:
            reply = Reply(None, f"sent a malformed reply: {error}")
        except LinkError as error:
            self._watch.reading("")
            sent.refusals += 1
            if sent.refusals < REFUSALS:
                return None
            reply = Reply(None, str(error))
        if reply.content is None:
            self._watch.reading("")  # otherwise the caller reads on
        self.forget(identifier, seconds)
        return reply

    def forget(self, identifier: str, seconds: float) -> bool:
        """Wait for a reply no more, and have its objects deleted; return whether it was announced."""
        root = self._waiting.pop(identifier).root
        self._discard(root, seconds)
        return bool(root)

    def _announce(self, found: Announced, seconds: float) -> None:
        asked = self._waiting.get(found.reply_to)
        if asked and not asked.root:
            asked.root = found.root
        else:  # a reply to no message of this process
            self._discard(found.root, seconds)

    def _discard(self, root: str, seconds: float) -> None:
        if root:
            with suppress(LinkError):
                self._link.discard(root, seconds)
