"""Real processes behind real sockets: the same bits as one process, and what happens to those that are disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedferret.core.errors import RunError, UserError
from fedferret.engines.processes import Processes
from fedferret.engines.transport import Received
from fedferret.runner import run
from fedferret.tracking.audit import read_audit
from fedferret.tracking.events import read
from site_folders import (
    FERRET,
    alive,
    log_of,
    processes,
    residents_in,
    sites_recipe,
    wait_until,
    write_sites,
)
from tiny_runs import silent, tiny_recipe, tiny_tables

pytestmark = pytest.mark.slow

ROUNDS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The undisturbed run of three sites in one process: its folder, and the log it left."""
    root = tmp_path_factory.mktemp("whole")
    run(sites_recipe(root, write_sites(root / "sites")), root / "run", silent)
    return root, log_of(root / "run", ROUNDS)


class Disturbed:
    """A transport that hands every delivery, before it is told of, to ``meddle``, which may do anything."""

    def __init__(self, transport: Processes, meddle: Any) -> None:
        self.transport, self.meddle, self.number = transport, meddle, 0

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        self.number += 1
        self.meddle(self, "before", None)
        for received in self.transport.exchange(messages, deadline):
            self.meddle(self, "delivery", received)
            yield received

    def close(self) -> None:
        self.transport.close()


def failures(out: Path) -> dict[int, list[tuple[str, str]]]:
    """Who failed in each round, and why."""
    return {
        n: [(f.client, f.reason) for f in entry.failures] for n, entry in read(out).rounds.items() if entry.failures
    }


@pytest.mark.parametrize("count", [2, 3])
def test_a_simulation_in_processes_has_the_bits_of_one(count: int, tmp_path: Path) -> None:
    run(tiny_recipe(tmp_path, algorithm=FERRET), tmp_path / "one", silent)
    several = tiny_recipe(tmp_path, algorithm=FERRET, execution={"engine": "processes", "workers": count})
    run(several, tmp_path / "several", silent)
    assert log_of(tmp_path / "several", ROUNDS) == log_of(tmp_path / "one", ROUNDS)
    one, more = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "several"))
    for figure in ("eval_loss", "bytes_up_by_round", "bytes_down_by_round", "train_loss_by_round", "baselines"):
        assert one[figure] == more[figure]
    assert not residents_in(tmp_path)


def test_sites_have_the_bits_of_one_process_and_load_their_model_once(whole: Any, tmp_path: Path) -> None:
    folders = write_sites(tmp_path / "sites")
    heard: list[Any] = []
    recipe = sites_recipe(whole[0], write_sites(whole[0] / "sites"))
    run(recipe, tmp_path / "run", silent, transport=processes(folders), record=heard.append)
    assert log_of(tmp_path / "run", ROUNDS) == whole[1]
    ids = {(event["client"], event["process"]) for event in heard if event["what"] == "ok"}
    assert len(ids) == 3 and len({process for _, process in ids}) == 3
    assert not any(alive(process) for _, process in ids)
    for name, folder in folders.items():
        lines = list(read_audit(folder))
        assert [line["what"] for line in lines] == ["request", "ok"] * ROUNDS
        told = [event["framed_bytes"] for event in heard if event["client"] == name]
        assert [line["framed_bytes"] for line in lines] == told
        assert {line["data"] for line in lines if line["what"] == "ok"} != {""}
        assert (folder / "trainer.sock").exists() and not list(folder.rglob(".*.record.*"))


def test_a_server_without_data_plays_and_says_that_it_evaluated_nothing(tmp_path: Path) -> None:
    folders = write_sites(tmp_path / "sites", 2)
    recipe = sites_recipe(tmp_path, folders, rounds=1)
    blind = replace(recipe, data=replace(recipe.data, files=None, held_out_path=None))
    with pytest.raises(UserError, match="client 'ann' holds no example"):
        run(blind, tmp_path / "here", silent)
    summary = run(blind, tmp_path / "run", silent, transport=processes(folders))
    assert summary["status"] == "finished" and summary["eval_loss"] == []
    assert "so nothing was evaluated" in (tmp_path / "run" / "report.html").read_text()
    run(recipe, tmp_path / "seeing", silent)
    assert log_of(tmp_path / "run", 1) == log_of(tmp_path / "seeing", 1)


