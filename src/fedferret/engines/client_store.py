"""Clients' private states: what they were after the last finished round, in memory or on disk.

A state that a round produced becomes the state only by ``commit``: a run that is stopped in the middle of a
round resumes with the states from before it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedferret.core.files import write_atomically
from fedferret.core.node import Codec


class ClientStore:
    """Private states by client, in memory."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}
        self._staged: dict[str, Any] = {}

    def get(self, client: str) -> Any | None:
        """The client's state after the last committed round, or None before its first."""
        return self._states.get(client)

    def stage(self, client: str, state: Any, round: int) -> None:
        """Remember what ``client`` will be once this round is committed."""
        self._staged[client] = state

    def commit(self, round: int) -> None:
        """Make the staged states of this round the states."""
        self._states.update(self._staged)
        self._staged.clear()

    def withdraw(self, clients: Iterable[str]) -> None:
        """Forget what these clients staged: their answers were refused, so they stay what they were."""
        for client in clients:
            self._staged.pop(client, None)


class FolderClientStore(ClientStore):
    """Private states on disk, one file per client and round: memory does not grow with their number."""

    def __init__(self, folder: Path, codec: Codec, round: int, history: int = 0) -> None:
        """Open ``folder`` as it was after ``round``; later files are of a crash or of rewound rounds, and are removed.

        Args:
            folder: of the states.
            codec: of states.
            round: the last finished one.
            history: the states of so many rounds before the last finished one stay, for rewinding.
        """
        super().__init__()
        self._folder, self._codec, self._history = folder, codec, history
        for path in folder.glob("*.state"):
            if _round(path) > round:
                path.unlink()

    def get(self, client: str) -> Any | None:
        """The newest committed state."""
        paths = self._paths(client)
        staged = self._staged.get(client)
        committed = [path for path in paths if path != staged]
        return self._codec.decode(committed[-1].read_bytes()) if committed else None

    def stage(self, client: str, state: Any, round: int) -> None:
        """Write the new state beside the old one."""
        path = self._folder / f"{_identifier(client)}.{round:06d}.state"
        write_atomically(path, self._codec.encode(state))
        self._staged[client] = path

    def commit(self, round: int) -> None:
        """Keep the new files; those of the same clients that no kept round needs go."""
        oldest = round - self._history
        for client in self._staged:
            paths = self._paths(client)
            for path, newer in itertools.pairwise(paths):
                if _round(newer) <= oldest:
                    path.unlink()
        self._staged.clear()

    def begin_anew(self, clients: Iterable[str]) -> None:
        """Remove every state of these clients."""
        for client in clients:
            for path in self._paths(client):
                path.unlink()

    def withdraw(self, clients: Iterable[str]) -> None:
        """Remove what these clients wrote."""
        for client in clients:
            if client in self._staged:
                self._staged.pop(client).unlink(missing_ok=True)

    def _paths(self, client: str) -> list[Path]:
        return sorted(self._folder.glob(f"{_identifier(client)}.*.state"), key=_round)


def held(folder: Path, client: str, round: int) -> bool:
    """Whether the state that ``round`` left is on disk.

    Args:
        folder: of the states.
        client: name.
        round: in which the client was counted.
    """
    return (folder / f"{_identifier(client)}.{round:06d}.state").exists()


def _round(path: Path) -> int:
    return int(path.name.split(".")[1])


def _identifier(client: str) -> str:
    """A file name for any client's name."""
    return hashlib.blake2b(client.encode(), digest_size=12).hexdigest()
