"""Rewinding: a run that went back and on again has the bits of one that was never disturbed, at every node."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from contract.methods import METHODS, reference
from fedferret.core.errors import RunError, UserError
from fedferret.tracking import checkpoint
from fedferret.tracking.rewinding import past_progress, rewind
from toy_sites import Direct, simulate_sites, sites, workers
from toys import Simulation, simulate
from unit.test_checkpoint import PowerCut, power_cut

pytestmark = pytest.mark.slow(seconds=8)

# large entries and a snapshot a round, private states, a server with a state, two stages with the border after round 2
ROWS = ["fedavg", "ferret-error-feedback", "drift", "hermits", "two-stages"]


def back(folder: Path, round: int, time: float = 0.0) -> None:
    """Rewind the run in a folder at a time; at time 0 the epochs are 1, 2, ..."""
    now = checkpoint.progress(folder)
    assert now is not None
    rewind(folder, past_progress(folder, now, round, 10, lambda: time))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ROWS)
def test_a_rewound_run_goes_on_to_the_bits_of_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    simulate(METHODS[name], 4, folder=tmp_path / "whole")
    for to in range(4):
        folder = tmp_path / str(to)
        shutil.copytree(tmp_path / "whole", folder)
        back(folder, to)
        again = simulate(METHODS[name], 4, folder=folder)
        assert (again.memory, again.state.node.epoch) == (reference(name).memory, 1)
        assert again.history() == reference(name).history()[to:]  # bytes and fingerprints of every round


@pytest.mark.parametrize("name", ["fedavg", "ferret-error-feedback"])
def test_history_is_a_matter_of_disk_alone_and_bounded(name: str, tmp_path: Path) -> None:
    for history in (0, 2, 10):
        folder = tmp_path / str(history)
        run = simulate(METHODS[name], 4, folder=folder, history=history)
        assert run.memory == reference(name).memory and run.history() == reference(name).history()
        now = checkpoint.progress(folder)
        assert now is not None and list(now.window) == list(range(max(0, 4 - history), 5))
        kept = [int(path.stem) for path in (folder / "log").glob("*.snapshot")]
        if name == "fedavg":  # a model a round, and no record beside it
            assert sorted(kept) == [number for number in now.window if number]
            assert not list((folder / "log").glob("*.record"))
        else:
            assert len(list((folder / "clients").iterdir())) == 3 * min(4, history + 1)


def test_rounds_that_are_not_kept_are_refused_by_name(tmp_path: Path) -> None:
    simulate(METHODS["ferret"], 4, folder=tmp_path, history=1)
    before = files(tmp_path)
    for round, reason in (
        (2, r"round 2 is no longer kept: this run keeps rounds 3 to 4 \(execution.history = 10\)"),
        (5, "round 5 is not reached yet: this run is at round 4"),
    ):
        with pytest.raises(UserError, match=reason):
            back(tmp_path, round)
    assert files(tmp_path) == before
    back(tmp_path, 3)
    simulate(METHODS["ferret"], 4, until=4, folder=tmp_path, history=10)
    with pytest.raises(UserError, match="keeps rounds 3 to 4"):  # round 2 stays gone
        back(tmp_path, 2)


@pytest.mark.parametrize("name", ["fedavg", "ferret-error-feedback", "two-stages"])
def test_a_rewinding_that_is_killed_leaves_the_run_before_or_after(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(METHODS[name], 4, folder=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "counted")
    with power_cut(monkeypatch, 10_000) as changes:
        back(tmp_path / "counted", 1)
    assert len(changes) > 4
    for moment in range(len(changes)):
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "whole", folder)
        with power_cut(monkeypatch, moment), pytest.raises(PowerCut):
            back(folder, 1)
        now = checkpoint.progress(folder)
        assert now is not None and (now.round, now.epoch) == ((1, 1) if moment else (4, 0))
        assert simulate(METHODS[name], 4, folder=folder).memory == reference(name).memory


@pytest.mark.parametrize("fault", ["state", "record", "missing"])
def test_a_damaged_round_is_refused_in_one_line_and_nothing_changes(fault: str, tmp_path: Path) -> None:
    simulate(METHODS["ferret"], 4, folder=tmp_path)
    needed = sorted((tmp_path / "log").glob("000001.*"))[0]
    path = tmp_path / "state" / "history" / "000001.state" if fault == "state" else needed
    path.write_bytes(path.read_bytes()[:-3])
    if fault == "missing":
        path.unlink()
    before = files(tmp_path)
    with pytest.raises(
        RunError, match=r"round 1 cannot be rebuilt, choose another one: .* restore the folder"
    ) as raised:
        back(tmp_path, 1)
    assert "\n" not in str(raised.value) and files(tmp_path) == before


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("name", ["fedavg", "ferret", "ferret-error-feedback", "two-stages"])
def test_sites_go_back_with_the_server(name: str, restarted: bool, tmp_path: Path) -> None:
    """A site that is not in the first cohort after the rewinding holds records of the old epoch until it is asked."""
    method, transports = METHODS[name], list[Direct]()
    whole = simulate(method, 4, per_round=2)

    def linked(data: Any) -> Direct:
        known = [] if restarted else transports
        transports.append(known[0] if known else sites(method, 4, tmp_path / "sites")(data))
        return transports[-1]

    said: list[str] = []

    def again() -> Simulation:
        return simulate_sites(method, 4, linked, folder=tmp_path / "server", per_round=2, log=said.append)

    again()
    for to in (3, 1):
        back(tmp_path / "server", to)
        run = again()
        assert (run.public, run.history()) == (whole.public, whole.history()[to:])
    assert not said


@pytest.mark.parametrize("name", ["fedavg", "ferret-error-feedback"])
def test_workers_go_back_with_the_server(name: str, tmp_path: Path) -> None:
    for to in (None, 2):
        if to is not None:
            back(tmp_path, to)
        run = simulate_sites(METHODS[name], 4, workers(METHODS[name], 4), folder=tmp_path, keeps_states=True)
        assert run.memory == reference(name).memory
