"""Local files of rows: one or several files, a folder or a glob; ``data/readers.py`` has the formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.collection import no_collection
from fedferret.core.errors import UserError
from fedferret.data.examples import FederatedData
from fedferret.data.paths import Paths, files_below, files_of
from fedferret.data.readers import read
from fedferret.data.rows import Rows
from fedferret.data.table import Table

if TYPE_CHECKING:
    from fedferret.core.keys import Key


@dataclass(frozen=True)
class Files(Table):
    """Settings of the source "files": the rows of files.

    The rows of ``held_out_path``, where given, are the held-out set "rows".
    """

    path: str | tuple[str, ...]
    held_out_path: str | tuple[str, ...] | None = None

    @property
    def holds_out(self) -> bool:
        """Whether the settings hold anything out."""
        return self.held_out_path is not None or super().holds_out

    @no_collection()
    def load(self, key: Key) -> FederatedData:
        """Read the rows, check them, hold rows out and partition the others.

        Raises:
            UserError: for every fault of a file, with the line or row.
        """
        held_out = None if self.held_out_path is None else read_rows(self.held_out_path, "data.held_out_path")
        rows = read_rows(self.path)
        return self.federate(rows, held_out, key, source=rows.name)

    def files_read(self) -> tuple[Path, ...]:
        """The files that are read, to be pinned."""
        return files_below(self.path, self.held_out_path)


def read_rows(paths: Paths, setting: str = "data.path") -> Rows:
    """All rows of one or several files; the suffix of each gives its format.

    Args:
        paths: each a file, a folder or a glob.
        setting: that names them, for errors.

    Returns:
        The rows, file by file. Lines are parsed when a row is asked for, which raises UserError for a faulty one.

    Raises:
        UserError: a file is missing, faulty or has another suffix, or there is no row.
    """
    files, notes = files_of(paths, setting)
    parts = [part for part in map(read, files) if part is not None]
    if not parts:
        raise UserError(f'"{files[0]}" is empty: give a file with at least one row')
    return Rows(parts, notes)
