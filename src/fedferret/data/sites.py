"""Data that stays at the sites: a run's list of sites, each with one file.

    sites = ["site-1", "site-2"]                           the sites that may take part; the server asks no other
    files = {site-1 = "a.jsonl", site-2 = "b.jsonl"}       only where all files are local: one machine, tests

Without ``files`` the sites hold the data, and the recipe runs in an engine that reaches the sites. The server evaluates
on the file ``held_out_path``; without that file it evaluates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError, nearest
from fedferret.data.examples import Example, FederatedData
from fedferret.data.files import read_rows
from fedferret.data.paths import Paths, files_below
from fedferret.data.table import Columns

if TYPE_CHECKING:
    from fedferret.core.keys import Key


class FileColumns(Columns):
    """The names of the columns of files."""

    def read(self, paths: Paths, log: Callable[[str], None], setting: str) -> Sequence[Example]:
        """The examples of files.

        Args:
            paths: each a file, a folder or a glob.
            log: called with lines on how the rows were read.
            setting: that names the files, for errors.

        Raises:
            UserError: for every fault of a file, with the line or row.
        """
        rows = read_rows(paths, setting)
        return self.examples(rows, rows.name, log)


@dataclass(frozen=True)
class Sites(FileColumns):
    """Settings of the source "sites": the sites of a run, and their files where these are local."""

    sites: tuple[str, ...]
    files: Mapping[str, str | tuple[str, ...]] | None = None  # by site; None: the sites hold the files
    held_out_path: str | tuple[str, ...] | None = None  # None: the server evaluates nothing

    def __post_init__(self) -> None:
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise UserError(f"data.sites={list(self.sites)}: name at least one site, and each once")
        for name in self.sites:
            if not name or not name.isprintable():
                raise UserError(f"data.sites: {name!r} is not a valid name: use printable characters")
        for name in self.files or ():
            if name not in self.sites:
                raise UserError(f'data.files: "{name}" is not in data.sites; {nearest(name, self.sites)}')

    def load(self, key: Key) -> FederatedData:
        """The examples of each site; none for a site that holds its file.

        Raises:
            UserError: for every fault of a local file, with the line or row.
        """
        files, notes, path = self.files or {}, list[str](), self.held_out_path
        clients = {
            name: self.read(files[name], notes.append, f"data.files.{name}") if name in files else ()
            for name in sorted(self.sites)
        }
        held_out = {} if path is None else {"rows": self.read(path, notes.append, "data.held_out_path")}
        return FederatedData(clients, held_out, source=f"{len(clients)} sites", notes=tuple(dict.fromkeys(notes)))

    def files_read(self) -> tuple[Path, ...]:
        """The files that are here, to be pinned."""
        return files_below(*(self.files or {}).values(), self.held_out_path)


@dataclass(frozen=True)
class SiteFile(FileColumns):
    """One site's rows: the table ``[data]`` of the site's ``site.toml``."""

    path: str | tuple[str, ...]  # files, folders or globs
    held_out_path: str | tuple[str, ...] | None = None  # to score on; None: the recipe's share of ``path``, if any

    def held_out(self, log: Callable[[str], None] = lambda line: None) -> Sequence[Example]:
        """The rows of ``held_out_path``; empty without one.

        Args:
            log: called with lines on how the rows were read.

        Raises:
            UserError: as ``load``.
        """
        path = self.held_out_path
        return () if path is None else self.read(path, log, "data.held_out_path")

    def load(self, log: Callable[[str], None] = lambda line: None) -> Sequence[Example]:
        """Read the rows of ``path`` and check them.

        Args:
            log: called with lines on how the rows were read.

        Raises:
            UserError: for every fault of the file, with the line or row.
        """
        return self.read(self.path, log, "data.path")

    def files_read(self) -> tuple[Path, ...]:
        """The files that are read, to be pinned."""
        return files_below(self.path, self.held_out_path)
