"""Ray actors: the same bits as one process, on loopback only; a lost worker's clients run again; rounds of many."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedferret.core.errors import UserError
from fedferret.experiment import Experiment
from fedferret.runner import run
from site_folders import alive, log_of, wait_until
from tiny_runs import silent, tiny_recipe

ROUNDS = 3
SMALL_REPLIES = {
    "name": "ferret",
    "preset": "one-bit",  # shared directions: replies add up, and one entry comes down for all 300
    "coordinates": 64,
    "training": {"learning_rate": 0.1, "steps": 1, "batch_size": 1},
}


def test_without_ray_the_recipe_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = tiny_recipe(tmp_path, execution={"engine": "ray"})
    with pytest.raises(UserError, match=r'execution.engine="ray" needs Ray: pip install "fedferret\[ray\]"'):
        run(recipe, tmp_path / "run", silent)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    yield pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedferret[ray]'")


def children(process: int) -> set[int]:
    """All processes that descend from this one."""
    found, waiting = set(), [process]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            new = {int(child) for child in task.read_text().split()} - found
            found |= new
            waiting += new
    return found


def listening(processes: set[int]) -> set[str]:
    """The addresses, without ports, on which these processes listen."""
    table = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    lines = [line for line in table.splitlines() if any(f"pid={process}," in line for process in processes)]
    return {line.split()[3].rpartition(":")[0].removeprefix("[::ffff:").strip("[]") for line in lines}


@pytest.mark.slow(seconds=75)
def test_actors_have_the_bits_of_one_process_lose_one_and_listen_on_loopback(ray: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        data={"path": str(many_rows(tmp_path)), "held_out_fraction": 0.01},
        algorithm=SMALL_REPLIES,
        clients={"per_round": 150},
    )
    run(recipe, tmp_path / "one", silent)
    several = replace(recipe, execution=replace(recipe.execution, engine="ray", workers=2, worker_cpus=0.5))
    experiment = Experiment.load(several, tmp_path / "several", silent)
    state = experiment.initial_state()
    recorded: list[Any] = []
    engine: Any = experiment.engine(state, on_message=recorded.append)
    processes: set[int] = set()
    try:
        for record in experiment.run_rounds(state, engine):
            assert record.failures == () and len(record.metrics) == 150
            processes |= children(os.getpid())
            if record.round == 1:
                assert listening(processes | {os.getpid()}) == {"127.0.0.1"}
            if record.round == 2:
                (lost, *_) = {event["process"] for event in recorded if event["what"] == "done" and event["round"] == 2}
                os.kill(lost, signal.SIGKILL)
    finally:
        engine.close()
    assert log_of(tmp_path / "several", ROUNDS) == log_of(tmp_path / "one", ROUNDS)
    workers: dict[int, set[int]] = defaultdict(set)
    for event in recorded:
        if event["what"] == "done":
            workers[event["round"]].add(event["process"])
    assert workers[1] == workers[2] and len(workers[1]) == 2  # resident: the model was loaded once
    assert lost not in workers[3]
    wait_until(lambda: not any(alive(process) for process in processes))


def many_rows(folder: Path) -> Path:
    """Two rows for each of 150 people."""
    path = folder / "many.jsonl"
    path.write_text(
        "".join(
            json.dumps({"who": f"person-{number // 2:03d}", "instruction": "The cup?", "response": f"Cup {number}."})
            + "\n"
            for number in range(310)
        )
    )
    return path
