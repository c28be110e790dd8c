"""Data that stays at the sites: a run's list of sites, each with one file.

    sites = ["site-1", "site-2"]                           the sites that may take part; the server asks no other
    files = {site-1 = "a.jsonl", site-2 = "b.jsonl"}       only where all files are local: one machine, tests

Without ``files`` the sites hold the data, and the recipe runs in an engine that reaches the sites. The server evaluates
on the file ``held_out_path``; without that file it evaluates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError, nearest
from fedferret.data.examples import Example, FederatedData
from fedferret.data.files import read_rows
from fedferret.data.table import Columns

if TYPE_CHECKING:
    from fedferret.core.keys import Key


@dataclass(frozen=True)
class Sites(Columns):
    """Settings of the source "sites": the sites of a run, and their files where these are local."""

    sites: tuple[str, ...]
    files: Mapping[str, str] | None = None  # path by site; None: the sites hold the files
    held_out_path: str | None = None  # None: the server evaluates nothing

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
        files = self.files or {}
        clients = {name: self._read(files[name]) if name in files else () for name in sorted(self.sites)}
        held_out = {} if self.held_out_path is None else {"rows": self._read(self.held_out_path)}
        return FederatedData(clients=clients, held_out=held_out, source=f"{len(clients)} sites")

    def _read(self, path: str) -> tuple[Example, ...]:
        columns = {field.name: getattr(self, field.name) for field in fields(Columns)}
        return SiteFile(path=path, **columns).load()


@dataclass(frozen=True)
class SiteFile(Columns):
    """One site's rows: the table ``[data]`` of the site's ``site.toml``."""

    path: str
    held_out_path: str | None = None  # rows that the site scores on; None: the recipe's share of ``path``, if any

    def held_out(self) -> tuple[Example, ...]:
        """The rows of ``held_out_path``; empty without one.

        Raises:
            UserError: as ``load``.
        """
        path = self.held_out_path
        rows = () if path is None else self.examples(read_rows(Path(path)), path)
        if path is not None and not rows:
            raise UserError(f"data.held_out_path: {path} holds no row; leave the setting out, or give it rows")
        return rows

    def load(self) -> tuple[Example, ...]:
        """Read the rows of ``path`` and check them.

        Raises:
            UserError: for every fault of the file, with the line or row.
        """
        return self.examples(read_rows(Path(self.path)), self.path)
