"""One binary format for every message and every saved state; no pickle.

    "fF"  version(1)  value  CRC-32(4)

A value is a one-byte tag and its content. Numbers are little-endian, counts are LEB128 varints:

    n none   t/f bool   i int (zigzag varint)   d float (fp64)   s str   b bytes
    [ tuple: count, values          { mapping of strings: count, (str, value)*
    m message: type name, its fields' values in order of declaration (field names are not sent)
    T tensor: dtype code(1), number of dimensions, sizes, raw bytes

A message costs ``len(encode(x))`` bytes: 7 bytes of frame, and its bytes + 3 to 8 for a tensor. ``size`` computes the
cost without building the bytes. Decoding creates only registered message types (``core/messages.py``) and checks every
length against the bytes left. Damage, another version and trailing bytes raise WireError.
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
_BEFORE = "0.1"  # the fedferret version that wrote wire version 1
_MAGIC = b"fF"
_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip  # the position is the code on the wire: append only

Buffer: TypeAlias = bytes | memoryview
Contents: TypeAlias = Callable[[Tensor], Buffer | range]


class WireError(ValueError):
    """Bytes that are not a message: damaged, truncated, of another version or of an unknown type."""


class OtherVersion(WireError):
    """Bytes that another version of fedferret wrote; the message names the version that reads them."""


def encode(value: Any) -> bytes:
    """Encode a value in the wire's format.

    Args:
        value: a message, or anything that a field of a message may hold; tensors on any device.

    Returns:
        Frame and value; ``decode`` reads them.

    Raises:
        TypeError: for a value of another type.
        NotImplementedError: on a big-endian machine.
    """
    if sys.byteorder != "little":
        raise NotImplementedError("the wire is little-endian and this machine is not")
    parts: list[Any] = [_MAGIC, bytes([VERSION]), *_write(value, _bytes)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join([*parts, struct.pack("<I", checksum)])


def size(value: Any) -> int:
    """What a value costs on the wire, without a copy of the tensors.

    Args:
        value: as for ``encode``.

    Returns:
        ``len(encode(value))`` in bytes, the frame included.
    """
    return len(_MAGIC) + 1 + sum(len(part) for part in _write(value, _length)) + 4


def decode(data: bytes) -> Any:
    """Decode received bytes; the sender is not trusted.

    Args:
        data: what ``encode`` returned.

    Returns:
        The value; tensors are on the CPU and own their memory.

    Raises:
        WireError: if bytes are damaged, missing or left over, or name an unknown type.
        OtherVersion: if the bytes are of another version.
    """
    if len(data) < 8:
        raise WireError(f"message of {len(data)} bytes: truncated")
    if data[:2] != _MAGIC:
        raise WireError(f"message starts with {data[:2]!r}, not {_MAGIC!r}: not a fedferret message")
    if data[2] != VERSION:
        raise OtherVersion(other_version(data[2]))
    view = memoryview(data)
    if zlib.crc32(view[:-4]) != int.from_bytes(view[-4:], "little"):
        raise WireError(f"message of {len(data)} bytes: checksum differs, it is damaged or truncated")
    reader = _Reader(view[3:-4])
    try:
        value = reader.value()
    except RecursionError:
        raise WireError("message nested too deeply") from None
    if reader.position != len(reader.view):
        raise WireError(f"message has {len(reader.view) - reader.position} trailing bytes")
    return value


def other_version(version: int) -> str:
    """Explain that bytes are of another wire version.

    Args:
        version: the wire version in the bytes, different from ``VERSION``.

    Returns:
        The error message, which names the fedferret that reads the bytes or the side to update.
    """
    if version > VERSION:
        return f"written by a newer fedferret (wire version {version}; this one reads {VERSION}): update this side"
    return (
        f"written by fedferret {_BEFORE} (wire version {version}; this one reads {VERSION}): "
        f'pip install "fedferret=={_BEFORE}.*" reads it'
    )


def _write(value: Any, contents: Contents) -> Iterator[Buffer | range]:
    """The parts of an encoded value; ``contents`` gives the part of a tensor's elements."""
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
    """The bytes of a tensor's elements."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""  # type: ignore[arg-type]  # a buffer


def _length(tensor: Tensor) -> range:
    """A range as long as the tensor's bytes: counting must not copy a model from its device."""
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
    """Reads values in turn; every read is checked against the bytes left."""

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
        if number > len(self.view) - self.position:  # every item takes at least one byte
            raise WireError(f"message claims {number} items, more than the bytes left")
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
        except (RuntimeError, TypeError):  # one dimension of size 0, and another above 2^63
            raise WireError(f"tensor of impossible shape {shape}") from None


_CONSTANTS: dict[bytes, Any] = {b"n": None, b"t": True, b"f": False}
