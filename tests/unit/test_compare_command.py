"""A comparison refuses invalid input before any work, and stops and resumes as its runs do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from fedferret.cli import app
from fedferret.comparison import compare
from fedferret.comparison.grid import resolve
from fedferret.comparison.run_status import output_of, record_of, run_status
from fedferret.comparison.worker import Outcome, Worker
from fedferret.config import Recipe
from fedferret.runner import run
from fedferret.tracking.summary import read_summary
from tiny_runs import silent, tiny_recipe
from unit.written_grid import (
    FEDAVG,
    FERRET,
    cell_of,
    grid_tables,
    save,
    write_cell,
    written_grid,
)

PATIENCE = 300.0  # seconds for any wait: the machine may be busy


def fedferret(*words: str | Path, code: int = 0) -> str:
    """Run a command in this process and return its output."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_table_only_and_a_dry_run_run_nothing(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A", "B"])
    path, out = save(grid, tmp_path), tmp_path / "out"
    write_cell(cell_of(grid, out, "A", 1), {0: 5.0, 2: 4.0})
    write_cell(cell_of(grid, out, "A", 2), {0: 5.0, 2: 4.0})
    (out / "grid.toml").write_text(path.read_text())
    before = sorted(out.rglob("*"))
    output = fedferret("compare", path, "--out", out, "--dry-run")
    assert sorted(out.rglob("*")) == before
    assert "A: 2 rounds, 362 KB up" in output and "down per client and round" in output
    assert "seed 1 finished, seed 2 finished" in output
    assert "seed 1 waiting" in output and "Left to run: about" in output
    assert "4.000" in fedferret("compare", path, "--out", out, "--table-only")
    assert (out / "comparison.html").exists() and not (out / "runs" / "b").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "rounds=none"], "rounds='none': must be a whole number"),
        (["--only", "Z"], 'no method of this grid has the label "Z"'),
        (["--jobs", "0"], "jobs=0: must be at least 1"),
        (["--set", "text.template=nowhere.txt"], "A: "),
    ],
)
def test_invalid_input_is_refused_before_any_work(words: list[str], message: str, tmp_path: Path) -> None:
    path = save(written_grid(tmp_path, ["A"]), tmp_path)
    output = fedferret("compare", path, "--out", tmp_path / "out", *words, code=2)
    assert message in output and len(output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_or_other_runs_is_refused(tmp_path: Path) -> None:
    grid = written_grid(tmp_path, ["A"])
    path, out = save(grid, tmp_path), tmp_path / "out"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    assert "holds no grid" in fedferret("compare", path, "--out", tmp_path / "thesis", code=2)
    write_cell(cell_of(grid, out, "A", 1), {0: 5.0, 2: 4.0})
    (out / "grid.toml").write_text("")
    output = fedferret("compare", path, "--out", out, "--set", "rounds=7", code=2)
    assert "holds a run with another rounds (2 there, 7 here)" in output
    with FileLock(out / ".lock"):
        assert "is in use by another process" in fedferret("compare", path, "--out", out, "--table-only", code=2)


# --- processes


def start_grid(path: Path, out: Path) -> subprocess.Popen[str]:
    """The command in a separate process, which can be stopped."""
    program = "from fedferret.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, "compare", str(path), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children would ignore it
    )


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    """Wait for the condition while the process lives."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


def soon(condition: Any) -> None:
    """Wait for the condition, but not for ever."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


def figures(recipe: Recipe, folder: Path) -> list[Any]:
    """The figures that are equal in equal runs."""
    summary = read_summary(folder)
    assert len(summary["eval_loss"]) == recipe.rounds + 1
    return [summary[name] for name in ("eval_loss", "train_loss_by_round", "bytes_up_by_round", "bytes_down_by_round")]