def test_a_site_killed_in_its_training_is_started_again_and_counted(whole: Any, tmp_path: Path) -> None:
    folders = write_sites(tmp_path / "sites")
    killed: list[int] = []

    def kill(link: Disturbed, when: str, received: Any) -> None:
        if when == "delivery" and len(killed) < ROUNDS - 1 and link.number == len(killed) + 2:
            site = next(name for name in link.transport.process_ids if name != received.site)
            killed.append(link.transport.process_ids[site])
            os.kill(killed[-1], signal.SIGKILL)

    recipe = sites_recipe(whole[0], write_sites(whole[0] / "sites"))
    run(recipe, tmp_path / "run", silent, transport=Disturbed(processes(folders), kill))
    assert len(killed) == ROUNDS - 1
    assert log_of(tmp_path / "run", ROUNDS) == whole[1]
    assert failures(tmp_path / "run") == {} and not residents_in(tmp_path)


def test_a_silent_site_costs_the_deadline_and_comes_back_with_what_it_missed(tmp_path: Path) -> None:
    folders = write_sites(tmp_path / "sites")
    recipe = sites_recipe(tmp_path, folders, rounds=4, execution={"deadline": 90.0})
    stopped: list[int] = []

    def stop(link: Disturbed, when: str, received: Any) -> None:
        if when == "before" and link.number == 2:  # everybody has been started: a short deadline will do
            stopped.append(link.transport.process_ids["bo"])
            os.kill(stopped[0], signal.SIGSTOP)
        if when == "before" and link.number == 4:
            os.kill(stopped[0], signal.SIGCONT)

    class Impatient(Disturbed):
        def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
            return super().exchange(messages, 8.0 if self.number in (1, 2) else deadline)

    heard: list[Any] = []
    run(recipe, tmp_path / "run", silent, transport=Impatient(processes(folders), stop), record=heard.append)
    found = failures(tmp_path / "run")
    assert list(found) == [2, 3] and {entry[0][0] for entry in found.values()} == {"bo"}
    assert all(entry[0][1].startswith("no answer within 8 s") for entry in found.values())
    back = [event for event in heard if event["client"] == "bo" and event["what"] == "ok"]
    assert [event["round"] for event in back] == [1, 4] and {event["process"] for event in back} == {stopped[0]}
    assert not residents_in(tmp_path)


def test_a_killed_worker_of_a_simulation_is_replaced_and_its_clients_run_again(tmp_path: Path) -> None:
    from fedferret.experiment import Experiment

    recipe = tiny_recipe(tmp_path, algorithm=FERRET, clients={"per_round": 4})
    run(recipe, tmp_path / "one", silent)
    several = replace(recipe, execution=replace(recipe.execution, engine="processes"))
    experiment = Experiment.load(several, tmp_path / "several", silent)
    state = experiment.initial_state()
    engine: Any = experiment.engine(state)
    killed = []
    try:
        for record in experiment.play(state, engine, lambda outcome: kill_first(engine, killed)):
            assert record.failures == ()
    finally:
        engine.close()
    assert len(killed) == 1
    assert log_of(tmp_path / "several", ROUNDS) == log_of(tmp_path / "one", ROUNDS)
    assert not residents_in(tmp_path)


def kill_first(engine: Any, killed: list[int]) -> None:
    if not killed:
        killed.append(engine.transport.process_ids["worker-1"])
        os.kill(killed[0], signal.SIGKILL)


