"""The sites of a served run: those that its recipe names and those that came since, without those that were retired.

    RUN/server/sites.json   by `fedferret sites add|retire`: what the operator asked for; its lists only grow
    RUN/state/run.state     by the ServerApp: the changes that have taken effect (``tracking/checkpoint.py``)
    RUN/events.jsonl        by the ServerApp: the list of each round (``tracking/client_lists.py``)

The server's processes read the file again when it was replaced: `serve` admits a site's node at the port, and the
ServerApp draws the next round from the new list. A site that was added is on the list from the first round that begins
after it has connected: a round that needs every site must not wait for an archive that is still in the post.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.clients import ClientChanges
from fedferret.core.errors import UserError, nearest
from fedferret.sites import state
from fedferret.tracking import checkpoint

if TYPE_CHECKING:
    from fedferret.config import Recipe

FILE = "sites"  # .json, in the server's folder


def requested(run: Path) -> ClientChanges:
    """Return the changes that an operator asked for, those that have taken effect among them.

    Args:
        run: the run's folder.
    Raises:
        UserError: if the file is damaged.
    """
    path = run / state.FOLDER / f"{FILE}.json"
    try:
        known = state.read(run, FILE)
        lists = [known.get(name, []) for name in ("added", "retired")]
        if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in lists):
            raise UserError("no lists of names")
    except UserError:
        raise UserError(
            f"{path} is damaged: it names the sites that came or were retired; restore it, or remove it and give the "
            f"last `fedferret sites` command again"
        ) from None
    return ClientChanges(*map(tuple, lists))


def write(run: Path, changes: ClientChanges) -> None:
    """Ask a server for further changes.

    Args:
        run: the run's folder.
        changes: beside those that were asked for.
    """
    asked = requested(run) | changes
    state.write(run, FILE, {"added": list(asked.added), "retired": list(asked.retired)})


class Members:
    """The sites of a run as they are at the moment."""

    def __init__(self, run: Path, recipe: Recipe) -> None:
        """Read what has taken effect.

        Args:
            run: the run's folder.
            recipe: with the data source "sites".
        Raises:
            UserError: unless the recipe's data source is "sites"; or as ``requested``.
            RunError: if the checkpoint is damaged.
        """
        if recipe.data_source != "sites":
            raise UserError(
                f'data.source="{recipe.data_source}": set data.source="sites" and name them in data.sites to serve a '
                f"run"
            )
        self._named: tuple[str, ...] = recipe.data.sites  # type: ignore[attr-defined]  # of the source of that name
        self._path, self._run = run / state.FOLDER / f"{FILE}.json", run
        known = checkpoint.progress(run)
        self._begun = self._changes = known.changes if known else ClientChanges()
        self._arrived: set[str] = set()  # sites that have connected
        self._read: tuple[int, int] | None = None
        self.changes()

    def changes(self) -> ClientChanges:
        """Return all changes since the run began. Raises UserError if the file was damaged."""
        now = self._stamp()
        if now != self._read:
            self._changes |= requested(self._run)
            self._read = now
        return self._changes

    def effective(self, connected: Collection[str]) -> ClientChanges:
        """Return the changes that take effect with a round that begins now.

        Args:
            connected: the sites that are connected.
        Raises:
            UserError: if the file was damaged.
        """
        asked = self.changes()
        self._arrived.update(connected)
        return ClientChanges(tuple(name for name in asked.added if name in self._arrived), asked.retired)

    def awaited(self) -> list[str]:
        """Return the sites that a server waits for as it starts: not those that were added since it ran."""
        return [name for name in self.names() if name in self._named or name in self._begun.added]

    def names(self) -> list[str]:
        """Return the sites that may take part, sorted. Raises UserError if the file was damaged."""
        return self.changes().applied(self._named)

    def retired(self) -> list[str]:
        """Return the sites that may take part no more, sorted. Raises UserError if the file was damaged."""
        return sorted(self.changes().retired)

    def _stamp(self) -> tuple[int, int] | None:
        """Inode and modification time of the file; None without one."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def check_left(recipe: Recipe, left: Sequence[str], retired: Sequence[str], name: str, given: str) -> None:
    """Refuse to retire a client that is none of the run's, or that the run cannot do without.

    Args:
        recipe: of the run.
        left: the clients that are not retired.
        retired: those that are.
        name: of the client to retire.
        given: the option or name as the operator wrote it, for the message.
    Raises:
        UserError: in one line with the numbers.
    """
    if name not in left:
        known = "is retired already" if name in retired else "is no site of this run"
        raise UserError(f"{given}: {known}; {nearest(name, left)}")
    count, needed = len(left) - 1, max(1, recipe.clients.min_clients)
    if count < needed:
        raise UserError(f"{given}: that leaves {count} sites, and clients.min_clients={needed} are needed")
    try:
        recipe.pool.check(recipe.algorithm.pooling, recipe.algorithm.name, min(count, recipe.clients.per_round))
    except UserError as error:
        raise UserError(f"{given}: that leaves {count} sites; {error}") from None
