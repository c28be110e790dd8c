"""Reads a recipe file as plain tables. This module imports nothing heavy, so a missing file is an error at once."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError


def read_tables(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The TOML tables in a file, with overrides. Names of settings are not checked here.

    Args:
        path: of a TOML file.
        overrides: each ``section.key=value``; later ones win.
    Raises:
        UserError: if the file is missing, unreadable or not TOML, or an override is malformed.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe; see `recipes/` or `fedferret list`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from None
    for text in overrides:
        _override(tables, text)
    return tables


def _override(tables: dict[str, Any], text: str) -> None:
    """Apply one ``section.key=value``; the value is read as TOML, else as a string."""
    path, equals, value = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"--set {text}: must look like section.key=value, for example algorithm.coordinates=8192")
    table = tables
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {text}: {name} is a setting, not a table")
    try:
        table[names[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[names[-1]] = value.strip()
