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

The base itself (a public checkpoint) is not counted: every node has it. With a folder the log is on disk,
each file whole or absent; without, it is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedferret.core.files import write_atomically
from fedferret.core.messages import message


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
        self._superfluous: dict[Path, int] = {}  # files, and the version from which nodes are not sent them

    @classmethod
    def read(cls, folder: Path, version: int, first: int = 0) -> Log:
        """Look at a log on disk; the folder stays as it is.

        Args:
            folder: of the log's files.
            version: to stop at; later files are ignored.
            first: the oldest record that nodes are sent at ``version``; older ones are ignored.

        Returns:
            A log in memory, at ``version``.
        """
        log = cls()
        for path in sorted(folder.glob("*.record")):
            if first <= int(path.stem) <= version:
                log._records[int(path.stem)] = path.read_bytes()
        for path in sorted(folder.glob("*.snapshot")):
            if int(path.stem) <= version:
                log._snapshot = (int(path.stem), path.read_bytes())
        log.version = version
        log.firsts = {version: next(iter(log._records), version + 1)}
        return log

    @classmethod
    def open(cls, folder: Path, version: int, firsts: Mapping[int, int] | None = None, history: int = 0) -> Log:
        """Go on with a log on disk; files of versions after ``version`` are removed.

        Args:
            folder: of the log's files; further entries go there too.
            version: that the checkpoint names.
            firsts: ``firsts`` of the log when it was at ``version``; None: nodes are sent all records on disk.
            history: so many versions before the newest stay whole on disk.

        Returns:
            A log on disk, at ``version``.
        """
        log = cls.read(folder, version, firsts[version] if firsts else 0)
        log._folder, log.history = folder, history
        log.firsts = dict(firsts or log.firsts)
        snapshots = sorted(int(path.stem) for path in folder.glob("*.snapshot") if int(path.stem) <= version)
        for path in [*folder.glob("*.record"), *folder.glob("*.snapshot")]:
            number = int(path.stem)
            if number > version:
                path.unlink()
            elif path.suffix == ".record" and number not in log._records:
                log._superfluous[path] = min(each for each, first in log.firsts.items() if first > number)
            elif path.suffix == ".snapshot" and number < snapshots[-1]:
                log._superfluous[path] = min(each for each in snapshots if each > number)
        return log

    def append(self, record: bytes, snapshot_size: int, snapshot: Callable[[], bytes]) -> None:
        """Add one record; fold where the module's docstring says so.

        Args:
            record: encoded, of the version after this one.
            snapshot_size: bytes of the encoded public state.
            snapshot: encodes the public state that the record leads to; called only to fold.
        """
        self.version += 1
        self._records[self.version] = record
        if self._folder:
            write_atomically(self._folder / f"{self.version:06d}.record", record)
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
        if self._folder:
            write_atomically(self._folder / f"{self.version:06d}.snapshot", snapshot)
            if old is not None:
                self._superfluous[self._folder / f"{old:06d}.snapshot"] = self.version
        kept = 0
        for number in sorted(self._records, reverse=True):
            kept += len(self._records[number])
            if kept >= len(snapshot):
                del self._records[number]
                if self._folder:
                    self._superfluous[self._folder / f"{number:06d}.record"] = self.version
