"""Rows of files as they are stored: compact in memory, and made into dictionaries only when they are asked for.

Lines hold the bytes of a text file and where each row begins; an Arrow table holds what pyarrow read. A row is parsed
each time it is asked for, so 200,000 rows take little more memory than their file.
"""

from __future__ import annotations

import json
import sys
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, TypeAlias, overload

from fedferret.core.errors import UserError

Row: TypeAlias = Mapping[str, Any]

_DECODER = json.JSONDecoder()  # as `json.loads` has it, without its checks of options
CHUNK = 256  # rows of an Arrow table that are converted at a time


class Part(Protocol):
    """The rows of one file."""

    name: str  # of the file, as the user wrote it

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """A row by number, from 0. Raises UserError if it cannot be parsed."""
        ...


class Rows(Sequence[Row]):
    """The rows of one or several files, in order."""

    def __init__(self, parts: Sequence[Part], notes: Sequence[str] = ()) -> None:
        """Join files.

        Args:
            parts: at least one file, each with at least one row.
            notes: lines for the user on how the files were read.
        """
        self._parts, self.notes = tuple(parts), tuple(notes)
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if len(self._parts) == 1 and 0 <= index < self._ends[0]:
            return self._parts[0].row(index)
        part, number = self._place(range(len(self))[index])
        return part.row(number)

    def where(self, index: int) -> str:
        """Words that name a row: its file, and its number there from 1."""
        part, number = self._place(index)
        return f"{part.name}, row {number + 1}"

    @property
    def name(self) -> str:
        """Words that name all rows: the first file, and how many more there are."""
        more = len(self._parts) - 1
        first = self._parts[0].name
        return first if not more else f"{first} and {more:,} more file{'s' * (more > 1)}"

    def _place(self, index: int) -> tuple[Part, int]:
        number = bisect_right(self._ends, index) if len(self._parts) > 1 else 0
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


class Lines:
    """Rows that are JSON texts, end to end in one buffer; a header makes arrays of fields into objects."""

    def __init__(self, name: str, content: bytes | bytearray, starts: array[int], header: Sequence[str] = ()) -> None:
        """Keep the texts; none is parsed yet.

        Args:
            name: of the file.
            content: UTF-8, one JSON text after the other, with white space between.
            starts: where each begins, in bytes.
            header: names of the fields, where a row is an array of as many texts; none: a row is an object.
        """
        self.name, self._content, self._starts, self._header = name, content, starts, tuple(header)

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Row:
        """A row by number, from 0.

        Raises:
            UserError: it is not UTF-8, not JSON or not an object.
        """
        end = self._starts[index + 1] if index + 1 < len(self._starts) else len(self._content)
        text = self._content[self._starts[index] : end]
        try:
            value = parsed(text, "")
            return dict(zip(self._header, value, strict=True)) if self._header else row_of(value, "")  # type: ignore[call-overload]
        except UserError as error:
            line = self._content.count(b"\n", 0, self._starts[index]) + 1
            raise UserError(f'"{self.name}", line {line:,}{error}') from None


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that Python cannot hold, such as a date of the year 300,000: an error where it is read."""

    reason: str


class ArrowRows:
    """Rows of an Arrow table; neighbouring rows are converted together."""

    def __init__(self, name: str, table: Any) -> None:
        """Keep the table.

        Args:
            name: of the file.
            table: a ``pyarrow.Table``; no two columns have one name.
        """
        self.name, self._table = name, table
        self._first, self._chunk = 0, list[Row]()
        self._nested = "struct<" in str(table.schema)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, index: int) -> Row:
        """A row by number, from 0. A value that Python cannot hold, or a text that is not UTF-8, is ``Unreadable``."""
        if not 0 <= index - self._first < len(self._chunk):
            self._first = index - index % CHUNK
            part = self._table.slice(self._first, CHUNK)
            try:
                chunk: list[Row] = part.to_pylist()
            except Exception:  # of a date, a time zone or a text: pyarrow, pytz and Python raise what they like
                columns = [list(map(_held, part.column(name))) for name in part.column_names]
                chunk = [dict(zip(part.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
            self._chunk = [_without_nulls(row) for row in chunk] if self._nested else chunk
        return self._chunk[index - self._first]


def _held(value: Any) -> object:
    """A value of a column as a plain one."""
    try:
        return value.as_py()
    except Exception as error:  # as in ``row``
        reason = (
            "a text that is not UTF-8" if isinstance(error, UnicodeError) else f"a value that cannot be read ({error})"
        )
        return Unreadable(reason)


def _without_nulls(row: Row) -> Row:
    """The row with objects that have the keys which other rows' objects gave them, at null, without these keys."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items() if each is not None}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return {name: plain(value) for name, value in row.items()}


def parsed(text: str | bytes | bytearray, where: str) -> object:
    """A JSON text as plain values.

    Args:
        text: of one value; bytes are UTF-8.
        where: names file and row in errors.

    Raises:
        UserError: the text is not UTF-8, is not JSON, is nested too deep, or holds a number of thousands of digits.
    """
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode())
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start + 1} of the row): save it as UTF-8") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deep: a value may have some hundred levels") from None
    except ValueError:  # Python refuses to convert more digits
        most = sys.get_int_max_str_digits()
        raise UserError(f"{where} holds a number of more than {most:,} digits: write it as a text") from None


def row_of(value: object, where: str) -> Row:
    """A row that was parsed. Raises UserError unless it is an object."""
    if not isinstance(value, dict):
        raise UserError(f'{where} is not an object of named columns such as {{"instruction": …, "response": …}}')
    return value
