"""The files of a run folder, and the ``README.txt`` that explains them."""

from __future__ import annotations

from pathlib import Path

from fedferret.core.files import write_atomically

FILES = {
    "recipe.toml": "the recipe with every setting resolved; `fedferret run recipe.toml` repeats the run",
    "environment.json": "the machine and the package versions",
    "events.jsonl": "the event log, one JSON object per line, in order",
    "summary.json": "the metrics of the run so far, rewritten after every round",
    "report.html": "the report, for any browser, without a network",
    "plots/": "the report's plots, one SVG each",
    "log/": "the tuned model: the log entries that turn the base checkpoint into it",
    "state/": "the checkpoints: server states and private client states, for resuming and rewinding",
    "tensorboard/": "the same curves for TensorBoard, if the recipe turns it on",
    "README.txt": "this file",
}


def explain(folder: Path) -> Path:
    """Write ``README.txt``, which says what each file is.

    Args:
        folder: of a run.

    Returns:
        The file's path.
    """
    width = max(map(len, FILES))
    lines = [f"{name:<{width}}  {meaning}" for name, meaning in FILES.items()]
    text = "\n".join(["A run of fedferret.", "", *lines, "", "Every file appears whole or not at all.", ""])
    write_atomically(folder / "README.txt", text)
    return folder / "README.txt"
