"""The losses of four short runs on the tiny model, as they were when last looked at.

Machines differ in the last bits, so a relative 1e-4 is allowed; a change of a method, of the order of its random
draws, of the data or the loss is far beyond that. Where such a change is meant, write the files anew and say why:

    PYTHONPATH=src:tests python tests/golden/test_golden.py
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from fedferret.runner import run
from tiny_runs import tiny_recipe

METHODS = ("ferret", "ferret-one-bit", "fedavg", "fedprox")
TOLERANCE = 1e-4
TRAINING = {"learning_rate": 0.1, "steps": 2}  # what tiny_recipe gives where no preset is named
FOLDER = Path(__file__).parent


def losses(method: str, folder: Path) -> list[float]:
    """Held-out loss before tuning and after each of three rounds."""
    algorithm: dict[str, Any] = {"name": method}
    if method == "ferret-one-bit":
        algorithm = {"name": "ferret", "preset": "one-bit", "coordinates": 1024, "training": TRAINING}
    if method == "fedprox":
        algorithm["mu"] = 1.0
    found: list[float] = run(tiny_recipe(folder, algorithm=algorithm), folder / "run", lambda line: None)["eval_loss"]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_losses_are_what_they_were(method: str, tmp_path: Path) -> None:
    kept = [float(line) for line in (FOLDER / f"{method}.txt").read_text().split()]
    assert losses(method, tmp_path) == pytest.approx(kept, rel=TOLERANCE)


def test_the_files_tell_the_methods_apart() -> None:
    kept = [[float(line) for line in (FOLDER / f"{method}.txt").read_text().split()] for method in METHODS]
    assert all(len(each) == 4 and each[0] == kept[0][0] for each in kept)
    for left, right in pairwise(kept):
        assert abs(left[-1] - right[-1]) > 5 * TOLERANCE * left[-1]


if __name__ == "__main__":
    for name in METHODS:
        with TemporaryDirectory() as folder:
            lines = [f"{loss:.8f}\n" for loss in losses(name, Path(folder))]
        (FOLDER / f"{name}.txt").write_text("".join(lines))
        sys.stdout.write(f"{name}: {' '.join(map(str.strip, lines))}\n")
