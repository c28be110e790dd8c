"""The calls to Flower's SuperLink that an exchange makes, one message and one object at a time, each bounded in time.

Flower's grid pulls all replies in one call and waits for each object of each for up to two hours, so one site could
hold up or lose the replies of all. Here a call is about one site's message, no call waits for a site, and a call takes
about as long as its caller has left. Requests and responses are as in flwr 1.41 (`superlink/grid/http_grid.py`).

What a call raises says what ended:

    LinkError                    this call: the SuperLink refused it, or the caller's time was over
    httpx.TransportError, ...    the SuperLink or the Flower run: `serve` starts both again
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import GetNodesRequest, PullAppMessagesRequest
from flwr.supercore.run import RunNotRunningException
from flwr.superlink.grid import HttpGrid

PATIENCE = 30.0  # seconds for a response of the SuperLink; it is on loopback
RECONNECTS = 15.0  # seconds for which a call to a SuperLink that is gone is tried again
_LEAST = 1.0  # seconds for any call: also the last one before a deadline is to succeed

T = TypeVar("T")


class LinkError(RuntimeError):
    """One call that failed, for a reason that says nothing about the next one."""


class Unavailable(LinkError):
    """An object that was announced and is not there yet."""


@dataclass(frozen=True)
class Announced:
    """A reply that the SuperLink has, or of which it will have the objects."""

    root: str  # id of its Message object
    reply_to: str  # id of the message that it replies to; "": none of ours


class Link:
    """The calls of one Flower run."""

    def __init__(self, grid: HttpGrid) -> None:
        """Create a link; the caller closes the grid, and does not use its client while a call runs.

        Args:
            grid: of the Flower run.
        """
        self._grid = grid

    def nodes(self, seconds: float) -> Sequence[NodeInfo]:
        """Return the connected nodes."""
        return list(self._call(lambda client: client.GetNodes(GetNodesRequest()).nodes, seconds))

    def push(self, message: Message, seconds: float) -> str:
        """Send a message; return its id, "" if the SuperLink does not take it."""
        return self._call(lambda client: next(iter(self._grid.push_messages([message])), None), seconds) or ""

    def announced(self, message: str, seconds: float) -> Sequence[Announced]:
        """Return the replies to a message of this id that are new, and what else the SuperLink has for this process."""
        request = PullAppMessagesRequest(message_ids=[message])
        found = self._call(lambda client: client.PullMessages(request), seconds).messages_list
        return [Announced(each.metadata.message_id, each.metadata.reply_to_message_id) for each in found]

    def fetch(self, identifier: str, seconds: float) -> bytes:
        """Return the content of an object.

        Raises:
            Unavailable: it is not there yet.
            LinkError: there will be none.
        """
        request = PullObjectRequest(node=self._grid.node, run_id=self._grid.run.run_id, object_id=identifier)
        response = self._call(lambda client: client.PullObject(request), seconds)
        if not response.object_found:
            raise LinkError("an object of its reply is missing")
        if not response.object_available:
            raise Unavailable("an object of its reply was announced and has not come")
        return bytes(response.object_content)

    def discard(self, root: str, seconds: float) -> None:
        """Have the SuperLink delete a reply's objects."""
        run = self._grid.run.run_id
        request = ConfirmMessageReceivedRequest(node=self._grid.node, run_id=run, message_object_id=root)
        self._call(lambda client: client.ConfirmMessageReceived(request), seconds)

    def _call(self, function: Callable[[Any], T], seconds: float) -> T:
        """Call with a share of ``seconds`` for the response and one for trying again."""
        client = self._grid._runtime_client
        share = max(_LEAST, seconds / 2)
        client._client.timeout = min(PATIENCE, share)
        self._grid._retry_invoker.max_time = min(RECONNECTS, share)
        try:
            return function(client)
        except httpx.TimeoutException:
            if share >= PATIENCE:
                raise
            raise LinkError("the SuperLink did not respond before the deadline") from None
        except (httpx.TransportError, RunNotRunningException):
            raise
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                raise
            raise LinkError(f"the SuperLink refused a call about it (status {error.response.status_code})") from None
        except Exception as error:  # of Flower, about this message
            raise LinkError(f"the SuperLink's response could not be read ({type(error).__name__})") from None
