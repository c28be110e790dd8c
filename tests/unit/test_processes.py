"""Real processes behind real sockets: the same bits as one process, also when processes are killed or stopped."""

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
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedferret.core.errors import RunError, UserError
from fedferret.engines.processes import Processes
from fedferret.engines.transport import Received
from fedferret.runner import run
from fedferret.tracking.audit import read_audit
from fedferret.tracking.events import read
from site_folders import FERRET, alive, log_of, processes, residents_in, sites_recipe, wait_until, write_sites
from tiny_runs import silent, tiny_recipe

pytestmark = pytest.mark.slow(seconds=130)

ROUNDS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The undisturbed run of three sites in one process: its folder, and the log it left."""
    root = tmp_path_factory.mktemp("whole")
    run(sites_recipe(root, write_sites(root / "sites")), root / "run", silent)
    return root, log_of(root / "run", ROUNDS)


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Path], Processes]]:
    """Three sites that outlive a run, as real sites do: their folders, and their processes."""
    root = tmp_path_factory.mktemp("resident")
    folders = write_sites(root / "sites")
    with closing(processes(folders)) as transport:
        yield folders, transport
    assert not residents_in(root)


class Borrowed:
    """A transport that calls ``meddle`` before each exchange, and with every Received before yielding it."""

    def __init__(self, transport: Processes, meddle: Any = lambda link, when, received: None) -> None:
        self.transport, self.meddle, self.number = transport, meddle, 0

    def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
        self.number += 1
        self.meddle(self, "before", None)
        for received in self.transport.exchange(messages, deadline):
            self.meddle(self, "received", received)
            yield received

    def close(self) -> None:
        """Whoever lent the transport closes it."""


def failures(out: Path) -> dict[int, list[tuple[str, str]]]:
    """The clients that failed in each round, and why."""
    return {
        n: [(f.client, f.reason) for f in entry.failures] for n, entry in read(out).rounds.items() if entry.failures
    }


def test_sites_have_the_bits_of_one_process_and_load_their_model_once(
    whole: Any, resident: Any, tmp_path: Path
) -> None:
    folders, transport = resident
    recorded: list[Any] = []
    recipe = sites_recipe(whole[0], write_sites(whole[0] / "sites"))
    run(recipe, tmp_path / "run", silent, transport=Borrowed(transport), on_message=recorded.append)
    assert log_of(tmp_path / "run", ROUNDS) == whole[1]
    ids = {(event["client"], event["process"]) for event in recorded if event["what"] == "done"}
    assert len(ids) == 3 and len({process for _, process in ids}) == 3
    for name, folder in folders.items():
        lines = list(read_audit(folder))
        assert [line["what"] for line in lines] == ["request", "done"] * ROUNDS
        sent = [event["framed_bytes"] for event in recorded if event["client"] == name]
        assert [line["framed_bytes"] for line in lines] == sent
        assert {line["data"] for line in lines if line["what"] == "done"} != {""}
        assert (folder / "trainer.sock").exists() and not list(folder.rglob(".*.record.*"))


def test_a_server_without_data_runs_and_reports_that_it_evaluated_nothing(resident: Any, tmp_path: Path) -> None:
    folders, transport = resident
    recipe = sites_recipe(tmp_path, folders, rounds=1)
    blind = replace(recipe, data=replace(recipe.data, files=None, held_out_path=None))
    with pytest.raises(UserError, match="client 'ann' holds no example"):
        run(blind, tmp_path / "here", silent)
    summary = run(blind, tmp_path / "run", silent, transport=Borrowed(transport))
    assert summary["status"] == "finished" and summary["eval_loss"] == []
    assert "so nothing was evaluated" in (tmp_path / "run" / "report.html").read_text()
    run(recipe, tmp_path / "seeing", silent)
    assert log_of(tmp_path / "run", 1) == log_of(tmp_path / "seeing", 1)


def test_a_site_killed_in_training_is_started_again_and_counted(whole: Any, resident: Any, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(link: Borrowed, when: str, received: Any) -> None:
        if when == "received" and not killed and link.number == 2:
            site = next(name for name in link.transport.process_ids if name != received.site)
            killed.append(link.transport.process_ids[site])
            os.kill(killed[-1], signal.SIGKILL)

    recipe = replace(sites_recipe(whole[0], write_sites(whole[0] / "sites")), seed=2)
    run(recipe, tmp_path / "one", silent)
    run(recipe, tmp_path / "run", silent, transport=Borrowed(resident[1], kill))
    assert len(killed) == 1
    assert log_of(tmp_path / "run", ROUNDS) == log_of(tmp_path / "one", ROUNDS)
    assert failures(tmp_path / "run") == {}


def test_a_site_that_does_not_reply_costs_the_deadline_and_is_sent_what_it_missed(
    resident: Any, tmp_path: Path
) -> None:
    folders, transport = resident
    recipe = sites_recipe(tmp_path, folders, seed=3)
    stopped: list[int] = []

    def stop(link: Borrowed, when: str, received: Any) -> None:
        if when == "before" and link.number == 2:  # every site has been started: a short deadline is enough
            stopped.append(link.transport.process_ids["bo"])
            os.kill(stopped[0], signal.SIGSTOP)
        if when == "before" and link.number == 3:
            os.kill(stopped[0], signal.SIGCONT)

    class Impatient(Borrowed):
        def exchange(self, messages: Mapping[str, bytes], deadline: float) -> Iterator[Received]:
            return super().exchange(messages, 8.0 if self.number == 1 else deadline)

    recorded: list[Any] = []
    run(recipe, tmp_path / "run", silent, transport=Impatient(transport, stop), on_message=recorded.append)
    found = failures(tmp_path / "run")
    assert list(found) == [2] and [client for client, _ in found[2]] == ["bo"]
    assert found[2][0][1].startswith("no reply within 8 s")
    back = [event for event in recorded if event["client"] == "bo" and event["what"] == "done"]
    assert [event["round"] for event in back] == [1, 3] and {event["process"] for event in back} == {stopped[0]}


def test_a_site_that_cannot_start_is_a_failure_and_a_run_with_too_few_replies_can_be_resumed(tmp_path: Path) -> None:
    folders = write_sites(tmp_path / "sites", 2)
    recipe = sites_recipe(tmp_path, write_sites(tmp_path / "copies", 2), rounds=2)
    recipe = replace(recipe, clients=replace(recipe.clients, min_fraction=0.6))
    (folders["bo"] / "rows.jsonl").rename(folders["bo"] / "gone.jsonl")
    with closing(processes(folders)) as transport:
        with pytest.raises(RunError, match=r"round 1: 1 .*2 are needed \(bo: it did not start: its process"):
            run(recipe, tmp_path / "run", silent, transport=Borrowed(transport))
        (folders["bo"] / "gone.jsonl").rename(folders["bo"] / "rows.jsonl")
        run(recipe, tmp_path / "run", silent, transport=Borrowed(transport))
    run(recipe, tmp_path / "one", silent)
    assert log_of(tmp_path / "run", 2) == log_of(tmp_path / "one", 2)


def test_workers_have_the_bits_of_one_process_and_a_killed_ones_clients_run_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, algorithm=FERRET, clients={"per_round": 4})
    run(recipe, tmp_path / "one", silent)
    killed: list[int] = []

    def kill_first(event: Mapping[str, Any]) -> None:
        if event["what"] == "done" and event["client"] and not killed:
            killed.append(event["process"])
            os.kill(killed[0], signal.SIGKILL)

    several = replace(recipe, execution=replace(recipe.execution, engine="processes", workers=2))
    run(several, tmp_path / "several", silent, on_message=kill_first)
    assert killed and failures(tmp_path / "several") == {}
    assert log_of(tmp_path / "several", ROUNDS) == log_of(tmp_path / "one", ROUNDS)
    one, more = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "several"))
    for figure in ("eval_loss", "bytes_up_by_round", "bytes_down_by_round", "train_loss_by_round", "baselines"):
        assert one[figure] == more[figure]
    assert not residents_in(tmp_path) and not alive(killed[0])


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fedferret.runner import run
from site_folders import processes, sites_recipe, write_sites
from tiny_runs import silent
root = Path({root!r})
recipe = sites_recipe(Path({whole!r}), write_sites(Path({whole!r}) / "sites", 2))
run(recipe, root / "run", silent, transport=processes(write_sites(root / "sites", 2)))
"""


