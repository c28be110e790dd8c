"""Relative paths in a recipe: read from the recipe's own folder, or else from the working directory.

    read    a recipe's file      execution.places = the folders in which its relative paths were found, absolute
    build   tables -> recipe     the paths that are found there become absolute; the recipe keeps how they were given
    write   recipe -> tables     paths as they were given, and execution.places

So a run's `recipe.toml` can be used from anywhere, and the run's identity has the paths as they were given: it does not
depend on where a project lies. This module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedferret.core.errors import UserError

PATHS = (
    ("model", "name"),
    ("data", "path"),
    ("data", "held_out_path"),
    ("data", "files"),
    ("text", "template"),
    ("algorithm", "adapter"),
)
NAMES = ("chat", "alpaca", "tiny", "small", "tiny-encoder", "lenet5", "conv4")  # of what is no file
_PATTERN = "*?["


def with_places(tables: Mapping[str, Any], recipe: Path) -> dict[str, Any]:
    """Write down where a recipe's relative paths were found.

    Args:
        tables: of the recipe, or of a grid.
        recipe: its file.

    Returns:
        The tables, with ``execution.places`` where a relative path was found and the tables do not say.

    Raises:
        UserError: a path leads to two places.
    """
    execution = tables.get("execution", {})
    if not isinstance(execution, Mapping) or "places" in execution:
        return dict(tables)
    here, there = Path.cwd(), recipe.absolute().parent
    found: list[str] = []
    for section, name, value in _given(tables):
        for path in _relative(value):
            at = [place for place in (there, here) if _exists(place / path)]
            if len(at) == 2 and there.resolve() != here.resolve():
                raise UserError(
                    f'{section}.{name}: "{path}" is in {there} and in {here}: give the whole path, so that one is meant'
                )
            found += [str(place) for place in at[:1]]
    if not found:
        return dict(tables)
    return {**tables, "execution": {**execution, "places": list(dict.fromkeys(found))}}


def located(tables: Mapping[str, Any], places: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Make relative paths absolute.

    Args:
        tables: of a recipe.
        places: folders in which they are looked for, in order.

    Returns:
        The tables, where each relative path that exists in a place is absolute; and by table and setting the values
        that were replaced.
    """
    result, given = dict(tables), dict[str, dict[str, Any]]()
    for section, name, value in _given(tables):

        def absolute(path: str) -> str:
            return next((str(Path(place) / path) for place in places if _exists(Path(place) / path)), path)

        if (whole := _mapped(value, absolute)) != value:
            result[section] = {**result[section], name: whole}
            given.setdefault(section, {})[name] = value
    return result, given


def _given(tables: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Table, name and value of each setting that holds paths."""
    for section, name in PATHS:
        table = tables.get(section)
        if isinstance(table, Mapping) and name in table:
            yield section, name, table[name]


def _relative(value: Any) -> list[str]:
    """The relative paths in a setting: a text, a list of texts, or texts by name."""
    found: list[str] = []
    _mapped(value, lambda path: found.append(path) or path)  # type: ignore[func-returns-value]
    return found


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A setting's value with every relative path changed."""
    if isinstance(value, str):
        named = value in NAMES or ":" in value or value.startswith("~") or not value or Path(value).is_absolute()
        return value if named else change(value)
    if isinstance(value, list | tuple):
        return [_mapped(each, change) if isinstance(each, str) else each for each in value]
    if isinstance(value, Mapping):
        return {name: _mapped(each, change) if isinstance(each, str) else each for name, each in value.items()}
    return value


def _exists(path: Path) -> bool:
    """Whether there is such a file or folder, or one that fits a pattern."""
    try:
        if path.exists():
            return True
        text = str(path)
        return any(sign in text for sign in _PATTERN) and next(iter(_matches(path)), None) is not None
    except (OSError, ValueError):
        return False


def _matches(path: Path) -> Iterator[Path]:
    return path.parents[-1].glob(str(path.relative_to(path.parents[-1])))
