"""Reads a recipe file as plain tables. This module imports nothing heavy, so a missing file is an error at once."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError
from fedferret.core.files import in_words
from fedferret.recipe_paths import with_places


def read_tables(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The TOML tables in a file, with overrides, and where its relative paths were found (``recipe_paths.py``).

    Names of settings are not checked here.

    Args:
        path: of a TOML file.
        overrides: each ``section.key=value``; later ones win.
    Raises:
        UserError: if the file is missing, unreadable or not TOML, an override is malformed, or a path is ambiguous.
    """
    tables = read_toml(Path(path), "there is no such recipe; see `recipes/` or `fedferret list`")
    for text in overrides:
        _override(tables, text)
    return with_places(tables, Path(path))


def read_toml(path: Path, missing: str) -> dict[str, Any]:
    """Read a TOML file; a byte-order mark, which editors of Windows write, is passed over.

    Args:
        path: of the file.
        missing: what to say where there is none.
    Returns:
        Its tables.
    Raises:
        UserError: if the file is missing, unreadable or not TOML.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would wait for ever
            raise UserError(f"{path}: cannot be read, it is no file")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: {missing}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read, it is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{in_words(error)}: it cannot be read") from None
    except (ValueError, RecursionError) as error:  # TOML's own error; a number of thousands of digits; deep nesting
        raise UserError(f"{path}: not TOML: {error}") from None


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
    except RecursionError as error:
        raise UserError(f"--set {path}: {error}") from None
    except ValueError:
        table[names[-1]] = value.strip()
