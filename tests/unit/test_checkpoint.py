"""Resuming: after a power failure at any moment a run resumes from a finished round, to the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from contract.methods import METHODS
from fedferret.core.errors import RunError, UserError
from fedferret.runner import run
from fedferret.tracking import checkpoint
from tiny_runs import tiny_recipe
from toys import simulate, toy_task

pytestmark = pytest.mark.slow(seconds=8)


class PowerCut(BaseException):
    """Only the test catches this exception."""


@contextmanager
def power_cut(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[list[str]]:
    """Allow ``after`` changes of the disk (a rename into place, a removal of a file), then raise PowerCut."""
    done: list[str] = []
    replace, unlink = os.replace, Path.unlink

    def counted(action: Any, name: str) -> Any:
        def act(path: Any, *args: Any, **kwargs: Any) -> Any:
            if ".tmp" in str(path) or (name == "unlink" and Path(path).name.startswith(".")):
                return action(path, *args, **kwargs)  # removal of a temporary file
            if len(done) == after:
                raise PowerCut
            done.append(f"{name} {args or path}")
            return action(path, *args, **kwargs)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(replace, "replace"))
        patch.setattr(Path, "unlink", counted(unlink, "unlink"))
        yield done


# large entries that the log folds into snapshots, small ones with private client states, and a server with a state
@pytest.mark.parametrize("name", ["fedavg", "ferret-per-client-momentum-feedback", "drift", "hermits"])
def test_a_crash_at_any_moment_leaves_a_run_that_resumes_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = METHODS[name]
    expected = simulate(algorithm, 3).memory
    with power_cut(monkeypatch, 10_000) as changes:
        assert simulate(algorithm, 3, folder=tmp_path / "whole").memory == expected
    assert len(changes) > 8
    for moment in range(len(changes)):
        folder = tmp_path / str(moment)
        with power_cut(monkeypatch, moment), pytest.raises(PowerCut):
            simulate(algorithm, 3, folder=folder)
        again = simulate(algorithm, 3, folder=folder)
        assert again.memory == expected, f"after {changes[moment]}"


def test_private_states_are_on_disk_before_the_checkpoint_of_their_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, saved, sync, replace = set[str](), list[int](), os.fsync, os.replace

    def synced(handle: int) -> None:
        sync(handle)
        flushed.add(os.readlink(f"/proc/self/fd/{handle}"))

    def replaced(source: Path, target: Path) -> None:
        if Path(target).suffix == ".state" and Path(target).parent.name == "clients":
            flushed.discard(str(Path(target).parent))
        if Path(target).name == "run.state":
            states = [str(path) for path in tmp_path.glob("clients/*.state")]
            assert {*states, str(tmp_path / "clients")} <= flushed
            saved.append(len(states))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    simulate(METHODS["hermits"], 3, folder=tmp_path)
    assert len(saved) == 3 and min(saved) > 1


def test_resuming_with_another_base_is_refused(tmp_path: Path) -> None:
    simulate(METHODS["ferret"], 3, until=2, folder=tmp_path)
    task = toy_task(3)
    for weight in task.model.parameters():
        weight.data.mul_(1.0 + 2.0**-20)
    with pytest.raises(
        RunError, match="version 1: this machine rebuilt other weights than the log says; its base model"
    ):
        simulate(METHODS["ferret"], 3, folder=tmp_path, task=task)


def test_the_state_of_fedferret_0_1_is_refused_with_the_version_that_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "run.state"
    path.parent.mkdir()
    path.write_bytes(b"fF\x01" + bytes(8))
    with pytest.raises(
        RunError, match=r'written by fedferret 0\.1 .* pip install "fedferret==0\.1\.\*" reads it'
    ) as raised:
        checkpoint.saved_round(tmp_path)
    assert "damaged" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_without_a_finished_round_has_none(tmp_path: Path) -> None:
    assert checkpoint.saved_round(tmp_path) is None


def test_only_one_process_at_a_time_runs_in_a_folder(tmp_path: Path) -> None:
    recipe, out = tiny_recipe(tmp_path, rounds=1), tmp_path / "run"
    with FileLock(out / "state" / ".lock"), pytest.raises(UserError, match="another process"):
        (out / "recipe.toml").write_text(recipe.to_toml())  # as while another process runs there
        run(recipe, out)
    assert run(recipe, out)["status"] == "finished"
