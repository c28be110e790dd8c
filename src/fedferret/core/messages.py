"""The types that may be written down: messages on the wire and states on disk, by name.

A message is a frozen dataclass of tensors, scalars, strings, tuples, dictionaries and other messages; a
state is the same but may change in place. Both decorators enter the type in the table that the codec
reads, so a received byte string can name a type but can never create one that the receiver did not define,
nor one with a field of another kind than the annotation says (``core/fields.py``). On the wire a type is a code of
two bytes, a hash of its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar, dataclass_transform

T = TypeVar("T", bound=type)

TYPE_CODE_BYTES = 2

_TYPES: dict[str, type] = {}
_CODES: dict[bytes, str] = {}


@dataclass_transform(frozen_default=True)
def message(cls: T) -> T:
    """Make ``cls`` a frozen dataclass that the codec can carry; two types of one name are refused.

    Returns:
        ``cls`` itself, changed in place.
    """
    dataclass(frozen=True)(cls)  # changes the class in place
    return _register(cls)


@dataclass_transform()
def state(cls: T) -> T:
    """Make ``cls`` a mutable dataclass that the codec can write down; two types of one name are refused.

    Returns:
        ``cls`` itself, changed in place.
    """
    dataclass(cls)
    return _register(cls)


@cache
def type_code(name: str) -> bytes:
    """Make the code of a type.

    Args:
        name: of the class, without its module.

    Returns:
        Two bytes, the same in every process.
    """
    return hashlib.sha256(name.encode()).digest()[:TYPE_CODE_BYTES]


def message_type(code: bytes) -> type | None:
    """Look up a message or state type.

    Args:
        code: as ``type_code`` returns.

    Returns:
        The class, or None if this process does not know the code.
    """
    return _TYPES.get(_CODES.get(code, ""))


def is_message(kind: type) -> bool:
    """Whether a class can be written down.

    Args:
        kind: any class.

    Returns:
        True for a message or a state, which is the one that its name is registered for.
    """
    return _TYPES.get(kind.__name__) is kind


def message_types() -> dict[str, type]:
    """List what this process can decode.

    Returns:
        Every message and state type that an imported module defines, by name.
    """
    return dict(_TYPES)


def _register(cls: T) -> T:
    known = _TYPES.setdefault(cls.__name__, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(f"two message types are called {cls.__name__}: {known.__module__} and {cls.__module__}")
    other = _CODES.setdefault(type_code(cls.__name__), cls.__name__)
    if other != cls.__name__:
        raise TypeError(f"the message types {other} and {cls.__name__} have one code: rename one")
    return cls


def framing_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The most bytes of a client's message beyond ``WireCost.up_most``: type names, lengths, tensors' names.

    Args:
        shapes: of the tensors that are tuned, by parameter name.

    Returns:
        512 bytes, plus 32 bytes and the length of the name for each tensor.
    """
    return 512 + sum(32 + len(name) for name in shapes)
