"""The library in three functions: `fedferret run`, from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedferret import config, runner
from fedferret.config import Recipe


def load_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file.

    Args:
        path: of the file.
        overrides: settings to replace, such as ``"algorithm.coordinates=8192"``.

    Returns:
        The recipe, checked and with every default filled in; no model and no data is loaded.

    Raises:
        UserError: if the file or an override is wrong.
    """
    return config.load(path, overrides)


def recipe(**tables: Any) -> Recipe:
    """Build a recipe from Python values.

    Args:
        tables: one keyword argument for each table or top-level setting of the TOML format.

    Returns:
        The recipe that a TOML file with the same values gives.

    Raises:
        UserError: if a setting is wrong.

    >>> from fedferret import recipe
    >>> quick = recipe(
    ...     seed=1,
    ...     rounds=2,
    ...     model={"name": "tiny"},
    ...     data={"source": "chitchat", "num_clients": 4},
    ...     clients={"per_round": 2},
    ...     algorithm={"name": "ferret", "coordinates": 512},
    ... )
    >>> quick.algorithm.coordinates, quick.rounds
    (512, 2)
    """
    return config.from_tables(tables)


def run(recipe: Recipe, out: str | Path, log: Callable[[str], None] = print) -> Mapping[str, Any]:
    """Run a recipe and return its summary.

    Args:
        recipe: what to run.
        out: the run's folder; an unfinished run of the same recipe in it is resumed.
        log: is called with each line of progress.

    Returns:
        The content of ``summary.json``: ``eval_loss`` (nats per token, round 0 first), ``bytes_up`` and ``bytes_down``
        (totals), ``seconds``, ...

    Raises:
        UserError: if the recipe is wrong; raised before any work.
        RunError: if fewer than ``min_clients`` clients return an update.
    """
    return runner.run(recipe, Path(out), log)
