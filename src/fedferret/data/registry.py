"""The sources of data by name; importing this module imports no library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError, nearest

if TYPE_CHECKING:
    from fedferret.data.examples import Source

_SOURCES: dict[str, tuple[str, str, str]] = {
    "chitchat": ("chitchat", "Chitchat", "messages of real people in 4,018 conversations; client = person"),
    "files": ("files", "Files", "a local JSONL, JSON, CSV or Parquet file with named columns or chat messages"),
    "hub": ("hub", "Hub", "a Hugging Face hub data set by name, with the same column settings as files"),
    "reasoning-gym": ("reasoning", "ReasoningGym", "generated reasoning tasks with exact scorers; client = task"),
}


def catalogue() -> dict[str, str]:
    """Every source's name with one line on it."""
    return {name: line for name, (_, _, line) in _SOURCES.items()}


def source(name: str) -> type[Source]:
    """The dataclass of that name's settings; ``UserError`` for a name that is none."""
    if name not in _SOURCES:
        raise UserError(f'no data source is called "{name}": {nearest(name, _SOURCES)}')
    module, attribute, _ = _SOURCES[name]
    found: type[Source] = getattr(importlib.import_module(f"fedferret.data.{module}"), attribute)
    return found
