"""Converts TOML tables to frozen dataclasses of settings, and back.

Every setting of the project is a field of a frozen dataclass. ``build`` makes a dataclass from a TOML table. For an
unknown name the error names the nearest known one. Types are checked strictly (pydantic). Numbers are finite. An error
that the dataclass raises becomes one line that names the setting. TOML has no null: where a setting may be absent, the
string "none" means absent. A nested table needs only the settings that differ from the field's default; this default
may differ from the defaults of the nested dataclass.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from datetime import date, time
from typing import Any, TypeVar

from fedferret.core.errors import UserError, nearest

T = TypeVar("T")
LARGEST = 3.4028e38  # of fp32
WHOLE = 2**63  # TOML's whole numbers lie below it
ALTERNATIVES = {"steps": "epochs", "epochs": "steps"}  # of training: two ways to count its work


def build(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """A dataclass of settings from a table.

    Args:
        kind: the dataclass.
        table: plain TOML values; settings that are left out get their defaults.
        where: the table's name in errors, such as "algorithm".
    Raises:
        UserError: for an unknown setting, or an invalid or missing value.
    """
    import pydantic

    _refuse_unknown(kind, table, where)
    _refuse_unbounded(table, where)
    try:
        # a date of TOML is its text
        plain = json.dumps(_without_none_strings(kind, _over_defaults(kind, table)), default=_spelt)
        # JSON's rules are TOML's: a list is a tuple, 1 is a float, "1" is neither
        return pydantic.TypeAdapter(kind).validate_json(plain, strict=True)
    except pydantic.ValidationError as error:
        found = sorted(error.errors(include_url=False), key=lambda each: -len(each["loc"]))  # the nearest to the value
        paths = [".".join([where, *_place(kind, each["loc"])]) for each in found]
        cause = found[0].get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise UserError(f"{paths[0]}: {cause}") from None
        given = json.dumps(found[0]["input"], default=str)
        # of a setting that may be of several kinds, one error each
        words = [each["msg"] for each, path in zip(found, paths, strict=True) if path == paths[0]]
        words = [each.replace("an object", "a table") for each in words]  # TOML's word for it
        said = ", or ".join(dict.fromkeys(f"{each[0].lower()}{each[1:]}" for each in words))
        raise UserError(f"{paths[0]}={given}: {said}") from None
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None


def table_of(settings: Any) -> dict[str, Any]:
    """The table from which ``build`` makes the same settings.

    Args:
        settings: an instance of a settings dataclass.
    Returns:
        Plain TOML values of all fields. A field that is None is "none", or left out if None is its default.
    """
    table: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            table[field.name] = table_of(value)
        elif value is not None:
            table[field.name] = list(value) if isinstance(value, tuple) else value
        elif field.default is not None:
            table[field.name] = "none"
    return table


def _place(kind: Any, parts: Sequence[str | int]) -> list[str]:
    """The path of a setting: pydantic's, without the members of unions that it tried."""
    path = []
    for part in parts:
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part in fields:
            kind = fields[part]
        elif fields or (isinstance(part, str) and typing.get_origin(kind) not in (dict, Mapping)):
            continue
        path.append(str(part))
    return path


def _spelt(value: object) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is no type of a setting")


def _refuse_unknown(kind: type, table: Mapping[str, Any], where: str) -> None:
    """Raise UserError if the table, or a table nested in it, has a name that is not a field."""
    known = [field.name for field in dataclasses.fields(kind)]
    hints = typing.get_type_hints(kind)
    for name, value in table.items():
        if name not in known:
            raise UserError(f"{where}.{name}: there is no such setting; {nearest(name, known)}")
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            _refuse_unknown(typing.cast(type, hints[name]), value, f"{where}.{name}")


def _refuse_unbounded(value: Any, where: str) -> None:
    """Raise UserError for a number, however nested, that is NaN, infinite or no whole number of 64 bits."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            _refuse_unbounded(each, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            _refuse_unbounded(each, f"{where}.{number}")
    elif isinstance(value, float) and not abs(value) <= LARGEST:
        raise UserError(f"{where}={value}: must be a finite number, at most {LARGEST:.4g}, which fp32 holds")
    elif isinstance(value, int) and not -WHOLE <= value < WHOLE:
        raise UserError(f"{where}: a whole number must lie between {-WHOLE} and {WHOLE - 1}")


def _over_defaults(kind: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """``table``, where each nested table also has the values in which its field's default differs from its dataclass.

    Values in which the two agree are left out, because a dataclass may derive them: 5 steps, unless epochs are given.
    """
    merged = dict(table)
    for field in dataclasses.fields(kind):
        if isinstance(table.get(field.name), Mapping) and field.default_factory is not dataclasses.MISSING:
            default: Any = field.default_factory()
            if not dataclasses.is_dataclass(type(default)):
                continue
            usual = table_of(type(default)())
            given = _over_defaults(type(default), table[field.name])
            away = {ALTERNATIVES[name] for name in given if name in ALTERNATIVES}
            own = {name: value for name, value in table_of(default).items() if value != usual.get(name)}
            merged[field.name] = {name: value for name, value in own.items() if name not in away} | given
    return merged


def _without_none_strings(kind: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` with None for the string "none" wherever a setting may be absent."""
    hints = typing.get_type_hints(kind)
    plain: dict[str, Any] = {}
    for name, value in table.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            plain[name] = _without_none_strings(typing.cast(type, hints[name]), value)
        elif value == "none" and _may_be_none(hints[name]):
            plain[name] = None
        else:
            plain[name] = value
    return plain


def _may_be_none(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)
