"""Files appear whole, on disk, with the modes that were asked for, and where they were asked for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedferret.core.errors import UserError
from fedferret.core.files import inside, write_atomically
from fedferret.core.log import Log
from fedferret.core.mapped import MappedTree
from fedferret.engines.client_store import FolderClientStore
from fedferret.engines.site_folder import RunFolder
from fedferret.models.folders import build_folder
from fedferret.tracking.events import EventLog
from fedferret.tracking.report import write_report
from fedferret.tracking.summary import write_summary
from fedferret.wire import codec
from unit.written_run import write_run


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask for the length of a test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_follow_the_umask_and_private_ones_are_the_owners(umask: int, tmp_path: Path) -> None:
    write_atomically(tmp_path / "run" / "summary.json", "{}")
    write_atomically(tmp_path / "run" / "summary.json", "{}")  # replacing a file is no exception
    build_folder(tmp_path / "model", lambda folder: (folder / "weights").write_bytes(b"w"))
    Log(tmp_path / "run" / "log").append(b"record", 100, bytes)
    for path in (tmp_path / "run" / "summary.json", tmp_path / "model" / "weights", tmp_path / "run/log/000001.record"):
        assert (mode(path), mode(path.parent)) == (0o666 & ~umask, 0o777 & ~umask), path
    FolderClientStore(tmp_path / "run" / "state" / "clients", codec, {}).stage("a", 1, 1)
    RunFolder(tmp_path / "site" / "runs" / "r").keep("a", 1, b"private")
    states = list(tmp_path.rglob("*.state"))
    assert len(states) == 2 and all((mode(path), mode(path.parent)) == (0o600, 0o700) for path in states)


def test_a_rename_is_on_disk_when_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{handle}')).name.partition('.x.')[0] or 'x'}")
        sync(handle)

    def replaced(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "new" / "x", b"content")
    assert done == [f"flush {tmp_path.name}", "flush x", "rename", "flush new"]  # the new folder's name too
    done.clear()
    write_atomically(tmp_path / "new" / "x", b"content")
    assert done == ["flush x", "rename", "flush new"]
    done.clear()
    EventLog(tmp_path / "new").write("start")
    EventLog(tmp_path / "new").write("end")
    assert done == ["flush events.jsonl", "flush new", "flush events.jsonl"]


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "state"
    folder.mkdir()
    for name in (f".weights-{os.getpid()}", ".base", "x", ".x."):
        (folder / name).symlink_to(victim)
    MappedTree(folder, {"w": torch.ones(3)})
    write_atomically(folder / "x", "new")
    assert victim.read_text() == "mine" and not (folder / "x").is_symlink()
    assert len(list(folder.iterdir())) == 4  # and the weights left no file behind


@pytest.mark.parametrize("name", ["events.jsonl", "summary.json", "environment.json", "recipe.toml", "plots"])
def test_a_report_follows_no_link_out_of_its_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    write_run(folder)
    write_summary(folder)
    plot = SimpleNamespace(name="loss", svg="<svg/>", title="", text="", themed="")
    monkeypatch.setattr("fedferret.tracking.plots.draw", lambda run: [plot])
    (folder / "plots").mkdir()
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} is a link that leads out of .*: remove the link"):
        write_report(folder)
    assert not (folder / "report.html").exists() and not (outside.is_dir() and any(outside.iterdir()))
    (folder / name).unlink()
    outside.rename(folder / f"real-{name}")
    (folder / name).symlink_to(f"real-{name}")  # within the folder a link is as good as a file
    (tmp_path / "linked").symlink_to(folder)  # and the folder itself may be one
    assert write_report(tmp_path / "linked").exists()


def test_what_is_inside_is_the_same_path(tmp_path: Path) -> None:
    assert inside(tmp_path, tmp_path / "none" / "yet") == tmp_path / "none" / "yet"
    with pytest.raises(UserError):
        inside(tmp_path, tmp_path / ".." / "x")
