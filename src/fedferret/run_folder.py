"""To which recipe a run's folder belongs, and which process may write in it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedferret.begun import read_recipe
from fedferret.config import BEFORE_CUT, DEFAULT_OBJECTIVE, Recipe
from fedferret.core.errors import RunError, UserError
from fedferret.core.log import RESTORE
from fedferret.recipe_file import read_tables
from fedferret.tracking import checkpoint, events
from fedferret.tracking.report import write_report
from fedferret.tracking.starts import SERVED, has_begun, replaceable
from fedferret.tracking.summary import is_finished, read_summary, write_summary

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit on a file's size


def as_begun(tables: Mapping[str, Any], run: Path, log: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """A recipe for the run in a folder, which goes on with the rule of ``text.cut`` under which it began.

    A fedferret without that setting cut as ``BEFORE_CUT`` does. A recipe that names the setting stays as it is.

    Args:
        tables: of the recipe, as its file has them.
        run: the run's folder, which may be absent.
        log: called with a line where the rule is the older one.

    Returns:
        The tables, with ``text.cut`` where the run began before there was a choice.
    """
    kept, text = dict(tables), tables.get("text", {})
    if not isinstance(text, Mapping) or "cut" in text or not (run / "recipe.toml").is_file():
        return kept
    try:
        known = read_tables(run / "recipe.toml")
        older = known.get("objective", {}).get("name", DEFAULT_OBJECTIVE) == DEFAULT_OBJECTIVE
        if not older or "cut" in known.get("text", {}) or not has_begun(run):
            return kept
    except (UserError, RunError, AttributeError):  # whoever goes on with the run says what is wrong with it
        return kept
    log(f'{run} began before there was text.cut: it goes on with text.cut = "{BEFORE_CUT}", the rule of then.')
    return {**kept, "text": {**text, "cut": BEFORE_CUT}}


def belongs(recipe: Recipe, out: Path) -> bool:
    """Whether a folder is this recipe's already; if not, it is free, or holds a start that came to nothing.

    Args:
        recipe: resolved.
        out: the run's folder.

    Raises:
        UserError: it is another's, not a free one, or its recipe cannot be read.
        RunError: its recipe is missing, or its event log cannot be read.
    """
    events.check_format(out)
    if (out / "recipe.toml").exists() or (out / events.FILE).exists():
        change = difference(read_recipe(out).identity(), recipe.identity())
        if change and not replaceable(out):
            raise UserError(f"{out} holds a run with another {change}: choose another folder with --out")
        return not change
    taken = out.exists() and (not out.is_dir() or any(path.name != SERVED for path in out.iterdir()))
    if taken and not replaceable(out):
        raise UserError(f"{out} exists and is no run folder: choose another one with --out")
    return False


def difference(known: dict[str, Any], given: dict[str, Any], where: str = "") -> str:
    """Name the first setting in which two recipes differ.

    Args:
        known: the identity of one.
        given: that of the other.
        where: the table's name and a dot.

    Returns:
        The setting with both values; "" where the recipes are equal.
    """
    for name in [*known, *(name for name in given if name not in known)]:
        left, right = known.get(name), given.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found = difference(left, right, f"{where}{name}.")
            if found:
                return found
        elif left != right:
            return f"{where}{name} ({left!r} there, {right!r} here)"
    return ""


def check_begun(out: Path) -> None:
    """Refuse a folder with a checkpoint and no event log.

    Args:
        out: the run's folder.

    Raises:
        RunError: the event log is missing.
    """
    if checkpoint.saved_round(out) is not None and not (out / events.FILE).exists():
        raise RunError(f"{out / events.FILE} is missing, and the run in {out} has begun: {RESTORE}")


def finished(recipe: Recipe, out: Path) -> bool:
    """Whether the recipe's run in its folder is finished; a rewound one is not, whatever its event log still says.

    Args:
        recipe: of the run.
        out: the run's folder.
    """
    return is_finished(out) and checkpoint.saved_round(out) in (None, recipe.rounds)


def finished_summary(recipe: Recipe, out: Path, log: Callable[[str], None]) -> dict[str, Any] | None:
    """The summary of a run that is finished, which is logged.

    A kill after the run's last event may have come before summary and report were written: they are written now.

    Args:
        recipe: of the run.
        out: the run's folder.
        log: called with a line.

    Returns:
        None of a run that is not finished.
    """
    if not finished(recipe, out):
        return None
    log(f"{out} holds this run, finished: nothing to do. Another folder (--out) runs it again.")
    summary = read_summary(out)
    if summary.get("status") != "finished":
        summary = write_summary(out)
        write_report(out)
    return summary


@contextmanager
def lost_files_in_a_line(out: Path) -> Iterator[None]:
    """A disk without room, or one that failed, met in whatever is written, is no traceback.

    Args:
        out: the run's folder.

    Returns:
        A context manager for the run.

    Raises:
        RunError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in FULL else "mend that"
        raise RunError(
            f"{error.strerror or error} ({error.filename or out}): every finished round is safe; {remedy}, "
            f"and the same command goes on after them"
        ) from error


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Lock the folder.

    Args:
        out: the run's folder.

    Returns:
        A context manager; after it the folder is free.

    Raises:
        UserError: another process has it.
    """
    try:
        with FileLock(out / "state" / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{out} is in use by another process: wait for it, or give another folder") from None
