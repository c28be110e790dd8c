"""How far the rows of a comparison are behind another row of the same seed, FedAvg's if none is named.

python -m docs.behind docs/results/breaks/comparison.json [LABEL]

A line for each run: the loss less the other's after every evaluation, and the share of the other's drop that was
reached at the end. The figures of docs/results.md that compare curves are these, and means of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def behind(comparison: dict[str, Any], label: str) -> list[str]:
    """The lines. ``label`` is the row that the others are compared with, seed by seed."""
    curves = {
        (row["method"], run["seed"]): {point["round"]: point["loss"] for point in run["curve"]}
        for row in comparison["rows"]
        for run in row["runs"]
    }
    lines = []
    for (method, seed), curve in curves.items():
        other = curves.get((label, seed))
        if method == label or other is None:
            continue
        costs = " ".join(f"{int(round)}: {curve[round] - other[round]:.3f}" for round in curve if round in other)
        last = max(curve)
        share = (curve[0] - curve[last]) / (other[0] - other[last])
        lines.append(f"{method}, seed {seed}: {costs}; {share:.1%} of the drop")
    return lines


if __name__ == "__main__":
    label = sys.argv[2] if len(sys.argv) > 2 else "FedAvg"
    print("\n".join(behind(json.loads(Path(sys.argv[1]).read_text()), label)))
