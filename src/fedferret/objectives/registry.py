"""The objectives by name; importing this module imports no library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedferret.core.registry import described, imported

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
    return described(_OBJECTIVES)


def objective(name: str) -> type[ModelObjective]:
    """Import an objective.

    Args:
        name: a key of ``catalogue()``.

    Returns:
        The objective's class, a frozen dataclass with the objective's settings as fields.

    Raises:
        UserError: for an unknown name.
    """
    found: type[ModelObjective] = imported("objective", "fedferret.objectives", _OBJECTIVES, name)
    return found
