"""Weights that are stored as whole numbers: codes of a quantised model, which would be read as if they were values.

Complex numbers are found too: of these, transformers would read one half.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL", "C64")  # as safetensors names them
_LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one


def integer_weight(folder: Path, parameters: Iterable[str]) -> str:
    """Find a weight that is stored as whole or complex numbers.

    Buffers, such as masks and positions, may be.

    Args:
        folder: with the model's files; other formats than safetensors, and pickles of torch, are passed over.
        parameters: names of the model's weights. A stored name may have another prefix.

    Returns:
        The first weight's name and data type; "" where there is none.
    """
    known = tuple(parameters)
    for name, dtype in _stored(folder):
        if any(name == each or name.endswith(f".{each}") or each.endswith(f".{name}") for each in known):
            return f"{name} ({dtype})"
    return ""


def _stored(folder: Path) -> Iterator[tuple[str, str]]:
    """The tensors of whole or complex numbers that a folder holds, with their types."""
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        for name, tensor in header.items():
            if name != "__metadata__" and tensor["dtype"] in _WHOLE:
                yield name, tensor["dtype"].lower()
    for path in () if files else sorted(folder.glob("pytorch_model*.bin")):
        import torch

        for name, value in torch.load(path, map_location="meta", weights_only=True).items():
            if not value.is_floating_point():
                yield name, str(value.dtype).removeprefix("torch.")
