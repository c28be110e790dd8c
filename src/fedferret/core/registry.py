"""Tables of what a recipe can name: module, class and one line by name; reading a table imports no library."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fedferret.core.errors import UserError, nearest


def described(entries: Mapping[str, tuple[str, str, str]]) -> dict[str, str]:
    """List a table.

    Args:
        entries: by name: module, class, one line.

    Returns:
        The line by name.
    """
    return {name: line for name, (_, _, line) in entries.items()}


def imported(kind: str, package: str, entries: Mapping[str, tuple[str, str, str]], name: str) -> Any:
    """Import what a name stands for.

    Args:
        kind: what the table holds, for the error: "method", "data source".
        package: of the modules.
        entries: by name: module, class, one line.
        name: as in a recipe.

    Returns:
        The class.

    Raises:
        UserError: for an unknown name, with the nearest one.
    """
    if name not in entries:
        raise UserError(f'no {kind} is called "{name}": {nearest(name, entries)}')
    module, attribute, _ = entries[name]
    return getattr(importlib.import_module(f"{package}.{module}"), attribute)
