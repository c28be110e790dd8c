"""A local file of rows: JSONL, JSON (an array), CSV with a header, or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError
from fedferret.data.examples import FederatedData
from fedferret.data.table import Row, Table

if TYPE_CHECKING:
    from fedferret.core.keys import Key


@dataclass(frozen=True)
class Files(Table):
    """Settings of the source "files": the rows of one file.

    The rows of ``held_out_path``, where given, are the held-out set "rows".
    """

    path: str
    held_out_path: str | None = None

    def load(self, key: Key) -> FederatedData:
        """Read the rows, check them, hold rows out and partition the others.

        Raises:
            UserError: for every fault of a file, with the line or row.
        """
        held_out = None if self.held_out_path is None else read_rows(Path(self.held_out_path))
        return self.federate(read_rows(Path(self.path)), held_out, key, source=self.path)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; the suffix gives the format.

    Raises:
        UserError: if the file is missing, empty or faulty, or has another suffix.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f'cannot read "{path}": files end in {", ".join(_READERS)}')
    if not path.is_file():
        raise UserError(f'there is no file "{path}": check data.path')
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f'"{path}" is not UTF-8 text (byte {error.start}): save it as UTF-8') from None
    if not rows:
        raise UserError(f'"{path}" is empty: give a file with at least one row')
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_row(_parse(line, f'"{path}", line {number}'), f'"{path}", line {number}'))
    return rows


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    array = _parse(text, f'"{path}"')
    if not isinstance(array, list):
        raise UserError(f'"{path}" is not a JSON array of rows: give a .jsonl file for one object per line')
    return [_row(value, f'"{path}", row {number}') for number, value in enumerate(array, start=1)]


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}") from None


def _row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f'{where} is not an object of named columns such as {{"instruction": …, "response": …}}')
    return value


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows: list[Row] = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f'"{path}", line {reader.line_num}: not as many fields as the header has')
                rows.append(row)
        except csv.Error as error:
            raise UserError(f'"{path}", line {reader.reader.line_num} is not CSV: {error}') from None
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f'"{path}" is not a Parquet file: {str(error).splitlines()[0]}') from None
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
