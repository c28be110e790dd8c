"""What averaging late iterates and falling rates are worth against the walk of the noise, over 150 rounds.

Every node has the log, so the mean of the last N rounds' weights costs no byte. Falling rates are the clients', over
the rounds, for FedAvg and Ferret alike. A row is one method with one schedule and seed: held-out loss,
of the last weights and of means of the last 10, 20 and 40 rounds. Finished rows are appended to
``benchmarks/results/late-average.jsonl`` and never run again.

    python -m benchmarks.late_average            task "long" of benchmarks.equal_bytes, four rows a seed
    python -m benchmarks.late_average --seed 2
    python -m benchmarks.late_average --table    the finished rows
"""

from __future__ import annotations

import argparse
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.classification import finished, keep
from benchmarks.equal_bytes import Cell, settings
from fedferret.core import tree
from fedferret.experiment import Experiment

RESULTS = Path(__file__).parent / "results" / "late-average.jsonl"
WINDOWS, POINTS = (10, 20, 40), (60, 100, 150)
METHODS, SCHEDULES = ("fedavg", "ferret"), ("constant", "linear")
RATE = 0.3  # FedAvg's best of recipes/small/breadth-tune.toml


def measured(method: str, schedule: str, seed: int) -> dict[str, Any]:
    """Run one method; its row.

    Args:
        method: a contender of ``benchmarks.equal_bytes``.
        schedule: of the clients' rate over the rounds.
        seed: of the run.
    """
    made = settings(Cell("long", method, seed, RATE, 1.0))
    training = replace(made.algorithm.training, schedule=schedule)
    made = replace(made, algorithm=replace(made.algorithm, training=training))
    experiment = Experiment.load(made, log=lambda line: None)
    state = experiment.initial_state()
    main = next(iter(experiment.data.held_out))
    last: deque[tree.Tree] = deque(maxlen=max(WINDOWS))

    def loss(weights: Mapping[str, torch.Tensor]) -> float:
        public = replace(state.public, weights=weights)
        with experiment.recipe.algorithm.model(experiment.task, public) as model:
            return round(experiment.evaluator.figures(model, main)["loss"], 4)

    row: dict[str, Any] = {"method": method, "schedule": schedule, "seed": seed, "start": loss(state.public.weights)}
    for record in experiment.run_rounds(state, experiment.engine(state)):
        last.append(tree.clone(state.public.weights))
        if record.round in POINTS:
            row[f"{record.round}"] = loss(state.public.weights)
            for window in WINDOWS:
                some = list(last)[-window:]
                mean = {name: torch.stack([each[name] for each in some]).mean(0) for name in some[0]}
                row[f"{record.round}, mean of {window}"] = loss(mean)
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, a column a point.

    Args:
        rows: finished ones.
    """
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {' | '.join(str(row[name]) for name in columns)} |" for row in rows])


def main() -> None:
    """Run what is asked for and not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the finished rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows = finished(asked.out)
    if asked.table:
        print(table(rows))
        return
    there = {(row["method"], row["schedule"], row["seed"]) for row in rows}
    for method, schedule in itertools.product(METHODS, SCHEDULES):
        if (method, schedule, asked.seed) in there:
            continue
        row = measured(method, schedule, asked.seed)
        keep(row, asked.out)


if __name__ == "__main__":
    main()
