"""Whole runs on the tiny language model: a recipe, its data file, and a run in a second or two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedferret import recipe
from fedferret.config import Recipe
from fedferret.core.keys import Key
from fedferret.experiment import Experiment
from toys import AnyAlgorithm

NAMES = ("Ann", "Bo", "Cleo", "Dov")
COLOURS = ("red", "green", "blue", "white", "black", "grey")
THINGS = ("door", "cup", "hat", "bird", "stone")


def rows() -> list[dict[str, str]]:
    """Four people, each with their own greeting, who say what colour things are."""
    made = []
    for number, name in enumerate(NAMES):
        for index in range(6 + 2 * number):
            drawn = Key.of(11, name, index)
            colour = COLOURS[int(drawn.uniform(2)[0] * len(COLOURS))]
            thing = THINGS[int(drawn.uniform(2)[1] * len(THINGS))]
            made.append({"who": name, "instruction": f"The {thing}?", "response": f"{name} says: {colour} {thing}."})
    return made


def write_rows(folder: Path) -> Path:
    """The rows as a JSONL file."""
    path = folder / "rows.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def tiny_tables(folder: Path, **changes: Mapping[str, Any] | int) -> dict[str, Any]:
    """The tables of a recipe of three quick rounds; ``algorithm={...}`` and the like are merged in."""
    tables: dict[str, Any] = {
        "seed": 1,
        "rounds": 3,
        "model": {"name": "tiny"},
        "data": {
            "source": "files",
            "path": str(write_rows(folder)),
            "client_column": "who",
            "held_out_fraction": 0.2,
        },
        "text": {"max_tokens": 64},
        "clients": {"per_round": 2},
        "algorithm": {"name": "ferret", "coordinates": 1024},
        "evaluation": {"local_only_clients": 0},
    }
    for name, value in changes.items():
        if not isinstance(value, Mapping):
            tables[name] = value
        elif name == "algorithm" and "name" in value:
            tables[name] = dict(value)
        else:
            tables[name] = {**tables.get(name, {}), **value}
    if "training" not in tables["algorithm"] and "preset" not in tables["algorithm"]:
        tables["algorithm"]["training"] = {"learning_rate": 0.1, "steps": 2}
    return tables


def tiny_recipe(folder: Path, **changes: Mapping[str, Any] | int) -> Recipe:
    """The recipe of those tables."""
    return recipe(**tiny_tables(folder, **changes))


def tiny_experiment(algorithm: AnyAlgorithm, rounds: int) -> Experiment:
    """An experiment in memory with this method."""
    with TemporaryDirectory() as name:
        settings = tiny_recipe(Path(name), rounds=rounds)
        return Experiment.load(replace(settings, algorithm=algorithm), log=lambda line: None)


def silent(line: str) -> None:
    """What a run says, said to nobody."""
