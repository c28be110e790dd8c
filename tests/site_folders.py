"""Sites on disk with the tiny model: their folders, a recipe that names them, and processes to disturb."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedferret.config import Recipe
from fedferret.core.log import Log, LogUpdate
from fedferret.engines.processes import Processes
from fedferret.resident.simulation import RESIDENT
from tiny_runs import NAMES, rows, tiny_recipe

FERRET = {
    "name": "ferret",
    "preset": "one-bit",
    "coordinates": 1024,
    "error_feedback": True,
    "server_momentum": 0.5,
    "scale": "shrunk",
}
THREADS = {"OMP_NUM_THREADS": "1"}  # a tiny model gains nothing by more, and the tests share their machine


def write_sites(root: Path, count: int = 3) -> dict[str, Path]:
    """Site folders "ann", "bo", ... with one person's rows each."""
    folders = {}
    for name in NAMES[:count]:
        folder = root / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        held = [row for row in rows() if row["who"] == name]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
        (folder / "site.toml").write_text(
            tomli_w.dumps({"name": name.lower(), "threads": 1, "data": {"path": "rows.jsonl"}})
        )
        folders[name.lower()] = folder
    return folders


def sites_recipe(root: Path, folders: Mapping[str, Path], **changes: Any) -> Recipe:
    """A recipe over those sites, whose files are at hand, so that one process can play it too."""
    held_out = root / "held-out.jsonl"
    if not held_out.exists():
        held_out.write_text("".join(json.dumps(row) + "\n" for row in rows()[-6:]))
    data = {
        "source": "sites",
        "sites": list(folders),
        "files": {name: str(folder / "rows.jsonl") for name, folder in folders.items()},
        "held_out_path": str(held_out),
    }
    changes = {"clients": {"per_round": len(folders)}, **changes}
    recipe = tiny_recipe(root, algorithm=FERRET, **changes)
    tables = {**recipe.tables(), "data": data}
    del tables["clients"]["bound_weights"]  # as for any recipe that does not say: on, because sites hold the data
    from fedferret.config import from_tables

    return from_tables(tables)


def log_of(out: Path, rounds: int) -> LogUpdate:
    """All that a run's model is made of."""
    return Log.read(out / "log", rounds).since(0)


def processes(folders: Mapping[str, Path]) -> Processes:
    """A resident process for each site, started when it is first asked."""
    return Processes(folders, RESIDENT, THREADS)


def wait_until(happened: Any, seconds: float = 300.0) -> None:
    """Until ``happened()`` is true, looked at every twentieth of a second."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether a process of that id runs (a zombie does not)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def residents_in(root: Path) -> dict[int, str]:
    """Ids of the resident processes whose folder is below ``root``, with the folder's name."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and alive(int(entry)):
            try:
                words = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if "fedferret.resident" in words:
                found |= {int(entry): Path(word).name for word in words if word.startswith(f"{root}/")}
    return found
