"""Data that stays where it is: a run's list of sites, each with a file of its own.

    sites = ["ward-1", "ward-2"]                           who may take part: no other site is ever asked
    files = {ward-1 = "a.jsonl", ward-2 = "b.jsonl"}       only where all of them are at hand: one machine, tests

Without ``files`` the sites hold the data, and an engine that reaches them plays the recipe. What the server evaluates
on is a file of its own, ``held_out_path``; without one it evaluates nothing.
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
    """The sites of a run, and their files where they are at hand."""

    sites: tuple[str, ...]
    files: Mapping[str, str] | None = None  # None: each site has its own
    held_out_path: str | None = None  # None: the server evaluates nothing

    def __post_init__(self) -> None:
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise UserError(f"data.sites={list(self.sites)}: name at least one site, and each once")
        for name in self.sites:
            if not name or not name.isprintable():
                raise UserError(f"data.sites: {name!r} is no name for a site")
        for name in self.files or ():
            if name not in self.sites:
                raise UserError(f'data.files: "{name}" is not in data.sites; {nearest(name, self.sites)}')

    def load(self, key: Key) -> FederatedData:
        """The sites' examples; of a site whose file is not at hand, none."""
        files = self.files or {}
        clients = {name: self._read(files[name]) if name in files else () for name in sorted(self.sites)}
        held_out = {} if self.held_out_path is None else {"rows": self._read(self.held_out_path)}
        return FederatedData(clients=clients, held_out=held_out, source=f"{len(clients)} sites")

    def _read(self, path: str) -> tuple[Example, ...]:
        columns = {field.name: getattr(self, field.name) for field in fields(Columns)}
        return SiteFile(path=path, **columns).load()


@dataclass(frozen=True)
class SiteFile(Columns):
    """One site's rows, all of them to train on: the table ``[data]`` of its ``site.toml``."""

    path: str

    def load(self) -> tuple[Example, ...]:
        """Read and check. Raises UserError for every fault of the file, with its line or row."""
        return self.examples(read_rows(Path(self.path)), self.path)