def test_a_site_that_cannot_start_is_a_failure_and_too_few_answers_end_the_run_resumable(tmp_path: Path) -> None:
    folders = write_sites(tmp_path / "sites", 2)
    recipe = sites_recipe(tmp_path, write_sites(tmp_path / "copies", 2), rounds=2)
    recipe = replace(recipe, clients=replace(recipe.clients, min_fraction=0.6))
    (folders["bo"] / "rows.jsonl").rename(folders["bo"] / "gone.jsonl")
    with pytest.raises(
        RunError, match=r"round 1: 1 clients answered, 2 are needed \(bo: it did not start: its process"
    ):
        run(recipe, tmp_path / "run", silent, transport=processes(folders))
    (folders["bo"] / "gone.jsonl").rename(folders["bo"] / "rows.jsonl")
    run(recipe, tmp_path / "run", silent, transport=processes(folders))
    run(recipe, tmp_path / "one", silent)
    assert log_of(tmp_path / "run", 2) == log_of(tmp_path / "one", 2)


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fedferret.runner import run
from site_folders import processes, sites_recipe, write_sites
from tiny_runs import silent
root = Path({root!r})
recipe = sites_recipe(Path({whole!r}), write_sites(Path({whole!r}) / "sites"))
run(recipe, root / "run", silent, transport=processes(write_sites(root / "sites")))
"""


def test_thirty_random_kills_end_in_the_undisturbed_weights(whole: Any, tmp_path: Path) -> None:
    seed = int(os.environ.get("KILL_SEED", "20261123"))
    print(f"KILL_SEED={seed}")
    draw = random.Random(seed)
    kills, number = 0, 0
    while kills < 30:
        number += 1
        root = tmp_path / f"run-{number}"
        kills += play_and_kill(root, whole[0], draw, 30 - kills)
        assert failures(root / "run") == {}, f"run {number} of seed {seed}"
        assert json.loads((root / "run" / "summary.json").read_text())["status"] == "finished"
        assert log_of(root / "run", ROUNDS) == whole[1], f"run {number} of seed {seed}"
        wait_until(lambda root=root: not residents_in(root), 30)
    print(f"{kills} kills in {number} runs")


def play_and_kill(root: Path, whole: Path, draw: random.Random, most: int) -> int:
    """One run, its driver started again after every kill of it, until it is finished; returns the number of kills.

    Of one site at most two: a letter that ends three processes in a row is a failure by design.
    """
    tests = str(Path(__file__).parents[1])
    program = PROGRAM.format(tests=tests, root=str(root), whole=str(whole))
    kills: Counter[str] = Counter()
    for _ in range(20):
        driver = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            while driver.poll() is None and kills.total() < min(most, 6):
                rounds = draw.randrange(ROUNDS)
                wait_until(lambda: due(root, rounds) or driver.poll() is not None, 300)  # noqa: B023  # at once
                time.sleep(draw.uniform(0.0, 0.5))
                victims = {"the driver": driver.pid, **{name: process for process, name in residents_in(root).items()}}
                open_to = [name for name in sorted(victims) if kills[name] < 2]
                if not open_to:
                    break
                victim = draw.choice(open_to)
                if driver.poll() is None:
                    os.kill(victims[victim], signal.SIGKILL)
                    kills[victim] += 1
            _, errors = driver.communicate(timeout=600)
        finally:
            driver.kill()
            driver.wait()
        if driver.returncode == 0:
            return kills.total()
        assert driver.returncode == -signal.SIGKILL, errors.decode()[-2000:]
    raise AssertionError("the run did not end")


def due(root: Path, rounds: int) -> bool:
    """Whether that many rounds are in the log, and a site is there to be killed."""
    return len(list((root / "run" / "log").glob("*.record"))) >= rounds and bool(residents_in(root))


def test_a_driver_that_is_killed_takes_its_workers_along(tmp_path: Path) -> None:
    tables = tiny_tables(tmp_path, rounds=50, execution={"engine": "processes"})
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tables))
    program = "from fedferret.cli import main; main()"
    command = [sys.executable, "-c", program, "run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(residents_in(tmp_path)) == 2)
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not residents_in(tmp_path), 30)
