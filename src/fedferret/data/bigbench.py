"""Natural Instructions v1 as BIG-bench ships it: 61 English tasks, 193,250 rows. Client = task.

Mishra, Khashabi, Baral, Hajishirzi. "Cross-Task Generalization via Natural Language Crowdsourcing Instructions", ACL
2022, arXiv 2104.08773. In the source package bigbench 1.0.0 (358 MB), under benchmark_tasks/natural_instructions/.

1. Once: pip downloads the package, or ``path`` names a copy; its SHA-256 is pinned. Only the tasks are kept, in the
   cache, as one file of JSON lines (149 MB): a line per task, with the benchmark's notice, then a line per row.
2. Drop the rows with inputs of ``max_input_characters`` or more, and the rows without an answer (there is one).
3. Draw the held-out tasks, then the held-out rows of the other tasks. All inputs are distinct, so no input is both in
   training and held out. Held-out sets: "rows" (unseen rows of the clients' tasks) and "tasks".
4. Instruction: the task's. Input: the row's. Response: the first of the accepted answers.

The benchmark asks that its data stay out of training corpora. So the notice accompanies the data, the rows serve
experiments here only, and nothing tuned on them may be published.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedferret.core.collection import no_collection
from fedferret.core.errors import UserError, nearest
from fedferret.core.files import build_atomically, cache_folder
from fedferret.core.packages import download_source
from fedferret.data.examples import Example, FederatedData, at_most, check_at_least, check_fraction, instruction_example

if TYPE_CHECKING:
    from fedferret.core.keys import Key

REQUIREMENT = "bigbench==1.0.0"
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"

_LICENCE = "BIG-bench 1.0.0, (c) 2021 Google LLC; Apache License 2.0. Do not publish rows, nor weights tuned on them."
_HOW_TO_GET = f"fetch the source package of {REQUIREMENT} from the package index and set data.path to it"
_TASK = re.compile(r"/benchmark_tasks/natural_instructions/[^/]+/task\.json$")
_FORMAT = 1  # raise it when the format of the cached file changes; files of older formats are not touched


@dataclass(frozen=True)
class BigBenchNI:
    """Settings of the source "bigbench-ni"; the defaults give 52 clients with 128,000 examples."""

    path: str | None = None  # bigbench-1.0.0.tar.gz; None: pip downloads it, once
    tasks: tuple[str, ...] = ("all",)
    max_input_characters: int | None = 1024  # inputs have fewer; the Ferret paper's limit for version 2.8
    min_examples: int = 20  # training examples per task; a task with fewer is left out
    max_examples: int | None = None  # training examples per task, drawn by the key; None: all
    held_out_fraction: float = 0.02  # share of each client's rows
    held_out_tasks: int = 6  # drawn by the key: a tenth of all
    max_held_out: int | None = 256  # examples per held-out set; None: all

    def __post_init__(self) -> None:
        check_fraction("held_out_fraction", self.held_out_fraction)
        check_at_least("held_out_tasks", self.held_out_tasks, 0)
        for name in ("max_input_characters", "min_examples", "max_examples", "max_held_out"):
            check_at_least(name, getattr(self, name), 1)

    @no_collection()
    def load(self, key: Key) -> FederatedData:
        """Read the rows and split them; about three seconds once the file is in the cache.

        Raises:
            UserError: if a task is unknown, no task is left to train on, or the package cannot be read.
        """
        with _cached(self.path).open(encoding="utf-8") as lines:
            canary, tasks = _read(lines, self.max_input_characters)
        tasks = self._chosen(tasks)
        if self.held_out_tasks >= len(tasks):
            raise UserError(
                f"data.held_out_tasks is {self.held_out_tasks} of {len(tasks)} tasks: leave one to train on"
            )
        unseen = key.fold("held-out tasks").sample(list(tasks), self.held_out_tasks)
        held_out: dict[str, list[Example]] = {"rows": [], "tasks": [row for task in unseen for row in tasks[task]]}
        clients = {}
        for task in (task for task in tasks if task not in unseen):
            rows = tasks[task]
            unseen_rows = set(
                key.fold("held out", task).sample(range(len(rows)), round(len(rows) * self.held_out_fraction))
            )
            held_out["rows"].extend(rows[index] for index in sorted(unseen_rows))
            training = [row for index, row in enumerate(rows) if index not in unseen_rows]
            clients[task] = at_most(training, self.max_examples, key.fold("examples", task))
        return FederatedData(
            clients=clients,
            held_out={
                name: at_most(examples, self.max_held_out, key.fold("at most", name))
                for name, examples in held_out.items()
                if examples
            },
            source="bigbench-ni",
            notice=f"{canary} {_LICENCE}",
        )

    def _chosen(self, tasks: dict[str, list[Example]]) -> dict[str, list[Example]]:
        """The tasks of the setting ``tasks`` that have enough rows, sorted by name."""
        if self.tasks != ("all",):
            for task in self.tasks:
                if task not in tasks:
                    raise UserError(f'bigbench-ni has no task "{task}": {nearest(task, tasks)}')
        wanted = sorted(tasks if self.tasks == ("all",) else set(self.tasks))
        return {task: tasks[task] for task in wanted if len(tasks[task]) >= self.min_examples}


def _read(lines: Iterator[str], max_input_characters: int | None) -> tuple[str, dict[str, list[Example]]]:
    """The benchmark's notice, and the usable rows of every task."""
    canary = ""
    tasks: dict[str, list[Example]] = {}
    for line in lines:
        head = json.loads(line)
        canary, instruction = head["canary"], head["instruction"]
        metadata = {"task": head["task"], "category": head["task"].split("_")[1]}  # subtask001_quoref_…: the source
        rows = tasks.setdefault(head["task"], [])
        for _ in range(head["rows"]):
            row = json.loads(next(lines))
            if max_input_characters is not None and len(row["input"]) >= max_input_characters:
                continue
            if row["outputs"] and row["outputs"][0].strip():
                rows.append(instruction_example(instruction, row["input"], row["outputs"][0], metadata))
    return canary, tasks


