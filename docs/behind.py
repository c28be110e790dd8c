"""The loss gap between the rows of a comparison and a baseline row, seed by seed.

python -m docs.behind docs/results/breaks/comparison.json [LABEL]      the baseline's label, FedAvg by default

A line per run: the loss minus the baseline's after every shared evaluation; the loss reduction relative to the
baseline, (loss_0 - loss_R) / (the baseline's loss_0 - loss_R) with R the last round; and the rounds and seconds to the
baseline's last loss, at the first evaluation with at most that loss.
docs/results.md takes its figures about curves, and means of them, from these lines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def behind(comparison: dict[str, Any], label: str) -> list[str]:
    """The lines of a comparison.

    Args:
        comparison: the content of comparison.json.
        label: of the baseline's row.
    """
    curves = {(row["method"], run["seed"]): run["curve"] for row in comparison["rows"] for run in row["runs"]}
    lines = []
    for (method, seed), curve in curves.items():
        if method == label or (label, seed) not in curves:
            continue
        baseline = curves[label, seed]
        loss = {point["round"]: point["loss"] for point in baseline}
        gaps = [
            f"{int(point['round'])}: {point['loss'] - loss[point['round']]:.3f}"
            for point in curve
            if point["round"] in loss
        ]
        share = (curve[0]["loss"] - curve[-1]["loss"]) / (baseline[0]["loss"] - baseline[-1]["loss"])
        level = next((point for point in curve if point["loss"] <= baseline[-1]["loss"]), None)
        when = f"level after {_when(level)}, {label} after {_when(baseline[-1])}" if level else "never level"
        lines.append(f"{method}, seed {seed}: {' '.join(gaps)}; loss reduction relative to {label} {share:.1%}; {when}")
    return lines


def _when(point: dict[str, float]) -> str:
    return f"{point['round']:.0f} rounds and {point['seconds']:.0f} s"


if __name__ == "__main__":
    label = sys.argv[2] if len(sys.argv) > 2 else "FedAvg"
    print("\n".join(behind(json.loads(Path(sys.argv[1]).read_text()), label)))
