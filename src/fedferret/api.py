"""The library in three functions; what the command does, in ten lines of Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedferret import config, runner
from fedferret.config import Recipe


def load_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with overrides such as ``"algorithm.coordinates=8192"``. Raises UserError."""
    return config.load(path, overrides)


def recipe(**tables: Any) -> Recipe:
    """A recipe from Python values, one argument per table of the TOML form. Raises UserError.

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
    """Play ``recipe`` in the folder ``out`` (resumed if it holds an unfinished run of it) and return its summary.

    The summary is what ``summary.json`` holds: ``eval_loss`` (nats per token, round 0 first), ``bytes_up`` and
    ``bytes_down`` (totals), ``seconds``, ... Raises UserError for a wrong recipe before any work, RunError when too
    few clients answer.
    """
    return runner.run(recipe, Path(out), log)
