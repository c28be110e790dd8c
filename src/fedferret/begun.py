"""What the folder of a run that has begun says of its beginning, checked before anything of the run is used."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedferret.config import Recipe, written
from fedferret.core.errors import RunError, UserError
from fedferret.core.files import inside, read_intact
from fedferret.core.log import RESTORE
from fedferret.recipe_file import read_tables
from fedferret.tracking import events


def read_recipe(run: Path) -> Recipe:
    """The recipe of the run in a folder.

    Args:
        run: the run's folder.

    Returns:
        The recipe, resolved.

    Raises:
        RunError: the file is missing or cannot be read.
        UserError: it is no recipe.
    """
    path = inside(run, run / "recipe.toml")
    read_intact(path, RESTORE)
    try:
        return written(read_tables(path))
    except UserError as error:
        raise UserError(f"{path} cannot be used ({error}): {RESTORE}") from None


def begun_recipe(run: Path) -> Recipe:
    """The recipe of a folder that must be a run's, before its state and log are read: it brings the method's messages.

    Args:
        run: the run's folder.

    Returns:
        The recipe, resolved.

    Raises:
        RunError: the recipe cannot be read.
        UserError: the folder is no run's, is of another version, or has links that lead out of it.
    """
    if not (run / "recipe.toml").exists():
        raise UserError(f"{run}: not a run folder, it has no recipe.toml; `fedferret run RECIPE --out DIR` makes one")
    events.check_format(run)
    recipe = read_recipe(run)
    for name in ("state", "log", "state/run.state"):
        inside(run, run / name)
    return recipe


def recipe_fingerprint(run: Path) -> str:
    """Hash a run's recipe file, which stays as it was written when the run began.

    Args:
        run: the run's folder.

    Returns:
        SHA-256 of the file, as 64 hexadecimal digits.
    """
    return hashlib.sha256(read_intact(run / "recipe.toml", RESTORE)).hexdigest()


def check_start(run: Path, base: str, round: int) -> None:
    """Refuse another base or recipe than the run in a folder began with, and events that end before its checkpoint.

    Where all weights are tuned, replaying the log would find another base; the log of an adapter fits any.

    Args:
        run: the run's folder.
        base: SHA-256 of the base weights at hand.
        round: that the checkpoint has reached.

    Raises:
        UserError: the run began from another base.
        RunError: a file of the folder does not belong to the others.
    """
    path = run / events.FILE
    if not path.exists():
        raise RunError(f"{path} is missing, which says what the run began from: {RESTORE}")
    known = events.read(run)
    if known.start.get("base", base) != base:
        raise UserError(
            f"{run} began from a base with SHA-256 {str(known.start['base'])[:12]}…, and this one has {base[:12]}…: "
            f"give it the weights, and the algorithm.adapter if there is one, that it began from"
        )
    recipe = recipe_fingerprint(run)
    if known.start.get("recipe", recipe) != recipe:
        raise RunError(f"{run / 'recipe.toml'} is not the one that the run in {path} began with: {RESTORE}")
    check_events(run, known, round)


def check_events(run: Path, known: events.Run, round: int) -> None:
    """Refuse events that end before a run's checkpoint.

    Args:
        run: the run's folder.
        known: the events.
        round: that the checkpoint has reached.

    Raises:
        RunError: rounds are missing.
    """
    if known.done < round:
        state = run / "state" / "run.state"
        raise RunError(f"{run / events.FILE} ends with round {known.done}, and {state} is of round {round}: {RESTORE}")
