"""The files of a run folder, and the ``README.txt`` that explains them to whoever opens it later."""

from __future__ import annotations

from pathlib import Path

from fedferret.core.files import write_atomically

FILES = {
    "recipe.toml": "what was asked for, every setting resolved; `fedferret run recipe.toml` repeats the run",
    "environment.json": "what it ran on: machine and versions",
    "events.jsonl": "what happened, one JSON object a line, in order",
    "summary.json": "the figures of the run so far, rewritten after every round",
    "report.html": "all of it to look at, in any browser, without a network",
    "plots/": "the report's plots, one SVG each",
    "log/": "the tuned model: the entries that lead from the base checkpoint to it",
    "state/": "what resuming needs beside the log: the server's and the clients' private memory",
    "tensorboard/": "the same curves for TensorBoard, if the recipe asks for them",
    "README.txt": "this page",
}


def explain(folder: Path) -> Path:
    """Write ``README.txt``; returns its path."""
    width = max(map(len, FILES))
    lines = [f"{name:<{width}}  {meaning}" for name, meaning in FILES.items()]
    text = "\n".join(["A run of fedferret.", "", *lines, "", "Every file appears whole or not at all.", ""])
    write_atomically(folder / "README.txt", text)
    return folder / "README.txt"
