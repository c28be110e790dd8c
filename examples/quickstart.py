"""Federated tuning in ten lines: four people, two of them a round, a kilobyte up per person and round.

    python examples/quickstart.py                              the tiny random model: seconds
    python examples/quickstart.py --model packaged:smollm2     the real one: minutes
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedferret


def tune(model: str, out: Path) -> Mapping[str, Any]:
    """Tune ``model`` by Ferret on the messages of eight people; the folder ``out`` then holds report and model.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     summary = tune("tiny", Path(folder) / "run")
    """
    recipe = fedferret.recipe(
        seed=1,
        rounds=3,
        model={"name": model},
        data={"source": "chitchat", "num_clients": 8, "max_messages": 40, "max_held_out": 32},
        text={"max_tokens": 128},
        clients={"per_round": 2},
        algorithm={"name": "ferret", "coordinates": 4096, "training": {"learning_rate": 0.01, "steps": 5}},
    )
    return fedferret.run(recipe, out)
