"""What a site keeps of one run: the recipe, the records it applied, its private states. See ``trainer.py``.

Files appear whole or not at all; what a crash left half-written is removed when the folder is next written to.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fedferret.core.files import write_atomically
from fedferret.core.log import Log, LogUpdate, Record
from fedferret.wire import codec


class RunFolder:
    """One run's folder at a site. There is nothing on disk until something is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def recipe(self) -> str:
        """The run's recipe as it once came; "" before."""
        path = self.path / "recipe.toml"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def log(self, notes: list[str]) -> LogUpdate:
        """What leads from the base to the newest version that is whole here.

        A damaged file ends it: that one and those after it are removed and named in ``notes``.
        """
        self._sweep()
        snapshots = sorted(self._log.glob("*.snapshot"), reverse=True)
        version = 0
        for path in snapshots:
            if _whole(path, notes):
                version = int(path.stem)
                break
        while (path := self._log / f"{version + 1:06d}.record").exists() and _whole(path, notes):
            version += 1
        for path in self._log.glob("*.record"):
            if int(path.stem) > version:
                path.unlink()
        return Log.read(self._log, version).since(0)

    def add(self, update: LogUpdate, before: int) -> None:
        """Keep what a node at version ``before`` applied of ``update``."""
        first = update.version - len(update.records)  # the version that the records follow
        if update.snapshot is not None and before < first:
            write_atomically(self._log / f"{first:06d}.snapshot", update.snapshot)
            for path in [*self._log.glob("*.record"), *self._log.glob("*.snapshot")]:
                if path.name != f"{first:06d}.snapshot":
                    path.unlink()  # older than the snapshot, which holds all that they led to
        for number, record in enumerate(update.records, start=first + 1):
            if number > before:
                write_atomically(self._log / f"{number:06d}.record", record)

    def forget(self) -> None:
        """The log is of no use: begin again. Private states stay, they are this site's alone."""
        shutil.rmtree(self._log, ignore_errors=True)

    def private(self, round: int) -> bytes:
        """The private state that ``round`` left; b"" where it left none. States of other rounds are removed."""
        wanted = self._state(round)
        for path in self._clients.glob("*.state"):
            if path != wanted:
                path.unlink()
        return wanted.read_bytes() if wanted.exists() else b""

    def keep(self, round: int, private: bytes) -> None:
        """Write the state that ``round`` leaves beside the one before it: which of them counts, the server will say."""
        write_atomically(self._state(round), private)

    @property
    def _log(self) -> Path:
        return self.path / "log"

    @property
    def _clients(self) -> Path:
        return self.path / "clients"

    def _state(self, round: int) -> Path:
        return self._clients / f"{round:06d}.state"

    def _sweep(self) -> None:
        for folder in (self._log, self._clients):
            for path in folder.glob(".*"):
                path.unlink(missing_ok=True)


def _whole(path: Path, notes: list[str]) -> bool:
    """Whether the file holds what its name says; a damaged one is removed."""
    try:
        value = codec.decode(path.read_bytes())
        if path.suffix == ".record" and not (isinstance(value, Record) and value.version == int(path.stem)):
            raise codec.WireError("it is no such record")
        return True
    except codec.WireError as error:
        notes.append(f"{path} is damaged ({error}): the server is asked for it again")
        path.unlink()
        return False
