"""BIG-bench's Natural Instructions: downloaded by pip, checked, stored as JSON lines with the notice.

The tests write a small package in the published layout; the slow test uses the real package where the cache has it.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from fedferret.core.errors import UserError
from fedferret.core.files import cache_folder
from fedferret.core.keys import Key
from fedferret.data import bigbench
from fedferret.data.bigbench import BigBenchNI
from fedferret.data.examples import FederatedData
from fedferret.data.summary import summarise

CANARY = "THIS IS A TEST'S NOTICE. canary GUID 0"
SMALL = BigBenchNI(held_out_fraction=0.25, held_out_tasks=1, min_examples=3)
# a build script that pip runs without a download
BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(directory, settings=None):
    folder = pathlib.Path(directory, "bigbench-1.0.0.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: bigbench\\nVersion: 1.0.0\\n")
    return folder.name
"""


def task(name: str, rows: int) -> dict[str, Any]:
    """A task in the published format: rows of 12 characters, then one without answers and one of 2,000 characters."""
    examples = [{"input": f"{name} {row:04}".rjust(12), "target": [f"{row}.", "another"]} for row in range(rows)]
    examples += [{"input": f"{name} blank", "target": [""]}, {"input": f"{name} long".ljust(2000), "target": ["."]}]
    return {"canary": CANARY, "name": name, "task_prefix": f"Definition of {name}.", "examples": examples}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source package of three tasks and one small task; an empty cache; the pinned hash is the small package's."""
    tasks = [
        task("subtask001_x_a", 8),
        task("subtask002_y_b", 12),
        task("subtask003_x_c", 16),
        task("subtask004_z_d", 2),
    ]
    root = "bigbench-1.0.0"
    folder = f"{root}/bigbench/benchmark_tasks"
    files = {
        f"{root}/PKG-INFO": "Metadata-Version: 2.1\nName: bigbench\nVersion: 1.0.0\n",
        f"{root}/pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        f"{root}/backend.py": BACKEND,
        f"{folder}/natural_instructions/task.json": json.dumps(
            {"canary": CANARY}
        ),  # describes the folder and is not a task
        f"{folder}/others/subtask009_x_z/task.json": json.dumps(task("subtask009_x_z", 9)),
        **{f"{folder}/natural_instructions/{each['name']}/task.json": json.dumps(each) for each in tasks},
    }
    path = tmp_path / "index" / "bigbench-1.0.0.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setattr(bigbench, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("FEDFERRET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def texts(data: FederatedData) -> list[str]:
    return [example.turns[0].content for part in (*data.clients.values(), *data.held_out.values()) for example in part]


def test_rows_are_in_training_or_held_out_never_both(package: Path) -> None:
    data = BigBenchNI(path=str(package), held_out_fraction=0.25, held_out_tasks=1, min_examples=3).load(Key.of(1))
    names = ["subtask001_x_a", "subtask002_y_b", "subtask003_x_c"]  # the fourth has too few rows
    (unseen,) = {example.metadata["task"] for example in data.held_out["tasks"]}
    assert sorted([*data.clients, unseen]) == names
    assert len(texts(data)) == len(set(texts(data))) == 8 + 12 + 16
    assert {len(rows) for rows in data.clients.values()} < {6, 9, 12}  # three quarters of two of the tasks
    (example, *_) = data.clients[next(iter(data.clients))]
    assert example.turns[0].content == f"{example.metadata['instruction']}\n\n{example.metadata['input']}"
    assert example.metadata["instruction"] == f"Definition of {example.metadata['task']}."
    assert example.response != "another" and example.metadata["category"] in ("x", "y")


def test_the_data_follow_from_the_key(package: Path) -> None:
    first, again, other = (SMALL.load(Key.of(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_notice_accompanies_the_data(package: Path, tmp_path: Path) -> None:
    data = SMALL.load(Key.of(1))
    assert data.notice is not None and CANARY in data.notice
    assert summarise(data).notice == data.notice
    (cached,) = (tmp_path / "cache" / "data").glob("*.jsonl")
    heads = [line for line in cached.read_text().splitlines() if "instruction" in json.loads(line)]
    assert len(heads) == 4 and all(CANARY in line for line in heads)


def test_pip_downloads_once_and_the_cache_holds_the_tasks_only(
    package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = SMALL.load(Key.of(1))
    assert "downloading bigbench==1.0.0" in capfd.readouterr().out
    package.unlink()
    assert SMALL.load(Key.of(1)) == first
    assert capfd.readouterr().out == ""
    cached = [path.name for path in (tmp_path / "cache" / "data").iterdir() if not path.name.endswith(".lock")]
    assert len(cached) == 1 and cached[0].endswith(".jsonl")


def test_scratch_files_of_a_killed_process_are_removed(package: Path, tmp_path: Path) -> None:
    left = tmp_path / "cache" / "data" / f".bigbench-ni-{bigbench.SHA256[:12]}-1.jsonl.fetch.x"
    left.mkdir(parents=True)
    SMALL.load(Key.of(1))
    assert not left.exists()


def test_limits_hold(package: Path) -> None:
    limits = BigBenchNI(max_input_characters=None, max_examples=5, max_held_out=4, held_out_tasks=1, min_examples=4)
    data = limits.load(Key.of(1))
    assert {len(rows) for rows in data.clients.values()} == {5}
    assert len(data.held_out["tasks"]) == 4
    everything = BigBenchNI(max_input_characters=None, held_out_tasks=0, min_examples=1).load(Key.of(1))
    assert (
        len(texts(everything)) == 8 + 12 + 16 + 2 + 4
    )  # with each task's long row, without the row that has no answer


@pytest.mark.parametrize("route", ["pip", "path"])
def test_a_package_with_another_hash_is_not_read(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    monkeypatch.setattr(bigbench, "SHA256", "0" * 64)
    with pytest.raises(UserError) as error:
        BigBenchNI(path=str(package) if route == "path" else None).load(Key.of(1))
    expected = "DO NOT MATCH THE HASHES" if route == "pip" else "has SHA-256"
    assert expected in str(error.value) and "data.path" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "data").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "nowhere.tar.gz"}, r'no file "nowhere.tar.gz" \(data.path\): fetch'),
        ({"tasks": ("subtask001_x_b",)}, 'did you mean "subtask001_x_a"'),
        ({"held_out_tasks": 4, "min_examples": 1}, "leave one to train on"),
    ],
)
def test_impossible_settings_are_one_line(package: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        BigBenchNI(**settings).load(Key.of(1))
    assert "\n" not in str(error.value)


def test_a_package_that_pip_cannot_fetch_is_one_line(package: Path) -> None:
    package.unlink()
    with pytest.raises(UserError, match=r"pip could not download bigbench==1\.0\.0 .*set data\.path to it") as error:
        BigBenchNI().load(Key.of(1))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_real_package_has_61_tasks_and_193249_usable_rows() -> None:
    if not list((cache_folder() / "data").glob("bigbench-ni-*.jsonl")):
        pytest.skip("the download takes 358 MB: load the source bigbench-ni once")
    settings = BigBenchNI(max_input_characters=None, min_examples=1, held_out_fraction=0, held_out_tasks=0)
    data = settings.load(Key.of(1))
    assert len(data.clients) == 61 and len(texts(data)) == len(set(texts(data))) == 193_249
    default = BigBenchNI().load(Key.of(1))
    assert len(default.clients) == 52
    assert default.notice is not None and "SHOULD NEVER APPEAR IN TRAINING CORPORA" in default.notice