@pytest.mark.slow(seconds=120)
def test_a_grid_gives_the_figures_of_its_recipes_and_continues_after_a_diverged_run(tmp_path: Path) -> None:
    hopeless = {"name": "fedavg", "training": {"learning_rate": 1e30, "clip": "none"}}
    grid = resolve(grid_tables(tmp_path, {"hopeless": hopeless, "A": FEDAVG, "B": FERRET}, seeds=[1]))
    path, out = save(grid, tmp_path), tmp_path / "out"
    bad, a, b = grid.cells(out)
    rows = compare(path, out, jobs=2)
    assert [row.row.label for row in rows][-1] == "hopeless" and len(rows) == 3
    status = run_status(bad)
    assert status.state == "diverged" and status.reason.startswith("round 1: 0 client")
    assert "Resuming" not in output_of(a).read_text()
    for cell in (a, b):
        run(cell.recipe, tmp_path / "plain" / cell.row.slug, silent)
        assert figures(cell.recipe, cell.folder) == figures(cell.recipe, tmp_path / "plain" / cell.row.slug)
        (part,) = json.loads(record_of(cell).read_text())["parts"]
        assert part["outcome"] == "finished" and part["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    records = {cell: record_of(cell).read_bytes() for cell in (bad, a, b)}
    assert compare(path, out)[0].mean == rows[0].mean
    assert {cell: record_of(cell).read_bytes() for cell in (bad, a, b)} == records  # nothing was repeated
    compare(path, out, retry_failed=True)
    changed = [cell for cell, before in records.items() if record_of(cell).read_bytes() != before]
    assert changed == [bad] and len(json.loads(record_of(bad).read_text())["parts"]) == 2


@pytest.mark.slow(seconds=120)
def test_after_ctrl_c_the_same_command_continues_the_grid(tmp_path: Path) -> None:
    grid = resolve(grid_tables(tmp_path, {"A": FEDAVG, "B": FERRET}, seeds=[1], rounds=12))
    path, out = save(grid, tmp_path), tmp_path / "out"
    first, second = grid.cells(out)
    process = start_grid(path, out)
    until(lambda: (first.folder / "log").exists(), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("fedferret: stopped with 0 of 2 runs done; the same command continues")
    assert run_status(first).state == "unfinished" and run_status(second).state == "waiting"
    assert read_summary(first.folder)["status"] == "interrupted"
    assert (out / "comparison.html").exists()
    rows = compare(path, out)
    assert [len(row.runs) for row in rows] == [1, 1]
    assert "Resuming after round" in output_of(first).read_text()
    run(first.recipe, tmp_path / "whole", silent)
    assert figures(first.recipe, first.folder) == figures(first.recipe, tmp_path / "whole")


@pytest.mark.slow(seconds=120)
@pytest.mark.parametrize("forks", [True, False])
def test_a_worker_returns_the_outcome_of_a_run_even_of_a_killed_one(forks: bool, tmp_path: Path) -> None:
    worker = Worker(threads=1, forks=forks)
    quick, long = (tiny_recipe(tmp_path, rounds=rounds) for rounds in (1, 500))
    try:
        worker.start(quick.to_toml(), tmp_path / "quick", tmp_path / "quick.txt")
        assert worker.finish() == Outcome("finished")
        assert "round 1/1" in (tmp_path / "quick.txt").read_text()
        if forks:  # otherwise each of these takes another process, which has nothing to tell
            worker.start(quick.to_toml(), tmp_path / "rows.jsonl", tmp_path / "again.txt")  # a file
            refused = worker.finish()
            assert refused.outcome == "failed" and "is no run folder: choose another one" in refused.reason
            # the child looks for the device, not the worker: a started GPU driver does not survive a fork
            on_gpu = tiny_recipe(tmp_path, execution={"device": "cuda:99"})
            worker.start(on_gpu.to_toml(), tmp_path / "gpu", tmp_path / "gpu.txt")
            assert 'device "cuda:99" is not on this machine' in worker.finish().reason
        worker.start(long.to_toml(), tmp_path / "long", tmp_path / "long.txt")
        soon(lambda: (tmp_path / "long" / "log").exists())
        os.kill(process_of(tmp_path / "long"), signal.SIGKILL)
        assert worker.finish() == Outcome("failed", "its process was ended by SIGKILL, memory may have run out")
        if forks:
            worker.start(long.to_toml(), tmp_path / "long", tmp_path / "again.txt")
            worker.interrupt()  # handled even before the run begins
            assert worker.finish() == Outcome("interrupted")
            worker.close()  # an interrupted worker starts no other run, its successor does
            worker.start(long.to_toml(), tmp_path / "last", tmp_path / "last.txt")
            soon(lambda: (tmp_path / "last" / "log").exists())
            running = Path("/proc") / str(process_of(tmp_path / "last"))
            worker.close()  # as when the grid's process ends in any way: no run outlives it
            soon(lambda: not running.exists())
    finally:
        worker.close()


def process_of(folder: Path) -> int:
    """The newest process that writes the output of the run in ``folder``."""
    output = folder.with_suffix(".txt")
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and os.access(process / "fd", os.R_OK):
            try:
                if Path(os.readlink(process / "fd" / "1")) == output:
                    found.append(int(process.name))
            except OSError:
                continue
    return max(found)
