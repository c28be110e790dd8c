"""What a site keeps of one run: the recipe, the records it applied, its private states, the epoch. See ``trainer.py``.

Files appear whole or not at all; what a crash left half-written is removed when the folder is next written to.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

from fedferret.core.errors import RunError
from fedferret.core.files import write_atomically
from fedferret.core.log import Log, LogUpdate, Record, log_files
from fedferret.engines.client_store import ClientState, of_epoch, read_state
from fedferret.wire import codec


class RunFolder:
    """One run's folder at a site. There is nothing on disk until something is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def recipe(self, run: str, notes: list[str]) -> str:
        """The run's recipe as it once came; "" before, and where it is damaged, which is noted.

        Args:
            run: SHA-256 of the recipe.
            notes: gets a line about damage.
        """
        path = self.path / "recipe.toml"
        if not path.exists():
            return ""
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == run:
                return content.decode()
            reason = "it is of another run, or cut short"
        except (OSError, UnicodeDecodeError) as error:
            reason = str(error)
        notes.append(f"{path} is damaged ({reason}): the server is asked for it again")
        _remove(path)
        return ""

    def log(self, notes: list[str]) -> LogUpdate:
        """What leads from the base to the newest version that is whole here.

        A damaged file ends it: that one and those after it are removed and named in ``notes``.
        """
        self._sweep()
        version = 0
        for path, number in reversed(list(log_files(self._log))):
            if path.suffix == ".snapshot" and _whole(path, notes):
                version = number
                break
        while (path := self._log / f"{version + 1:06d}.record").exists() and _whole(path, notes):
            version += 1
        for path, number in log_files(self._log):
            if path.suffix == ".record" and number > version:
                _remove(path)
        return Log.read(self._log, version).since(0)

    def add(self, update: LogUpdate, before: int) -> None:
        """Keep what a node at version ``before`` applied of ``update``."""
        first = update.version - len(update.records)  # the version that the records follow
        if update.snapshot is not None and before < first:
            write_atomically(self._log / f"{first:06d}.snapshot", update.snapshot)
            for path, _ in log_files(self._log):
                if path.name != f"{first:06d}.snapshot":
                    _remove(path)  # older than the snapshot, which holds all that they led to
        for number, record in enumerate(update.records, start=first + 1):
            if number > before:
                write_atomically(self._log / f"{number:06d}.record", record)

    def epoch(self) -> int:
        """The highest epoch of the run that came; 0 before the run was ever rewound."""
        path = self.path / "epoch"
        text = path.read_text(errors="replace") if path.exists() else "0"
        if not re.fullmatch("[0-9]{1,18}", text):
            raise RunError(
                f"{path} is damaged: remove {self.path}, and the server sends again what this site is missing"
            )
        return int(text)

    def rewind(self, epoch: int, version: int, round: int) -> None:
        """Drop what belongs to rounds that the server rewound, then keep the new epoch: after a crash it is done again.

        Args:
            epoch: of the run from now on.
            version: records up to it stay.
            round: private states up to it stay.
        """
        for path, number in reversed(list(log_files(self._log))):
            if number > version:
                _remove(path)
        self._drop_states_after(round)
        self.keep_epoch(epoch)

    def keep_epoch(self, epoch: int) -> None:
        """Write down the highest epoch that came."""
        if epoch != self.epoch():
            write_atomically(self.path / "epoch", str(epoch))

    def forget(self) -> None:
        """The log is of no use: begin again. Private states stay, they are this site's alone."""
        shutil.rmtree(self._log, ignore_errors=True)

    def private(self, client: str, round: int, oldest: int, notes: list[str], epoch: int | None = None) -> Any | None:
        """The private state that a round left. States of later rounds are removed.

        Args:
            client: that works here.
            round: the last in which the client was counted; 0 before.
            oldest: the oldest round that the server may rewind to; states that only older rounds need are removed.
            notes: gets a line where the state is damaged, or of another epoch.
            epoch: in which the round was run; None: any.

        Returns:
            The state; None where it is to be begun anew. States of later rounds are removed.
        """
        self._drop_states_after(round)
        for path, newer in itertools.pairwise(sorted(self._clients.glob("*.state"))):
            if int(newer.stem) <= oldest:
                _remove(path)
        wanted, state = self._state(round), None
        try:
            if wanted.exists():
                state = read_state(wanted.read_bytes(), f"{self.path.name}/{client}", round, codec, epoch)
        except (OSError, ValueError) as error:
            notes.append(f"{wanted} is damaged ({error}): the private state is begun again")
            _remove(wanted)
        return state

    def keep(self, client: str, round: int, private: Any, epoch: int = 0) -> None:
        """Write the state that ``round`` leaves beside the one before it: which of them counts, the server will say."""
        kept = ClientState(of_epoch(f"{self.path.name}/{client}", epoch), round, private)
        write_atomically(self._state(round), codec.encode(kept), private=True)

    @property
    def _log(self) -> Path:
        return self.path / "log"

    @property
    def _clients(self) -> Path:
        return self.path / "clients"

    def _state(self, round: int) -> Path:
        return self._clients / f"{round:06d}.state"

    def _drop_states_after(self, round: int) -> None:
        for path in self._clients.glob("*.state"):
            if not path.stem.isdecimal() or int(path.stem) > round:
                _remove(path)

    def _sweep(self) -> None:
        for folder in (self._log, self._clients):
            for path in folder.glob(".*"):
                _remove(path)


def _whole(path: Path, notes: list[str]) -> bool:
    """Whether the file holds what its name says; a damaged one is removed."""
    try:
        value = codec.decode(path.read_bytes())
        if path.suffix == ".record" and not (isinstance(value, Record) and value.version == int(path.stem)):
            raise codec.WireError("it is no such record")
        return True
    except (OSError, ValueError) as error:
        notes.append(f"{path} is damaged ({error}): the server is asked for it again")
        _remove(path)
        return False


def _remove(path: Path) -> None:
    """Take a file, or what is in its place, out of the folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
