"""Shared by the published data sets: rows from a local copy or the hub, errors, a limit on held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError
from fedferret.data.examples import FederatedData, at_most
from fedferret.data.files import read_rows
from fedferret.data.hub import rows_of_hub
from fedferret.data.rows import Row

if TYPE_CHECKING:
    from fedferret.core.keys import Key


def local_rows(path: Path, columns: Sequence[str], how_to_get: str) -> list[Row]:
    """The rows of a file in which no column of ``columns`` is blank.

    Args:
        path: of the file.
        columns: names of required columns.
        how_to_get: how the user gets the published file; the end of every error message.
    Raises:
        UserError: if the file is missing or is not the published one.
    """
    if not path.is_file():
        raise UserError(f'there is no file "{path}" (data.path): {how_to_get}')
    return _complete(read_rows(str(path)), columns, f'"{path}"', how_to_get)


def hub_rows(
    name: str,
    split: str,
    columns: Sequence[str],
    how_to_get: str,
    subset: str | None = None,
    revision: str | None = None,
) -> list[Row]:
    """The rows of a split on the hub in which no column of ``columns`` is blank.

    Args:
        name: of the data set on the hub.
        split: of the data set.
        columns: names of required columns.
        how_to_get: how the user gets a local copy; the end of every error message.
        subset: configuration of the data set; None: the default.
        revision: commit on the hub; None: the newest.
    Raises:
        UserError: if the split cannot be loaded or is not the published one.
    """
    rows = rows_of_hub(name, split, how_to_get, subset, revision)
    return _complete(rows, columns, f'"{name}" (split "{split}")', how_to_get)


def _complete(rows: Sequence[Row], columns: Sequence[str], where: str, how_to_get: str) -> list[Row]:
    """The rows without a blank column. Raises ``UserError`` for a missing column or where no row remains."""
    for column in columns:
        if not all(column in row for row in rows):
            raise UserError(f'{where} has no column "{column}", so it is not the published data: {how_to_get}')
    # published files hold a few rows with blank columns, which are of no use for training
    complete = [row for row in rows if all(str(row[column] or "").strip() for column in columns)]
    if not complete:
        raise UserError(f"{where} has a blank column in every row, so it is not the published data: {how_to_get}")
    return complete


@contextmanager
def data_settings_in_errors() -> Iterator[None]:
    """In a partition's errors, write "data." for "partition.", for sources with partition settings as fields."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("partition.", "data.")) from None


def limit_held_out(data: FederatedData, max_held_out: int | None, key: Key) -> FederatedData:
    """The data with at most ``max_held_out`` examples in each held-out set.

    Args:
        data: with any number of held-out examples.
        max_held_out: examples per held-out set; None: all.
        key: draws the subset where there are more.
    """
    held_out = {name: at_most(examples, max_held_out, key.fold(name)) for name, examples in data.held_out.items()}
    return replace(data, held_out=held_out)
