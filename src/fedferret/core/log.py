"""The global model as a log: a base, at most one snapshot, and the entries that followed.

    version 0            version s              version v
    base  ...dropped...  snapshot  e[s+1] ... e[v]

* A node at version u receives ``since(u)``: the entries after u, or the snapshot and the entries after
  that, whichever is fewer bytes.
* ``append`` folds: once the entries since the last snapshot weigh more than half a snapshot, a new one is
  taken, so a newcomer never downloads more than one and a half models. A method with an entry as large
  as the model (FedAvg) therefore folds every round; Ferret never does.
* Entries older than the snapshot are kept while all of them together are lighter than one snapshot.
* On disk, what a fold makes superfluous goes only by ``prune``, after the checkpoint says that this version is
  reached: a crash in between finds the version before it whole. The files of ``history`` versions before the newest
  stay too, so that a run can be rewound. History is a matter of disk alone: it changes no update.
* The checkpoint has the checksum of every file of its version. A file that is missing, damaged or of another run is
  named before any of them is applied. Files that no kept version is made of are removed.

The base itself (a public checkpoint) is not counted: every node has it. With a folder the log is on disk,
each file whole or absent; without, it is in memory.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedferret.core.errors import RunError
from fedferret.core.files import inside, read_intact, write_atomically
from fedferret.core.messages import message

RESTORE = "restore the folder of the run from a copy, or run the recipe again in another folder (--out)"
_NAME = re.compile(r"(\d{6,})\.(record|snapshot)")


@message
class Record:
    """One line of the log."""

    version: int  # the version that applying this entry leads to
    entry: bytes  # the method's own message, encoded
    fingerprint: str  # of the public state at this version, "" where none was taken


@dataclass(frozen=True)
class LogUpdate:
    """What brings a node to a version: at most one snapshot, then records, all encoded.

    Attributes:
        version: that the update leads to.
        snapshot: the public state at the version before the first record; None where records are enough.
        records: one a version, the last of them ``version``'s.
    """

    version: int
    snapshot: bytes | None
    records: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return len(self.snapshot or b"") + sum(map(len, self.records))


class Log:
    """The entries that made the model what it is. Versions count from 0, the base."""

    def __init__(self, folder: Path | None = None, history: int = 0) -> None:
        """Start empty, at version 0.

        Args:
            folder: for the records, one file each; None keeps them in memory.
            history: so many versions before the newest stay whole on disk.
        """
        self.version = 0
        self.firsts = {0: 1}  # by version that is still whole on disk: the oldest record that nodes were sent there
        self.history = history
        self._folder = folder
        self._records: dict[int, bytes] = {}
        self._snapshot: tuple[int, bytes] | None = None
        self._checksums: dict[str, int] = {}  # by file name
        self._superfluous: dict[Path, int] = {}  # files, and the version from which nodes are not sent them

    @classmethod
    def read(cls, folder: Path, version: int, checksums: Mapping[str, int] | None = None) -> Log:
        """Look at a log on disk; the folder stays as it is.

        Args:
            folder: of the log's files.
            version: to stop at; later files are ignored.
            checksums: of the log's files, as the checkpoint has them; None takes the files that are there as they are.

        Returns:
            A log in memory, at ``version``.

        Raises:
            RunError: a file is missing, cannot be read, or has another checksum.
        """
        log = cls()
        for name in checksums if checksums is not None else [path.name for path, _ in log_files(folder)]:
            number, kind = _parts(name)
            if number > version:
                continue
            content = read_intact(inside(folder, folder / name), RESTORE)
            found = checksum(content)
            if checksums is not None and found != checksums[name]:
                raise RunError(f"{folder / name} is damaged, or of another run: {RESTORE}")
            if kind == "record":
                log._records[number] = content
            elif log._snapshot is None or number > log._snapshot[0]:
                log._snapshot = (number, content)
            log._checksums[name] = found
        log.version = version
        log.firsts = {version: min(log._records, default=version + 1)}
        return log

    @classmethod
    def open(
        cls,
        folder: Path,
        version: int,
        checksums: Mapping[str, int] | None = None,
        firsts: Mapping[int, int] | None = None,
        history: int = 0,
    ) -> Log:
        """Go on with a log on disk; files of versions after ``version`` are removed, and strange ones.

        Args:
            folder: of the log's files; further entries go there too.
            version: that the checkpoint names.
            checksums: as for ``read``.
            firsts: ``firsts`` of the log when it was at ``version``; None: nodes are sent all records that are read.
            history: so many versions before the newest stay whole on disk.

        Returns:
            A log on disk, at ``version``.

        Raises:
            RunError: as for ``read``.
        """
        log = cls.read(folder, version, checksums)
        log._folder, log.history = folder, history
        log.firsts = dict(firsts or log.firsts)
        newest, files = log._snapshot[0] if log._snapshot else 0, list(log_files(folder))
        snapshots = [number for path, number in files if path.suffix == ".snapshot" and number <= newest]
        for path, number in files:
            record = path.suffix == ".record"
            if path.name in log._checksums and (record or number == newest):
                continue
            log._checksums.pop(path.name, None)
            if record:
                later = [each for each, first in log.firsts.items() if first > number]
            else:
                later = [each for each in snapshots if each > number]
            if later:
                log._superfluous[path] = min(later)
            else:  # of a version after this one, or of none
                path.unlink()
        log.prune()
        return log

    @property
    def checksums(self) -> dict[str, int]:
        """The Adler-32 of each file that this version of the log is made of, by the file's name."""
        return dict(self._checksums)

    def append(self, record: bytes, snapshot_size: int, snapshot: Callable[[], bytes]) -> None:
        """Add one record; fold where the module's docstring says so.

        Args:
            record: encoded, of the version after this one.
            snapshot_size: bytes of the encoded public state.
            snapshot: encodes the public state that the record leads to; called only to fold.
        """
        self.version += 1
        self._records[self.version] = record
        self._write(f"{self.version:06d}.record", record)
        base = self._snapshot[0] if self._snapshot else 0
        if 2 * sum(len(r) for version, r in self._records.items() if version > base) > snapshot_size:
            self._fold(snapshot())
        self.firsts[self.version] = next(iter(self._records), self.version + 1)
        self.firsts = {each: first for each, first in self.firsts.items() if each >= self.version - self.history}

    def prune(self) -> None:
        """Remove the files that no version of ``firsts`` needs; call it once the checkpoint names this version."""
        oldest = min(self.firsts)
        for path, until in list(self._superfluous.items()):
            if until <= max(oldest, int(path.stem)):
                path.unlink(missing_ok=True)
                del self._superfluous[path]

    def since(self, version: int) -> LogUpdate:
        """What a node at ``version`` is missing.

        Args:
            version: that the node holds; 0 is the base.

        Returns:
            The records after ``version``, or the snapshot and the records after it, whichever has fewer bytes.
        """
        options = []
        if all(number in self._records for number in range(version + 1, self.version + 1)):
            options.append(LogUpdate(self.version, None, self._after(version)))
        if self._snapshot and version < self._snapshot[0]:
            options.append(LogUpdate(self.version, self._snapshot[1], self._after(self._snapshot[0])))
        return min(options, key=lambda update: update.size)

    def _after(self, version: int) -> tuple[bytes, ...]:
        return tuple(self._records[number] for number in range(version + 1, self.version + 1))

    def _fold(self, snapshot: bytes) -> None:
        old = self._snapshot[0] if self._snapshot else None
        self._snapshot = (self.version, snapshot)
        self._write(f"{self.version:06d}.snapshot", snapshot)
        if old is not None:
            self._drop(f"{old:06d}.snapshot")
        kept = 0
        for number in sorted(self._records, reverse=True):
            kept += len(self._records[number])
            if kept >= len(snapshot):
                del self._records[number]
                self._drop(f"{number:06d}.record")

    def _write(self, name: str, content: bytes) -> None:
        if self._folder:
            write_atomically(self._folder / name, content)
            self._checksums[name] = checksum(content)

    def _drop(self, name: str) -> None:
        """This version needs the file no longer; it goes with the next ``prune``."""
        if self._folder:
            self._checksums.pop(name, None)
            self._superfluous[self._folder / name] = self.version


def log_files(folder: Path) -> Iterator[tuple[Path, int]]:
    """The files of a log.

    Args:
        folder: of a log; files with other names are passed over.

    Yields:
        Each file with its version, in the order of their names.
    """
    for path in sorted(folder.glob("*")):
        if _NAME.fullmatch(path.name):
            yield path, _parts(path.name)[0]


def checksum(content: bytes) -> int:
    """What tells one file of a log from another.

    Args:
        content: of the file.

    Returns:
        Its Adler-32. The CRC-32 would be the same for every encoded message, which ends with its own.
    """
    return zlib.adler32(content)


def _parts(name: str) -> tuple[int, str]:
    """Version and kind of a file of the log. Raises RunError for another name."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise RunError(f"{name!r} cannot be a file of a log: {RESTORE}")
    return int(found[1]), found[2]