def test_random_kills_end_in_the_undisturbed_weights(tmp_path: Path) -> None:
    """The driver of two sites, then a site; KILLS=30 kills thirty times, over several runs."""
    seed, wanted = int(os.environ.get("KILL_SEED", "20261123")), int(os.environ.get("KILLS", "2"))
    print(f"KILL_SEED={seed} KILLS={wanted}")
    whole = tmp_path / "whole"
    run(sites_recipe(whole, write_sites(whole / "sites", 2)), whole / "run", silent)
    undisturbed = log_of(whole / "run", ROUNDS)
    draw = random.Random(seed)
    kills, number = 0, 0
    while kills < wanted:
        number += 1
        root = tmp_path / f"run-{number}"
        kills += run_and_kill(root, whole, draw, wanted - kills)
        assert failures(root / "run") == {}, f"run {number} of seed {seed}"
        assert json.loads((root / "run" / "summary.json").read_text())["status"] == "finished"
        assert log_of(root / "run", ROUNDS) == undisturbed, f"run {number} of seed {seed}"
        wait_until(lambda root=root: not residents_in(root), 30)
    print(f"{kills} kills in {number} runs")


def run_and_kill(root: Path, whole: Path, draw: random.Random, most: int) -> int:
    """Finish one run, starting its driver again after every kill; return the number of kills.

    The first victim is the driver, with which its sites' processes end. One site is killed at most twice: a message
    that ends three processes in a row is a failure by design.
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
                victim = draw.choice(open_to) if kills else "the driver"
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
        wait_until(lambda: not residents_in(root), 60)
    raise AssertionError("the run did not end")


def due(root: Path, rounds: int) -> bool:
    """Whether the log has that many rounds, and a site's process runs."""
    return len(list((root / "run" / "log").glob("*.record"))) >= rounds and bool(residents_in(root))


def test_sites_score_what_they_hold_out_and_a_server_without_data_reports_it(resident: Any, tmp_path: Path) -> None:
    folders, transport = resident
    changes = {
        "clients": {"per_round": 3, "held_out": 0.3},
        "evaluation": {"per_client": True, "local_only_clients": 0},
    }
    recipe = sites_recipe(tmp_path, folders, rounds=1, **changes)
    run(recipe, tmp_path / "here", silent)
    run(recipe, tmp_path / "there", silent, transport=Borrowed(transport))
    assert log_of(tmp_path / "here", 1) == log_of(tmp_path / "there", 1)
    here, there = (read(tmp_path / name).evaluations[1] for name in ("here", "there"))
    assert set(here.clients) == set(folders) and here.clients == there.clients and here.results == there.results
    blind = replace(recipe, data=replace(recipe.data, files=None, held_out_path=None))
    run(blind, tmp_path / "blind", silent, transport=Borrowed(transport))
    alone = read(tmp_path / "blind").evaluations[1]
    assert alone.clients == there.clients and set(alone.results) == {"clients"} and not alone.unscored
    assert alone.results["clients"]["tokens"] == sum(each["tokens"] for each in alone.clients.values())
    assert alone.moved.keys() == folders.keys()
