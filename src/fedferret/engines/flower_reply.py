"""A reply of a site as Flower's SuperLink stores it, read apart without trust.

    Message  ->  RecordDict  ->  ConfigRecord  ->  bytes of our message         each an object, named by its SHA-256
    Message with an error: no other object

An object is "KIND CHILD,CHILD LENGTH", a zero byte and the body. Flower's own reader (`inflate_object_from_contents`)
makes whatever kind an object claims to be and raises whatever goes wrong on the way. This reader expects exactly the
three objects that `flower_records.records_of` makes, checks every length before it parses, and has one exception.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.recorddict_pb2 import ConfigRecord as ConfigRecordProto

from fedferret.core.text import plain_line

RECORD = "message"  # name of the record, and of the value in it

LOST = frozenset(  # errors of the connection or of the site's processes: sending again may succeed
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)

_HEAD = re.compile(rb"([A-Za-z]{1,20}) ((?:[0-9a-f]{64})?) ([0-9]{1,12})")  # at most one child: ours have no more
_LONGEST_HEAD = 200  # bytes
_LONGEST_MESSAGE = 1 << 16  # bytes of a Message's body: metadata and an error's reason
_LONGEST_NAMES = 1 << 10  # bytes of a RecordDict's body: one name and one id


class Malformed(ValueError):
    """A reply that is not made as ours are; says what is wrong, in a line that quotes nothing of it."""


@dataclass(frozen=True)
class Reply:
    """What a site replied."""

    content: bytes | None  # of our message; None: an error
    reason: str = ""  # of the error, in the sender's words: one line, printable
    lost: bool = False  # whether sending again may succeed
    size: int = 0  # bytes of the objects


def read_reply(root: str, fetch: Callable[[str], bytes]) -> Reply:
    """Read a reply.

    Args:
        root: id of its Message.
        fetch: returns an object's content; what it raises is passed on.

    Returns:
        The reply.

    Raises:
        Malformed: the objects are not those of a reply.
    """
    content = fetch(root)
    size = len(content)
    child, body = _apart(content, "Message", _LONGEST_MESSAGE)
    message = MessageProto()
    _parse(message, body)
    if message.HasField("error"):
        reason, lost = plain_line(message.error.reason), message.error.code in LOST
        return Reply(None, "connection lost" if lost else reason or "the site's Flower reported an error", lost, size)
    content = fetch(_required(child, "Message"))
    size += len(content)
    child, body = _apart(content, "RecordDict", _LONGEST_NAMES)
    child = _required(child, "RecordDict")
    if body != json.dumps({RECORD: child}).encode():
        raise Malformed("its RecordDict does not hold one record of ours")
    content = fetch(child)
    size += len(content)
    child, body = _apart(content, "ConfigRecord", len(content))
    record = ConfigRecordProto()
    _parse(record, body)
    if child or len(record.items) != 1 or record.items[0].key != RECORD or not record.items[0].value.HasField("bytes"):
        raise Malformed("its ConfigRecord does not hold one message of ours")
    return Reply(record.items[0].value.bytes, size=size)


def _apart(content: bytes, kind: str, longest: int) -> tuple[str, bytes]:
    """The id of an object's child, "" without one, and its body."""
    end = content.find(b"\0", 0, _LONGEST_HEAD)
    head = _HEAD.fullmatch(content[: max(0, end)])
    if head is None:
        raise Malformed(f"the object in the place of its {kind} has no head of ours")
    if head[1].decode() != kind:
        raise Malformed(f"an object of another kind is in the place of its {kind}")
    length = len(content) - end - 1
    if int(head[3]) != length or length > longest:
        raise Malformed(f"the body of its {kind} has {length:,} bytes, not what it states or too many")
    return head[2].decode(), content[end + 1 :]


def _required(child: str, kind: str) -> str:
    if not child:
        raise Malformed(f"its {kind} has no child")
    return child


def _parse(proto: MessageProto | ConfigRecordProto, body: bytes) -> None:
    try:
        proto.ParseFromString(body)
    except Exception:  # of protobuf's C code: whatever it raises is about these bytes
        raise Malformed(f"the body of its {type(proto).__name__} cannot be parsed") from None