def _cached(path: str | None) -> Path:
    """Path of the cached file of all tasks, which is built if it is missing. Raises ``UserError``."""
    from filelock import FileLock

    file = cache_folder() / "data" / f"bigbench-ni-{SHA256[:12]}-{_FORMAT}.jsonl"
    if file.is_file():  # it was renamed into place, so it is complete
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock")):  # another process waits here for the file
            if not file.is_file():
                _make(file, path)
    except OSError as error:
        raise UserError(
            f"cannot store data set bigbench-ni in {file.parent} ({error.strerror or error}): "
            "set FEDFERRET_CACHE to a writable folder with 3 GB of free space"
        ) from error
    return file


def _make(file: Path, path: str | None) -> None:
    scratch_name = f".{file.name}.fetch."
    for abandoned in file.parent.glob(f"{scratch_name}*"):  # by a killed process
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=scratch_name) as scratch:
        if path is None:
            print(f"downloading {REQUIREMENT} for bigbench-ni (358 MB, once; pip then unpacks 2 GB, some minutes)")
            package = download_source(REQUIREMENT, SHA256, Path(scratch), 'data source "bigbench-ni"', _HOW_TO_GET)
        else:
            package = Path(path)
        _check(package)
        build_atomically(file, lambda temporary: _convert(package, temporary))


def _check(package: Path) -> None:
    if not package.is_file():
        raise UserError(f'there is no file "{package}" (data.path): {_HOW_TO_GET}')
    with package.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f'"{package}" has SHA-256 {found[:16]}…, {REQUIREMENT} has {SHA256[:16]}…: {_HOW_TO_GET}')


def _convert(package: Path, file: Path) -> None:
    """Write the package's tasks as JSON lines, in the package's order; read nothing else, unpack nothing."""
    with tarfile.open(package, "r|gz") as archive, file.open("w", encoding="utf-8") as lines:
        for member in archive:
            if _TASK.search(member.name):
                stream = archive.extractfile(member)
                assert stream is not None, f"{member.name} is a file"
                for line in _lines(json.load(stream)):
                    lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {
        "canary": task["canary"],
        "task": task["name"],
        "instruction": task["task_prefix"],
        "rows": len(task["examples"]),
    }
    for row in task["examples"]:
        yield {"input": row["input"], "outputs": row["target"]}
