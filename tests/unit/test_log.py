"""The log: what a node lacks in the fewest bytes, bounded in size, and whole on disk whatever stops the process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedferret.core.log import Log
from fedferret.disk import log_bytes


def filled(
    versions: int, record_bytes: int, snapshot_bytes: int, folder: Path | None = None, prune: bool = True
) -> Log:
    log = Log(folder)
    for version in range(1, versions + 1):
        snapshot = f"S{version}".encode().ljust(snapshot_bytes, b".")
        log.append(f"R{version}".encode().ljust(record_bytes, b"."), snapshot_bytes, lambda snapshot=snapshot: snapshot)
        if prune:
            log.prune()
    return log


def names(update_parts: tuple[bytes, ...]) -> list[str]:
    return [part.decode().rstrip(".") for part in update_parts]


def test_a_node_receives_the_records_it_has_not_applied() -> None:
    log = filled(5, 10, 1000)
    assert names(log.since(2).records) == ["R3", "R4", "R5"] and log.since(2).snapshot is None
    assert log.since(2).size == 30
    assert log.since(5).records == () and log.since(5).size == 0


def test_small_records_are_never_folded_and_large_ones_at_once() -> None:
    assert filled(20, 10, 1000).since(0).snapshot is None
    log = filled(3, 1000, 1000)
    update = log.since(0)
    assert update.snapshot is not None and update.snapshot.startswith(b"S3") and not update.records
    assert log.since(2) == update  # one model is fewer bytes than one more change
    assert log.since(3).size == 0


@pytest.mark.parametrize("record_bytes", [3, 40, 77, 130, 999])
def test_nobody_downloads_more_than_one_and_a_half_models(record_bytes: int) -> None:
    for versions in range(1, 30):
        log = filled(versions, record_bytes, 1000)
        for version in range(versions):
            update = log.since(version)
            assert update.size <= 1500
            held = names(update.records)
            start = int(update.snapshot[1:].rstrip(b".")) if update.snapshot else version
            assert held == [f"R{number}" for number in range(start + 1, versions + 1)]
            missing = record_bytes * (versions - version)
            assert update.size <= missing or update.size <= 1500


def test_the_folder_holds_the_same_log(tmp_path: Path) -> None:
    for record_bytes in (10, 400, 1000):
        folder = tmp_path / str(record_bytes)
        log = filled(7, record_bytes, 1000, folder)
        for again in (Log.read(folder, 7), Log.open(folder, 7)):
            assert again.version == 7
            assert [again.since(version) for version in range(8)] == [log.since(version) for version in range(8)]
        newest = {path.suffix for path in folder.iterdir()}
        assert sum(path.suffix == ".snapshot" for path in folder.iterdir()) == (".snapshot" in newest)


@pytest.mark.parametrize("record_bytes", [10, 400, 1000])
def test_the_version_before_stays_whole_until_the_new_one_is_settled(record_bytes: int, tmp_path: Path) -> None:
    before = filled(4, record_bytes, 1000, tmp_path)
    expected = [before.since(version) for version in range(5)]
    before.append(b"R5".ljust(record_bytes, b"."), 1000, lambda: b"S5".ljust(1000, b"."))
    back = Log.open(tmp_path, 4)
    assert [back.since(version) for version in range(5)] == expected
    assert not list(tmp_path.glob("000005.*"))  # a crash's: gone
    back.append(b"R5".ljust(record_bytes, b"."), 1000, lambda: b"S5".ljust(1000, b"."))
    back.prune()
    whole = filled(5, record_bytes, 1000)
    assert [back.since(version).size for version in range(6)] == [whole.since(version).size for version in range(6)]


def test_reading_changes_nothing(tmp_path: Path) -> None:
    filled(5, 400, 1000, tmp_path, prune=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    Log.read(tmp_path, 3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("history", [0, 2, 10])
@pytest.mark.parametrize("record_bytes", [3, 40, 77, 130, 999])
def test_the_disk_that_a_log_with_its_history_takes_is_foretold(
    record_bytes: int, history: int, tmp_path: Path
) -> None:
    log, most = Log(tmp_path, history), 0
    for _ in range(30):
        log.append(bytes(record_bytes), 1000, lambda: bytes(1000))
        most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))
        log.prune()
    assert log_bytes([record_bytes] * 30, [1000] * 30, history) == most


@pytest.mark.parametrize("snapshot_bytes", [lambda version: 100, lambda version: 60 * version], ids=["same", "growing"])
@pytest.mark.parametrize("record_bytes", [5, 48, 130])  # 48: two records are as long as a snapshot
def test_every_version_of_the_history_opens_as_it_was(record_bytes: int, snapshot_bytes: Any, tmp_path: Path) -> None:
    log, sent, checksums = Log(tmp_path / "log", 4), {}, {}
    for version in range(1, 12):
        snapshot = b"S".ljust(snapshot_bytes(version), b".")
        log.append(b"R%d" % version + bytes(record_bytes), len(snapshot), lambda snapshot=snapshot: snapshot)
        log.prune()
        sent[version], checksums[version] = [log.since(held) for held in range(version + 1)], log.checksums
    assert list(log.firsts) == [7, 8, 9, 10, 11]
    for version in log.firsts:
        folder = shutil.copytree(tmp_path / "log", tmp_path / str(version))
        window = {number: first for number, first in log.firsts.items() if number <= version}
        again = Log.open(folder, version, checksums[version], window, 4)
        assert [again.since(held) for held in range(version + 1)] == sent[version]
