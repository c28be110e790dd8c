"""Reading GGUF files: quantised weights, settings and vocabulary in one file, as llama.cpp stores them.

The header is parsed here, in one pass over a memory map: the ``gguf`` package's own reader takes twenty times as
long, and transformers reads the whole file three times over. De-quantising is left to ``gguf``; it is elementwise
IEEE arithmetic, so the weights that come out are the same bits on every machine. Rows are de-quantised a slab at a
time, so memory stays near 100 MB whatever the size of the model.
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
    """One tensor as stored: ``data`` uint8 (rows, bytes per row), ``shape`` of the numbers it stands for."""

    shape: tuple[int, ...]
    kind: int
    data: NDArray[np.uint8]

    def rows(self, order: NDArray[np.int64] | None = None) -> Iterator[NDArray[np.float32]]:
        """The numbers as fp32, a slab (rows, columns) at a time, rows taken in ``order`` where it is given."""
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
    """Parse the header of ``path`` and map its tensors. The file must be sound: its digest is checked before."""
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
        dimensions = cursor.unpack(f"<{cursor.scalar('I')}Q")[::-1]  # stored fastest first
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
    """A position in a buffer that moves past what it reads."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.position = 0

    def unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.buffer, self.position)
        self.position += struct.calcsize(form)
        return values

    def scalar(self, letter: str) -> Any:
        return self.unpack("<" + letter)[0]

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
