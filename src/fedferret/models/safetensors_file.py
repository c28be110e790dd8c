"""Writes safetensors files, one slab at a time; the bytes are a pure function of names, shapes and values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is written before all of it is in memory.

    Attributes:
        shape: of the whole tensor.
        slabs: makes its elements, in order, some rows at a time.
    """

    shape: tuple[int, ...]
    slabs: Callable[[], Iterable[NDArray[Any]]]


def write_tensors(path: Path, tensors: Mapping[str, StreamedTensor]) -> None:
    """Stream every tensor as fp32, in the order of the tensors' names.

    Args:
        path: the file to write.
        tensors: by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        shape = tensors[name].shape
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires data aligned to eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            for slab in tensors[name].slabs():
                file.write(np.ascontiguousarray(slab, dtype="<f4").data)
