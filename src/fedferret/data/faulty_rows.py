"""Rows of no use: what makes a value no text, and whether such rows are refused, or left out and counted.

A value is a text, or is refused: null, NaN, lists, objects and bytes never become a spelling of Python's. Where a value
may be a label or a name, numbers and booleans have JSON's spelling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from fedferret.core.errors import UserError
from fedferret.core.text import plain_line
from fedferret.data.rows import Unreadable
from fedferret.data.stored import KEPT, StoredRecords

T = TypeVar("T")

FaultyRows: TypeAlias = Literal["refuse", "skip"]  # the setting data.faulty_rows
NAMED = 3  # row numbers in the line on rows that are left out


class FaultyRow(UserError):
    """Something is wrong with one row; the message begins with the file and the row."""


def text_of(row: Mapping[str, Any], column: str, where: str, *, numbers: bool = False) -> str:
    """The text in a column that every row must fill.

    Args:
        row: with plain values, as ``json.loads`` gives them.
        column: its name.
        where: names file and row in the error.
        numbers: whether numbers and booleans are allowed, as labels and names are; they get JSON's spelling.

    Raises:
        FaultyRow: the column is missing, blank, not text, or not Unicode.
    """
    text = optional_text_of(row, column, where, numbers=numbers)
    if not shows(text):
        raise FaultyRow(f'{where}: column "{column}" is empty; fill it or remove the row')
    return text


def shows(text: str) -> bool:
    """Whether a text has a character that is seen: no space, control character, byte-order mark or space of no width.

    Args:
        text: of any length.
    """
    return text[:1].isalnum() or any(each.isprintable() and not each.isspace() for each in text)


def optional_text_of(row: Mapping[str, Any], column: str, where: str, *, numbers: bool = False) -> str:
    """The text in a column that a row may leave out: "" where it is missing, null or empty.

    Args:
        row: as in ``text_of``.
        column: as in ``text_of``.
        where: as in ``text_of``.
        numbers: as in ``text_of``.

    Raises:
        FaultyRow: the value is not text, or not Unicode.
    """
    value = row.get(column)
    if isinstance(value, str) and value.isascii():  # most are, and need no words for an error
        return value
    return "" if value is None else text_in(value, f'{where}: column "{column}"', numbers=numbers)


def text_in(value: object, where: str, *, numbers: bool = False) -> str:
    """A value that must be a text; it may be empty.

    Args:
        value: as ``json.loads`` gives it.
        where: names file, row and column in the error.
        numbers: as in ``text_of``.

    Raises:
        FaultyRow: the value is not text, or not Unicode.
    """
    if isinstance(value, str):
        if not value.isascii():
            _check_unicode(value, where)
        return value
    if numbers and (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        return json.dumps(value)
    raise FaultyRow(f"{where} holds {_described(value)}, not a text; write a text or remove the row")


def records(
    rows: Sequence[T],
    read: Callable[[T, str], Any],
    source: str,
    faulty_rows: FaultyRows = "refuse",
) -> tuple[StoredRecords, tuple[str, ...]]:
    """What ``read`` makes of each row.

    Args:
        rows: of one or several files.
        read: called with a row, and with words that name it; raises FaultyRow for one of no use. Its results follow
            from these alone: of many rows, they are made again when they are needed.
        source: names the rows in errors.
        faulty_rows: "refuse" raises the first row's error; "skip" leaves such rows out.

    Returns:
        The results in the order of ``rows``, and the lines to say: those on the files, and one that counts the rows
        that were left out.

    Raises:
        FaultyRow: under "refuse", with the row's number and the setting that leaves such rows out.
        UserError: no row is left.
    """
    where: Callable[[int], str] = getattr(rows, "where", lambda index: f"{source}, row {index + 1}")
    notes: tuple[str, ...] = tuple(getattr(rows, "notes", ()))
    kept = StoredRecords(lambda index: read(rows[index], source), len(rows) <= KEPT)
    faults: list[int] = []
    first = ""
    for index, row in enumerate(rows):
        try:
            kept.append(index, read(row, source))
        except FaultyRow:
            if faulty_rows == "refuse" or not first:  # only these are named, which takes time
                first = _fault(read, row, where(index))
            if faulty_rows == "refuse":
                raise FaultyRow(f'{first} (data.faulty_rows = "skip" leaves such rows out)') from None
            faults.append(index)
    if not faults:
        return kept, notes
    if not len(kept):
        raise UserError(f"{source}: every row is faulty, so none is left; the first: {first}")
    shown = ", ".join(where(index).rpartition(", ")[2] for index in faults[:NAMED])
    count = "1 row is" if len(faults) == 1 else f"{len(faults):,} rows are"
    more = ", …" if len(faults) > NAMED else ""
    return kept, (*notes, f"{source}: {count} left out of {len(rows):,} ({shown}{more}); the first: {first}.")


def _fault(read: Callable[[T, str], Any], row: T, where: str) -> str:
    """What is wrong with a faulty row."""
    try:
        read(row, where)
    except FaultyRow as error:
        return str(error)
    raise AssertionError("a row is faulty or not whatever it is called")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FaultyRow(
            f"{where} holds half of a character (a lone surrogate, character {error.start + 1}); write the whole one"
        ) from None


def _described(value: object) -> str:
    """What a value is, in words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, Unreadable):
        return plain_line(value.reason, 120)
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence):
        return "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "an infinite number"
    if isinstance(value, bool):
        return f"the value {json.dumps(value)}"
    if isinstance(value, int | float):
        return "a number"
    return f"a value of type {plain_line(type(value).__name__, 40)}"
