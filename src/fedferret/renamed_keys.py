"""Recipe keys that were renamed: the old spelling is read for one version, with one line of warning each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedferret.core.errors import UserError

_log = logging.getLogger("fedferret")


@dataclass(frozen=True)
class Renamed:
    """One renamed key: its table, both spellings, and old values that have new names."""

    table: str
    old: str
    new: str
    values: Mapping[str, str] = field(default_factory=dict)


# read by 0.2, gone in 0.3
RENAMED = (
    Renamed("clients", "min_answers", "min_clients"),
    Renamed("text", "learn", "train_on", {"responses": "completions", "everything": "all"}),
    Renamed("algorithm", "largest_of", "group_size"),
)


# settings of ferret that are gone, with what to do instead, and the value at which they did nothing
_TO_PUBLISHED = 'is a setting of the published code: set algorithm.name="ferret-published"'
GONE = {
    "budget": (f"{_TO_PUBLISHED}, where it is always the largest block's", "total"),
    "coordinate_clip": (_TO_PUBLISHED, "none"),
}
_GONE_VALUES = {"keys": "fixed-pool", "scale": "published-code"}


def with_new_names(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tables with every renamed key under its present name.

    Args:
        tables: a recipe as TOML gives it; it stays as it is.

    Returns:
        The tables to build a recipe from. Each old key found has logged one warning.

    Raises:
        UserError: a table holds both spellings of one key, or a setting of ferret that is gone.
    """
    result = dict(tables)
    if isinstance(result.get("algorithm"), Mapping):
        result["algorithm"] = _with_new_method(result["algorithm"])
    for key in RENAMED:
        table = result.get(key.table)
        if not isinstance(table, Mapping) or key.old not in table:
            continue
        if key.new in table:
            raise UserError(
                f"{key.table}.{key.old}: this is the old name of {key.table}.{key.new}; give one of the two"
            )
        value = table[key.old]
        value = key.values.get(value, value) if isinstance(value, str) else value
        result[key.table] = {name: each for name, each in table.items() if name != key.old} | {key.new: value}
        _log.warning(
            "%s.%s is called %s.%s since fedferret 0.2; the old name is read until 0.3",
            *(key.table, key.old, key.table, key.new),
        )
    return result


def _with_new_method(algorithm: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table with ferret's preset "paper-code" as the method that it became."""
    if algorithm.get("name") != "ferret":
        return algorithm
    if algorithm.get("preset") == "paper-code":
        _log.warning(
            'algorithm.preset "paper-code" of ferret is the method "ferret-published" since fedferret 0.2; the old '
            "spelling is read until 0.3"
        )
        given = {name: value for name, value in algorithm.items() if name not in ("preset", "entry_bits", "budget")}
        return {**given, "name": "ferret-published"}
    for name, (advice, idle) in GONE.items():
        if algorithm.get(name, idle) != idle:
            raise UserError(f"algorithm.{name}: {advice}")
        if name in algorithm:
            _log.warning(
                "algorithm.%s is gone since fedferret 0.2; %r changes nothing and is read until 0.3", name, idle
            )
    for name, value in _GONE_VALUES.items():
        if algorithm.get(name) == value:
            raise UserError(f'algorithm.{name}="{value}": {_TO_PUBLISHED}')
    return {name: value for name, value in algorithm.items() if name not in GONE}
