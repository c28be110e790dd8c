"""Flower's records around the bytes of a message of ours, for both ends: it imports nothing of Flower's server."""

from __future__ import annotations

from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedferret.engines.flower_reply import LOST, RECORD


def records_of(content: bytes) -> RecordDict:
    """Return Flower's records for the bytes of a message of ours."""
    return RecordDict({RECORD: ConfigRecord({RECORD: content})})


def content_of(message: Message) -> tuple[bytes | None, str]:
    """Return the content of a Flower message that a site received.

    Returns:
        The bytes and "", or None and the reason.
    """
    if message.has_error():
        code = message.error.code
        return None, "connection lost" if code in LOST else str(message.error.reason or f"Flower's error {code}")
    record: Any = message.content.get(RECORD)
    content = record.get(RECORD) if isinstance(record, ConfigRecord) else None
    return (content, "") if isinstance(content, bytes) else (None, "the reply holds no message")


def framed_bytes(message: Message) -> int:
    """Return the bytes of a message as Flower stores and sends it, with records, metadata and headers."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())
