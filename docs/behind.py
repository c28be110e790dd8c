"""How far the rows of a comparison are behind another row of the same seed, FedAvg's if none is named.

python -m docs.behind docs/results/breaks/comparison.json [LABEL]

A line for each run: the loss less the other's after every evaluation, the share of the other's drop that was reached
at the end, and after how many rounds and seconds the other's last loss was reached, of the rounds that were evaluated.
The figures of docs/results.md that compare curves are these, and means of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def behind(comparison: dict[str, Any], label: str) -> list[str]:
    """The lines. ``label`` is the row that the others are compared with, seed by seed."""
    curves = {(row["method"], run["seed"]): run["curve"] for row in comparison["rows"] for run in row["runs"]}
    lines = []
    for (method, seed), curve in curves.items():
        if method == label or (label, seed) not in curves:
            continue
        others = curves[label, seed]
        loss = {point["round"]: point["loss"] for point in others}
        costs = [
            f"{int(point['round'])}: {point['loss'] - loss[point['round']]:.3f}"
            for point in curve
            if point["round"] in loss
        ]
        share = (curve[0]["loss"] - curve[-1]["loss"]) / (others[0]["loss"] - others[-1]["loss"])
        level = next((point for point in curve if point["loss"] <= others[-1]["loss"]), None)
        when = f"level after {_when(level)}, where it took {_when(others[-1])}" if level else "never level"
        lines.append(f"{method}, seed {seed}: {' '.join(costs)}; {share:.1%} of the drop; {when}")
    return lines


def _when(point: dict[str, float]) -> str:
    return f"{point['round']:.0f} rounds and {point['seconds']:.0f} s"


if __name__ == "__main__":
    label = sys.argv[2] if len(sys.argv) > 2 else "FedAvg"
    print("\n".join(behind(json.loads(Path(sys.argv[1]).read_text()), label)))
