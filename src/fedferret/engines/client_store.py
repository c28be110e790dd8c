"""Clients' private states: what they were after the last finished round, in memory or on disk.

A state that a round produced becomes the state only by ``commit``: a run that is stopped in the middle of a
round resumes with the states from before it.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedferret.core.errors import RunError
from fedferret.core.files import flush_all, read_intact, write_atomically
from fedferret.core.log import RESTORE
from fedferret.core.messages import state
from fedferret.core.node import Codec

_NAME = re.compile(r"[0-9a-f]{24}\.\d{6,}\.state")


class DamagedState(RunError):
    """A client's private state that cannot be read: with another one the run would go on to other weights."""


@state
class ClientState:
    """What a file holds: a private state, and of whom and when."""

    client: str  # and the epoch, see ``of_epoch``
    round: int
    state: Any


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

    def flush(self) -> None:
        """Wait until what was staged is where a crash leaves it; called before the round is saved."""

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

    def __init__(self, folder: Path, codec: Codec, rounds: Mapping[str, int], history: int = 0) -> None:
        """Open ``folder`` as the checkpoint knows it; what a crash or a rewinding left of later rounds is removed.

        Args:
            folder: of the files; made, for its owner alone, when the first is written.
            codec: of states.
            rounds: by client, the last round in which it was counted; clients without a state are left out.
            history: the states of so many rounds before the last finished one stay, for rewinding.

        Raises:
            RunError: the state of one of these clients is missing.
        """
        super().__init__()
        self._folder, self._codec, self._rounds, self._history = folder, codec, dict(rounds), history
        newest = {_identifier(client): round for client, round in rounds.items()}
        for path in folder.glob("*.state"):
            if _NAME.fullmatch(path.name) and _round(path) > newest.get(path.name.split(".")[0], 0):
                path.unlink()
        for path in sorted(self._path(client, round) for client, round in rounds.items()):
            if not path.exists():
                raise RunError(f"{path} is missing, the private state of a client: {RESTORE}")

    def get(self, client: str) -> Any | None:
        """The newest committed state.

        Raises:
            DamagedState: its file is damaged, or another client's or round's.
        """
        round = self._rounds.get(client)
        return None if round is None else load_state(self._folder, client, round, self._codec)

    def stage(self, client: str, state: Any, round: int) -> None:
        """Write the new state beside the old one; ``flush`` sees that it is on disk."""
        content = self._codec.encode(ClientState(client, round, state))
        write_atomically(self._path(client, round), content, private=True, flushed=False)
        self._staged[client] = round

    def flush(self) -> None:
        """Wait for the disk once a round, not once a client: with small models that is most of what a state costs."""
        flush_all([self._path(client, round) for client, round in self._staged.items()])

    def commit(self, round: int) -> None:
        """Keep the new files; those of the same clients that no kept round needs go."""
        oldest = round - self._history
        for client, new in self._staged.items():
            self._rounds[client] = new
            for path, newer in itertools.pairwise(self._paths(client)):
                if _round(newer) <= oldest:
                    path.unlink(missing_ok=True)
        self._staged.clear()

    def withdraw(self, clients: Iterable[str]) -> None:
        """Remove what these clients wrote."""
        for client in clients:
            if client in self._staged:
                self._path(client, self._staged.pop(client)).unlink(missing_ok=True)

    def _paths(self, client: str) -> list[Path]:
        """A client's files, the oldest first."""
        found = self._folder.glob(f"{_identifier(client)}.*.state")
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_round)

    def _path(self, client: str, round: int) -> Path:
        return _path(self._folder, client, round)


def held(folder: Path, client: str, round: int) -> bool:
    """Whether the state that ``round`` left is on disk.

    Args:
        folder: of the states.
        client: name.
        round: in which the client was counted.
    """
    return _path(folder, client, round).exists()


def load_state(folder: Path, client: str, round: int, codec: Codec) -> Any:
    """The private state that ``round`` left, from its file.

    Args:
        folder: of the states.
        client: name.
        round: in which the client was counted.
        codec: of states.

    Raises:
        DamagedState: the file is damaged, or another client's or round's.
    """
    path = _path(folder, client, round)
    try:
        return read_state(read_intact(path, RESTORE), client, round, codec)
    except RunError as error:
        raise DamagedState(str(error)) from None
    except ValueError as error:
        raise DamagedState(f"{path} is damaged ({error}): {RESTORE}") from None


def of_epoch(client: str, epoch: int) -> str:
    """The name of a client with the epoch in which its state was made; without it in the first, as of old.

    Args:
        client: its name, which has no line break.
        epoch: 0 before the run was ever rewound.
    """
    return f"{client}\n{epoch}" if epoch else client


def read_state(content: bytes, client: str, round: int, codec: Codec, epoch: int | None = None) -> Any:
    """The private state in the content of a file.

    Args:
        content: an encoded ``ClientState``.
        client: that it must be of.
        round: that it must be of.
        codec: of states.
        epoch: that it must be of; None: any.

    Raises:
        ValueError: the content is damaged, or of another client, round or epoch.
    """
    kept = codec.decode(content)
    if not isinstance(kept, ClientState):
        raise ValueError(f"it holds a {type(kept).__name__} and no private state")
    owner, _, made = kept.client.partition("\n")
    if (owner, kept.round) != (client, round):
        raise ValueError(f"it is that of {owner} in round {kept.round}")
    if epoch not in (None, int(made or 0)):
        raise ValueError(f"it is of epoch {made or 0}, and the round that counts of epoch {epoch}")
    return kept.state


def _path(folder: Path, client: str, round: int) -> Path:
    return folder / f"{_identifier(client)}.{round:06d}.state"


def _round(path: Path) -> int:
    return int(path.name.split(".")[1])


def _identifier(client: str) -> str:
    """A file name for any client's name."""
    return hashlib.blake2b(client.encode(), digest_size=12).hexdigest()
