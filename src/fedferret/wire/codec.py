"""One binary format for every message and every saved state; no pickle.

    "fF"  version(1)  value  CRC-32(4)

A value is a one-byte tag and its content. Numbers are little-endian, counts are LEB128 varints:

    n none   t/f bool   i int (zigzag varint)   s str   b bytes
    h/e/d float in 2, 4 or 8 bytes: the upper half of an fp32 number, fp32, fp64; the shortest that loses nothing
    [ tuple: count, values          { mapping of strings: count, (name, value)*; a known name is one byte
    m message: type code(2), its fields' values in order of declaration (field names are not sent)
    u vector of uint8: count, raw bytes
    T any other tensor: dtype code(1), number of dimensions, sizes, raw bytes

A message costs ``len(encode(x))`` bytes: 7 bytes of frame, and its bytes + 2 to 8 for a tensor. ``size`` computes the
cost without building the bytes. Decoding creates only registered message types (``core/messages.py``), of which every
field holds what it declares (``core/fields.py``). Damage, another version and trailing bytes raise WireError.

What a message can ask of its receiver is bounded by its length: every count and size is compared with the bytes left
before memory is taken, a number has at most 10 bytes, a tensor at most 8 dimensions, a value lies at most 32 deep, and
all values together take at most 64 · (16,384 + bytes/2) bytes beside the content of tensors and texts. A value has one
encoding: what ``decode`` takes, ``encode`` gives back to the byte.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedferret.core.fields import misfit
from fedferret.core.messages import TYPE_CODE_BYTES, is_message, message_type, type_code

VERSION = 3
DEPTH = 32  # of values in values; a staged method's state has 6
DIMENSIONS = 8  # of a tensor
LOWEST, HIGHEST = -(2**63), 2**64 - 1  # of an integer: keys have 64 bits without a sign
_BEFORE = {  # what wrote earlier wire versions, and what reads them
    1: ("fedferret 0.1", 'pip install "fedferret==0.1.*" reads it'),
    2: ("a fedferret 0.2 in development", "the commit that wrote it reads it; run it again here"),
}
_MAGIC = b"fF"
_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip  # the position is the code on the wire: append only

# names of what clients state beside their updates: the position is the code on the wire, below 64: append only
_NAMES = ("loss", "seconds", "density", "count")
_KNOWN = {name: bytes([2 * place + 1]) for place, name in enumerate(_NAMES)}

_VARINT_BYTES = 10
_MOST_EMPTY = 2**40  # product of an empty tensor's other sizes, which take no bytes
_SHOWN = 40  # characters of a sender's text in an error message
# What values weigh, in units of 64 bytes of the receiver's memory, and what a message may weigh in all. Small values
# take far more memory than bytes; measured: an empty tensor of 4 bytes 1,020 bytes, a mapping of one item 265.
_TENSOR, _MAPPING, _MESSAGE = 16, 4, 4
_UNITS = 16_384  # of any message: 1,000 tensors of a small model


def _budget(length: int) -> int:
    """Units that the values of a message may weigh: integers, which have at least 2 bytes, always fit."""
    return _UNITS + length // 2


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
        ValueError: for an integer out of range, a tensor of more than 8 dimensions, or values more than 32 deep.
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
        WireError: if bytes are damaged, missing or left over, name an unknown type, hold another kind of value than a
            field declares, or take more memory than their length allows.
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
    value = reader.value()
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
    written, remedy = _BEFORE.get(version, ("another program", "no fedferret reads it"))
    return f"written by {written} (wire version {version}; this one reads {VERSION}): {remedy}"


def _write(value: Any, contents: Contents, depth: int = 0) -> Iterator[Buffer | range]:
    """The parts of an encoded value; ``contents`` gives the part of a tensor's elements."""
    if depth > DEPTH:
        raise ValueError(f"values lie more than {DEPTH} deep in each other, which cannot cross the wire")
    if value is None:
        yield b"n"
    elif isinstance(value, bool):
        yield b"t" if value else b"f"
    elif isinstance(value, int):
        if not LOWEST <= value <= HIGHEST:
            raise ValueError(f"an integer of {value.bit_length()} bits cannot cross the wire: -2^63 to 2^64 - 1 can")
        yield b"i" + _varint(value * 2 if value >= 0 else -value * 2 - 1)
    elif isinstance(value, float):
        yield _shortest(value)
    elif isinstance(value, str):
        yield b"s" + _text(value)
    elif isinstance(value, bytes):
        yield b"b" + _varint(len(value))
        yield value
    elif isinstance(value, Tensor):
        if value.dim() > DIMENSIONS:
            raise ValueError(f"a tensor of {value.dim()} dimensions cannot cross the wire: {DIMENSIONS} can")
        sizes = b"".join(_varint(size) for size in value.shape)
        vector = value.dtype is torch.uint8 and value.dim() == 1
        yield (b"u" if vector else b"T" + bytes([_DTYPES.index(value.dtype)]) + _varint(value.dim())) + sizes
        yield contents(value)
    elif isinstance(value, tuple | list):
        yield b"[" + _varint(len(value))
        for item in value:
            yield from _write(item, contents, depth + 1)
    elif isinstance(value, Mapping):
        yield b"{" + _varint(len(value))
        for name, item in value.items():
            yield _KNOWN[name] if name in _KNOWN else _varint(len(name.encode()) << 1) + name.encode()
            yield from _write(item, contents, depth + 1)
    elif is_message(type(value)):
        yield b"m" + type_code(type(value).__name__)
        for field in dataclasses.fields(value):
            yield from _write(getattr(value, field.name), contents, depth + 1)
    else:
        raise TypeError(f"{type(value).__name__} cannot cross the wire: declare it with @message")


