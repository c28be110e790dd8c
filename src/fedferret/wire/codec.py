"""One binary form for every message and every saved state; no pickle.

    "fF"  version(1)  value  CRC-32(4)

A value is a one-byte tag and its content, numbers little-endian, counts as LEB128 varints:

    n none   t/f bool   i int (zigzag varint)   d float (fp64)   s str   b bytes
    [ tuple: count, values          { mapping of strings: count, (str, value)*
    m message: type name, its fields' values in order of declaration (no field names travel)
    T tensor: dtype code(1), number of dimensions, sizes, raw bytes

Cost: ``len(encode(x))``; 7 bytes of frame, and a tensor costs its bytes + 3 to 8. ``size`` computes it without
building the bytes. Decoding creates only registered message types (``core/messages.py``), checks every
length against what is there, and refuses damage, a newer version or trailing bytes with a WireError.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedferret.core.messages import message_type

VERSION = 2
_BEFORE = "0.1"  # the fedferret that wrote wire version 1
_MAGIC = b"fF"
_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip  # the position is the code on the wire: append only

Buffer: TypeAlias = bytes | memoryview
Contents: TypeAlias = Callable[[Tensor], Buffer | range]


class WireError(ValueError):
    """Bytes that are not a message: damaged, truncated, of a newer version or of an unknown type."""


def encode(value: Any) -> bytes:
    """The bytes of ``value``. Raises TypeError for what no message may hold."""
    if sys.byteorder != "little":
        raise NotImplementedError("the wire is little-endian and this machine is not")
    parts: list[Any] = [_MAGIC, bytes([VERSION]), *_write(value, _bytes)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join([*parts, struct.pack("<I", checksum)])


def size(value: Any) -> int:
    """``len(encode(value))``, without a copy of the tensors."""
    return len(_MAGIC) + 1 + sum(len(part) for part in _write(value, _length)) + 4


def decode(data: bytes) -> Any:
    """The value that ``encode`` made ``data`` from; tensors own their memory. Raises WireError."""
    if len(data) < 8:
        raise WireError(f"message of {len(data)} bytes: truncated")
    if data[:2] != _MAGIC:
        raise WireError(f"message starts with {data[:2]!r}, not {_MAGIC!r}: not a fedferret message")
    if data[2] != VERSION:
        raise WireError(other_version(data[2]))
    view = memoryview(data)
    if zlib.crc32(view[:-4]) != int.from_bytes(view[-4:], "little"):
        raise WireError(f"message of {len(data)} bytes: checksum differs, it is damaged or truncated")
    reader = _Reader(view[3:-4])
    try:
        value = reader.value()
    except RecursionError:
        raise WireError("message nested too deeply") from None
    if reader.position != len(reader.view):
        raise WireError(f"message has {len(reader.view) - reader.position} bytes too many")
    return value


def other_version(version: int) -> str:
    """What to say of bytes of another wire version: which fedferret reads them."""
    if version > VERSION:
        return f"written by a newer fedferret (wire version {version}; this one reads {VERSION}): update this side"
    return (
        f"written by fedferret {_BEFORE} (wire version {version}; this one reads {VERSION}): "
        f'pip install "fedferret=={_BEFORE}.*" reads it'
    )


def _write(value: Any, contents: Contents) -> Iterator[Buffer | range]:
    if value is None:
        yield b"n"
    elif isinstance(value, bool):
        yield b"t" if value else b"f"
    elif isinstance(value, int):
        yield b"i" + _varint(value * 2 if value >= 0 else -value * 2 - 1)
    elif isinstance(value, float):
        yield b"d" + struct.pack("<d", value)
    elif isinstance(value, str):
        yield b"s" + _text(value)
    elif isinstance(value, bytes):
        yield b"b" + _varint(len(value))
        yield value
    elif isinstance(value, Tensor):
        sizes = b"".join(_varint(size) for size in value.shape)
        yield b"T" + bytes([_DTYPES.index(value.dtype)]) + _varint(value.dim()) + sizes
        yield contents(value)
    elif isinstance(value, tuple | list):
        yield b"[" + _varint(len(value))
        for item in value:
            yield from _write(item, contents)
    elif isinstance(value, Mapping):
        yield b"{" + _varint(len(value))
        for name, item in value.items():
            yield _text(name)
            yield from _write(item, contents)
    elif dataclasses.is_dataclass(value) and message_type(type(value).__name__) is type(value):
        yield b"m" + _text(type(value).__name__)
        for field in dataclasses.fields(value):
            yield from _write(getattr(value, field.name), contents)
    else:
        raise TypeError(f"{type(value).__name__} cannot cross the wire: declare it with @message")


def _bytes(tensor: Tensor) -> Buffer:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""  # type: ignore[arg-type]  # a buffer


def _length(tensor: Tensor) -> range:
    """Something as long as the tensor's bytes: counting them must not fetch a model from its device."""
    return range(tensor.numel() * tensor.dtype.itemsize)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _text(text: str) -> bytes:
    data = text.encode()
    return _varint(len(data)) + data


class _Reader:
    """Reads values one after the other; every read is checked against what is left."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.position = 0

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.view):
            raise WireError(f"message truncated: {count} bytes expected, {len(self.view) - self.position} left")
        self.position, start = end, self.position
        return self.view[start:end]

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
            shift += 7

    def text(self) -> str:
        try:
            return bytes(self.take(self.varint())).decode()
        except UnicodeDecodeError:
            raise WireError("message holds a name that is not UTF-8") from None

    def count(self) -> int:
        number = self.varint()
        if number > len(self.view) - self.position:  # every item takes at least a byte
            raise WireError(f"message claims {number} items, more than it has bytes")
        return number

    def value(self) -> Any:
        tag = bytes(self.take(1))
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag == b"i":
            number = self.varint()
            return -((number + 1) >> 1) if number & 1 else number >> 1
        if tag == b"d":
            return struct.unpack("<d", self.take(8))[0]
        if tag == b"s":
            return self.text()
        if tag == b"b":
            return bytes(self.take(self.varint()))
        if tag == b"T":
            return self.tensor()
        if tag == b"[":
            return tuple(self.value() for _ in range(self.count()))
        if tag == b"{":
            return {self.text(): self.value() for _ in range(self.count())}
        if tag == b"m":
            return self.message()
        raise WireError(f"message holds an unknown tag {tag!r}")

    def message(self) -> Any:
        name = self.text()
        cls = message_type(name)
        if cls is None:
            raise WireError(f"message of unknown type {name!r}")
        return cls(*(self.value() for _ in dataclasses.fields(cls)))

    def tensor(self) -> Tensor:
        code, dimensions = self.take(1)[0], self.count()
        if code >= len(_DTYPES):
            raise WireError(f"tensor of unknown type {code}")
        shape = [self.varint() for _ in range(dimensions)]
        elements = 1
        for length in shape:
            elements *= length
        data = self.take(elements * _DTYPES[code].itemsize)
        dtype = _DTYPES[code]
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if elements else torch.empty(0, dtype=dtype)
        try:
            return flat.reshape(shape)
        except (RuntimeError, TypeError):  # no elements along one dimension, and more than 2^63 along another
            raise WireError(f"tensor of impossible shape {shape}") from None


_CONSTANTS: dict[bytes, Any] = {b"n": None, b"t": True, b"f": False}
