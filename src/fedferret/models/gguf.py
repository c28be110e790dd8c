"""Reads GGUF files: quantised weights, settings and vocabulary in one file, as llama.cpp stores them.

The header is parsed here, in one pass over a memory map. The reader of the ``gguf`` package takes twenty times as long,
and transformers reads the whole file three times. The ``gguf`` package de-quantises. Its arithmetic is elementwise and
IEEE, so the weights have the same bits on every machine. Rows are de-quantised a slab at a time, so memory stays near
100 MB for any size of model.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SLAB_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class QuantisedTensor:
    """One tensor as stored: ``data`` is uint8 (rows, bytes per row), ``shape`` is that of the de-quantised tensor."""

    shape: tuple[int, ...]
    kind: int  # a GGMLQuantizationType
    data: NDArray[np.uint8]

    def rows(self, order: NDArray[np.int64] | None = None) -> Iterator[NDArray[np.float32]]:
        """The elements as fp32, a slab at a time.

        Args:
            order: the rows to take, in this order; None: all rows in their order.
        Yields:
            Slabs of shape (rows, columns).
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        slab = max(1, _SLAB_ELEMENTS // self.shape[-1])
        for start in range(0, len(self.data), slab):
            chosen = self.data[start : start + slab] if order is None else self.data[order[start : start + slab]]
            yield np.asarray(dequantize(chosen, GGMLQuantizationType(self.kind)), dtype=np.float32)


@dataclass(frozen=True)
class GgufFile:
    """The settings (``metadata``) and tensors of a GGUF file; the tensors are views of a memory map."""

    metadata: dict[str, Any]
    tensors: dict[str, QuantisedTensor]


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of a GGUF file and map its tensors.

    Args:
        path: an undamaged file; the caller has checked its digest.
    Raises:
        ValueError: if the file is not a GGUF file.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    with path.open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(buffer)
    magic, _version, tensor_count, setting_count = cursor.unpack("<4sIQQ")
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file")
    metadata = {cursor.text(): cursor.value(cursor.scalar("I")) for _ in range(setting_count)}
    places = []
    for _ in range(tensor_count):
        name = cursor.text()
        dimensions = cursor.unpack(f"<{cursor.scalar('I')}Q")[::-1]  # stored with the fastest dimension first
        places.append((name, dimensions, *cursor.unpack("<IQ")))
    alignment = metadata.get("general.alignment", 32)
    origin = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in places:
        elements_per_block, bytes_per_block = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        row_bytes = shape[-1] // elements_per_block * bytes_per_block
        row_count = math.prod(shape[:-1])
        data = np.frombuffer(buffer, np.uint8, row_count * row_bytes, origin + offset)
        tensors[name] = QuantisedTensor(shape, kind, data.reshape(row_count, row_bytes))
    return GgufFile(metadata, tensors)


class _Cursor:
    """A position in a buffer; each read advances it."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.position = 0

    def unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.buffer, self.position)
        self.position += struct.calcsize(form)
        return values

    def scalar(self, code: str) -> Any:
        return self.unpack("<" + code)[0]

    def text(self) -> str:
        length = self.scalar("Q")
        start, self.position = self.position, self.position + length
        return self.buffer[start : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            element, count = self.unpack("<IQ")
            if element in _SCALARS:
                return list(self.unpack(f"<{count}{_SCALARS[element]}"))
            return [self.value(element) for _ in range(count)]
        return self.scalar(_SCALARS[kind])