def _shortest(value: float) -> bytes:
    """A float's tag and bytes: the shortest form that gives back the same number; NaN has the longest."""
    if math.isinf(value) or abs(value) <= _LARGEST_FP32:
        short = struct.pack("<f", value)
        if struct.unpack("<f", short)[0] == value:
            return b"e" + short if short[:2] != b"\0\0" else b"h" + short[2:]
    return b"d" + struct.pack("<d", value)


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
    """Reads values in turn; every read is checked against the bytes left, and every value against the budget."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.position = 0
        self.units = _budget(len(view))

    @property
    def left(self) -> int:
        return len(self.view) - self.position

    def take(self, count: int) -> memoryview:
        if count > self.left:
            raise WireError(f"message truncated: {count} bytes expected, {self.left} left")
        start = self.position
        self.position += count
        return self.view[start : self.position]

    def varint(self) -> int:
        number = 0
        for place in range(_VARINT_BYTES):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if place and not byte:
                    raise WireError("message holds a number that is longer than it need be")
                return number
        raise WireError(f"message holds a number of more than {_VARINT_BYTES} bytes")

    def integer(self) -> int:
        number = self.varint()
        number = -((number + 1) >> 1) if number & 1 else number >> 1
        if not LOWEST <= number <= HIGHEST:
            raise WireError("message holds an integer below -2^63 or above 2^64 - 1")
        return number

    def float(self, tag: bytes) -> float:
        kind, before, length = _FLOATS[tag]
        data = before + bytes(self.take(length))
        number: float = struct.unpack(kind, data)[0]
        if _shortest(number)[:1] != tag:
            raise WireError("message holds a number that is longer than it need be, or NaN in a short form")
        return number

    def text(self, length: int) -> str:
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError:
            raise WireError("message holds a text that is not UTF-8") from None

    def name(self) -> str:
        number, known = divmod(self.varint(), 2)
        if known and number >= len(_NAMES):
            raise WireError("message holds an unknown name")
        name = _NAMES[number] if known else self.text(number)
        if not known and name in _KNOWN:
            raise WireError("message holds a name that is longer than it need be")
        return name

    def count(self) -> int:
        number = self.varint()
        if number > self.left:  # every item takes at least one byte
            raise WireError(f"message claims {number} items, more than the bytes left")
        return number

    def weigh(self, units: int) -> None:
        self.units -= units
        if self.units < 0:
            raise WireError(f"message of {len(self.view):,} bytes holds more values than its length allows")

    def value(self, depth: int = 0) -> Any:
        if depth > DEPTH:
            raise WireError(f"message holds values more than {DEPTH} deep in each other")
        self.weigh(1)
        tag = bytes(self.take(1))
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag == b"i":
            return self.integer()
        if tag in (b"h", b"e", b"d"):
            return self.float(tag)
        if tag == b"s":
            return self.text(self.varint())
        if tag == b"b":
            return bytes(self.take(self.varint()))
        if tag == b"u":
            return self.vector()
        if tag == b"T":
            return self.tensor()
        if tag == b"[":
            return tuple([self.value(depth + 1) for _ in range(self.count())])
        if tag == b"{":
            return self.mapping(depth)
        if tag == b"m":
            return self.message(depth)
        raise WireError(f"message holds an unknown tag {tag!r}")

    def mapping(self, depth: int) -> dict[str, Any]:
        self.weigh(_MAPPING)
        items: dict[str, Any] = {}
        for _ in range(self.count()):
            self.weigh(1)
            name = self.name()
            if name in items:
                raise WireError(f"message holds a mapping with the name {_shown(name)} twice")
            items[name] = self.value(depth + 1)
        return items

    def message(self, depth: int) -> Any:
        self.weigh(_MESSAGE)
        code = bytes(self.take(TYPE_CODE_BYTES))
        cls = message_type(code)
        if cls is None:
            raise WireError(f"message of unknown type {code.hex()}: the sender has other methods or another version")
        values = [self.value(depth + 1) for _ in dataclasses.fields(cls)]
        wrong = misfit(cls, values)
        if wrong is not None:
            raise WireError(wrong)
        return cls(*values)

    def vector(self) -> Tensor:
        self.weigh(_TENSOR)
        data = bytearray(self.take(self.varint()))
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def tensor(self) -> Tensor:
        self.weigh(_TENSOR)
        code, dimensions = self.take(1)[0], self.varint()
        if code >= len(_DTYPES):
            raise WireError(f"tensor of unknown type {code}")
        if dimensions > DIMENSIONS:
            raise WireError(f"tensor of more than {DIMENSIONS} dimensions")
        shape = [self.varint() for _ in range(dimensions)]
        dtype, elements = _DTYPES[code], 0 if 0 in shape else 1
        if dtype is torch.uint8 and dimensions == 1:
            raise WireError("message holds a vector of bytes in the form of another tensor")
        most = self.left // dtype.itemsize if elements else _MOST_EMPTY
        product = 1
        for size in shape:
            product *= size or 1
            if product > most:
                raise WireError(f"tensor of impossible shape {shape}: {self.left} bytes left")
        data = self.take(elements * product * dtype.itemsize)
        if not elements:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(bytearray(data), dtype=dtype)
        if dtype is torch.bool and bool((flat.view(torch.uint8) > 1).any()):
            raise WireError("tensor of truth values holds something else")
        return flat.reshape(shape)


def _shown(text: str) -> str:
    """The beginning of a sender's text, quoted, for an error message."""
    return repr("".join(each if each.isprintable() else "\ufffd" for each in text[:_SHOWN]))


_FLOATS = {b"h": ("<f", b"\0\0", 2), b"e": ("<f", b"", 4), b"d": ("<d", b"", 8)}  # kind, what does not travel, bytes
_LARGEST_FP32 = torch.finfo(torch.float32).max
_CONSTANTS: dict[bytes, Any] = {b"n": None, b"t": True, b"f": False}
