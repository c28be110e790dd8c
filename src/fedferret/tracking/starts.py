"""Runs that never began: a start that failed leaves nothing that a second start trips over.

A run has begun once its first round is on disk. Until then its folder holds what a start wrote: recipe, event log,
perhaps the evaluation before tuning. A start that is refused removes these files. One that was killed leaves them, and
the next start of another recipe, or with other files, replaces them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.core.files import in_words
from fedferret.tracking import environment, events
from fedferret.tracking.folder import FILES

SERVED = "server"  # what `fedferret serve` keeps in a run's folder, from before the run begins
_OURS = {name.rstrip("/") for name in FILES}


def has_begun(out: Path) -> bool:
    """Whether a run has a round to go on from.

    Args:
        out: the run's folder.

    Raises:
        UserError: its event log is damaged.
        RunError: its event log cannot be read.
    """
    if (out / "state" / "run.state").exists() or any(out.glob("log/*")):
        return True
    return (out / events.FILE).exists() and events.read(out).done > 0


def replaceable(out: Path) -> bool:
    """Whether a folder holds a start that came to nothing, and nothing else: another start may replace it.

    Args:
        out: of a run.

    Raises:
        UserError: its event log is damaged.
        RunError: its event log cannot be read.
    """
    if out.is_symlink() or not out.is_dir():
        return False
    names = {path.name for path in out.iterdir()}
    started = names & {environment.FILE, events.FILE}  # a recipe alone may be the user's own
    return bool(started) and all(map(_ours, names - {SERVED})) and not has_begun(out)


def discard(out: Path, locked: bool = False) -> None:
    """Remove what a start wrote; what a server or anybody else keeps in the folder stays.

    Args:
        out: the run's folder.
        locked: this process holds the folder's lock, which stays.

    Raises:
        OSError: a file cannot be removed.
    """
    for path in sorted(out.iterdir()):
        if not _ours(path.name):
            continue
        if locked and path.name == "state":
            _empty(path, but=".lock")
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def leaving_nothing(out: Path) -> Iterator[None]:
    """Remove what a first start wrote, and the folders that it made, where the start is refused.

    Args:
        out: the run's folder; absent, or without a run.

    Returns:
        A context manager for the run from its start on.

    Raises:
        UserError: the start failed; a file that could not be written is one reason.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except (UserError, OSError) as error:
        if _begun_or_damaged(out):
            raise
        if out.is_dir():
            discard(out)
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{in_words(error)}: nothing was begun; mend that, or choose another folder") from error
        raise


def _empty(folder: Path, but: str) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != but:
            path.unlink()


def _begun_or_damaged(out: Path) -> bool:
    try:
        return has_begun(out)
    except (UserError, RuntimeError):
        return True


def _ours(name: str) -> bool:
    """Whether a start writes a file or folder of this name; a kill may leave a temporary one beside it."""
    return name in _OURS or (name.startswith(".") and name[1:].rpartition(".")[0] in _OURS)
