"""Federated tuning in ten lines: eight people as clients, two per round, under a kilobyte up per client and round.

python examples/quickstart.py                              the tiny random model: seconds
python examples/quickstart.py --model packaged:smollm2     the real one: minutes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedferret


def tune(model: str, out: Path) -> Mapping[str, Any]:
    """Tune a model by Ferret on real messages.

    Args:
        model: "tiny", "packaged:smollm2", a folder, or a Hugging Face hub name.
        out: the run's folder; afterwards it has the report and the tuned model.
    Returns:
        The run's summary.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
    ...     summary = tune("tiny", Path(folder) / "run")
    150 of 352 examples open with a message that is not the user's: ...
    text.max_tokens=128 cuts, of all 352 examples, ... at the end of the response ...
    Data: chitchat ...
    round 0/3: held-out loss 5.5...
    round 3/3: held-out loss 5.2...
    >>> summary["eval_loss"][-1] < summary["eval_loss"][0], summary["bytes_up_per_client_round"] < 1000
    (True, True)
    """
    recipe = fedferret.recipe(
        rounds=3,
        model={"name": model},
        data={"source": "chitchat", "num_clients": 8, "max_messages": 40, "max_held_out": 32},
        text={"max_tokens": 128},
        clients={"per_round": 2},
        algorithm={"name": "ferret", "training": {"learning_rate": 0.01, "steps": 5}},
        evaluation={"local_only_clients": 0},
    )
    return fedferret.run(recipe, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tune a model by Ferret on the messages of eight people.")
    parser.add_argument("--model", default="tiny", help='"packaged:smollm2", a folder, or a Hugging Face hub name')
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="the run's folder")
    given = parser.parse_args()
    try:
        tune(given.model, given.out)
    except fedferret.UserError as error:
        sys.exit(f"quickstart: {error}")
    print(f"Report: {given.out / 'report.html'}")
