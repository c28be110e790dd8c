"""Writers of files as people have them and as they break."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

ROWS = [{"instruction": f"Question {n}?", "response": f"Answer {n}."} for n in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
GOOD = LINES.encode()

Make = Callable[[Path], Any]  # writes an input to a folder, and returns what data.path is to be


def raw(name: str, content: bytes | str) -> Make:
    def make(folder: Path) -> str:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return make


def changed(**values: Any) -> Make:
    """The good lines with another last row."""
    row = json.dumps({**ROWS[-1], **values})
    return raw("rows.jsonl", "".join(LINES.splitlines(keepends=True)[:-1]) + row)


def inserted(text: str) -> Make:
    """The good lines, and a text as the third."""
    lines = LINES.splitlines(keepends=True)
    return raw("rows.jsonl", "".join([*lines[:2], text + "\n", *lines[2:]]))


def several(*makes: Make, path: Any = None) -> Make:
    def make(folder: Path) -> Any:
        made = [each(folder) for each in makes]
        if path is None:
            return made
        return [str(folder / each) for each in path] if isinstance(path, list) else str(folder / path)

    return make


def table(name: str, columns: dict[str, Any], write: Callable[[Any, str], Any] = pyarrow.parquet.write_table) -> Make:
    def make(folder: Path) -> str:
        write(pyarrow.table(columns), str(folder / name))
        return str(folder / name)

    return make


def stream(content: Any, name: str) -> None:
    with pyarrow.OSFile(name, "wb") as sink, pyarrow.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)


def file(content: Any, name: str) -> None:
    with pyarrow.OSFile(name, "wb") as sink, pyarrow.ipc.new_file(sink, content.schema) as writer:
        writer.write_table(content)


def columns(**more: Any) -> dict[str, Any]:
    return {name: [row[name] for row in ROWS] for name in ROWS[0]} | more


def not_unicode() -> Any:
    """Forty texts that are not UTF-8."""
    made = pyarrow.array([b"\xff"] * 40, pyarrow.binary())
    return pyarrow.StringArray.from_buffers(40, made.buffers()[1], made.buffers()[2])


def duplicated() -> Any:
    texts = pyarrow.array([row["response"] for row in ROWS])
    return pyarrow.Table.from_arrays([texts, texts, texts], names=["instruction", "response", "response"])


def saved(folder: Path) -> str:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def saved_splits(folder: Path) -> str:
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def broken_save(folder: Path) -> str:
    saved(folder)
    for path in (folder / "saved").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    return str(folder / "saved")


def half_a_parquet(folder: Path) -> str:
    path = Path(table("rows.parquet", columns())(folder))
    path.write_bytes(path.read_bytes()[:500])
    return str(path)


def dangling(folder: Path) -> str:
    (folder / "rows.jsonl").symlink_to(folder / "nowhere.jsonl")
    return str(folder / "rows.jsonl")


def circular(folder: Path) -> str:
    (folder / "rows.jsonl").symlink_to(folder / "rows.jsonl")
    return str(folder / "rows.jsonl")


def named_pipe(folder: Path) -> str:
    os.mkfifo(folder / "rows.jsonl")
    return str(folder / "rows.jsonl")


def directory(folder: Path) -> str:
    (folder / "data.jsonl").mkdir()
    return str(folder / "data.jsonl")


def zstandard(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as compressed:
        compressed.write(content)
    return bytes(sink.getvalue().to_pybytes())
