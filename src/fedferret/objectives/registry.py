"""The objectives by name; importing this module imports no library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError, nearest

if TYPE_CHECKING:
    from fedferret.objectives.interface import ModelObjective

_OBJECTIVES: dict[str, tuple[str, str, str]] = {
    "next-token": ("next_token", "NextToken", "a causal language model writes responses"),
    "classification": ("classification", "Classification", "a model with a head names the class of a text or an image"),
}


def catalogue() -> dict[str, str]:
    """What can stand in a recipe as ``objective.name``.

    Returns:
        A one-line description of every objective by name.
    """
    return {name: line for name, (_, _, line) in _OBJECTIVES.items()}


def objective(name: str) -> type[ModelObjective]:
    """Import an objective.

    Args:
        name: a key of ``catalogue()``.

    Returns:
        The objective's class, a frozen dataclass with the objective's settings as fields.

    Raises:
        UserError: for an unknown name.
    """
    if name not in _OBJECTIVES:
        raise UserError(f'no objective is called "{name}": {nearest(name, _OBJECTIVES)}')
    module, attribute, _ = _OBJECTIVES[name]
    found: type[ModelObjective] = getattr(importlib.import_module(f"fedferret.objectives.{module}"), attribute)
    return found
