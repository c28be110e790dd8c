"""Files as people have them and as they break: each is read with the rows that it holds, or refused in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tomli_w
from typer.testing import CliRunner

from cases.writers import (
    GOOD,
    LINES,
    ROWS,
    Make,
    broken_save,
    changed,
    circular,
    columns,
    dangling,
    directory,
    duplicated,
    file,
    half_a_parquet,
    inserted,
    named_pipe,
    not_unicode,
    raw,
    saved,
    saved_splits,
    several,
    stream,
    table,
    zstandard,
)
from fedferret import models
from fedferret.cli import app
from fedferret.core.errors import UserError
from fedferret.data.files import read_rows
from tiny_runs import tiny_tables

pytestmark = pytest.mark.slow(seconds=11)

ACCEPTED = "the data were accepted"

CSV = "instruction,response\n" + "".join(f"{row['instruction']},{row['response']}\n" for row in ROWS)
LONG = [{**ROWS[0], "response": "long " * 40_000}, *ROWS[1:]]
OPTIONAL = [{**row, **({"input": "more"} if n % 2 else {})} for n, row in enumerate(ROWS)]
DEEP = "[" * 10_000 + "]" * 10_000
SPLIT = [raw("train.jsonl", LINES), raw("test.jsonl", LINES)]

READ: dict[str, tuple[Make, list[dict[str, Any]]]] = {
    "lines": (raw("rows.jsonl", LINES), ROWS),
    "ndjson": (raw("rows.ndjson", LINES), ROWS),
    "suffix in capitals": (raw("rows.JSONL", LINES), ROWS),
    "gzip": (raw("rows.jsonl.gz", gzip.compress(GOOD)), ROWS),
    "gzip of two members": (raw("rows.jsonl.gz", gzip.compress(GOOD[:500]) + gzip.compress(GOOD[500:])), ROWS),
    "zstandard": (raw("rows.jsonl.zst", zstandard(GOOD)), ROWS),
    "zstandard of two frames": (raw("rows.jsonl.zst", zstandard(GOOD[:500]) + zstandard(GOOD[500:])), ROWS),
    "csv, gzip": (raw("rows.csv.gz", gzip.compress(CSV.encode())), ROWS),
    "byte-order mark": (raw("rows.jsonl", b"\xef\xbb\xbf" + GOOD), ROWS),
    "byte-order mark, array": (raw("rows.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()), ROWS),
    "byte-order mark, csv": (raw("rows.csv", b"\xef\xbb\xbf" + CSV.encode()), ROWS),
    "Windows' line ends": (raw("rows.jsonl", LINES.replace("\n", "\r\n")), ROWS),
    "old line ends": (raw("rows.jsonl", LINES.replace("\n", "\r")), ROWS),
    "Windows' line ends, csv": (raw("rows.csv", CSV.replace("\n", "\r\n")), ROWS),
    "blank lines": (raw("rows.jsonl", "\n \n" + LINES.replace("\n", "\n\n\t\r\n") + "\n"), ROWS),
    "no last line end": (raw("rows.jsonl", LINES.rstrip("\n")), ROWS),
    "array over many lines": (raw("rows.json", json.dumps(ROWS, indent=2)), ROWS),
    "array in one line with spaces": (raw("rows.json", f" [ {', '.join(map(json.dumps, ROWS))} ]\n\n"), ROWS),
    "semicolons": (raw("rows.csv", CSV.replace(",", ";")), ROWS),
    "tabs": (raw("rows.tsv", CSV.replace(",", "\t")), ROWS),
    "tabs in csv": (raw("rows.csv", CSV.replace(",", "\t")), ROWS),
    "a long field": (raw("rows.csv", CSV.replace("Answer 0.", "long " * 40_000)), LONG),
    "a long value": (raw("rows.jsonl", "".join(json.dumps(row) + "\n" for row in LONG)), LONG),
    "keys that some rows have": (raw("rows.jsonl", "".join(json.dumps(row) + "\n" for row in OPTIONAL)), OPTIONAL),
    "a key twice": (
        inserted('{"instruction": "no", "instruction": "yes", "response": "so"}'),
        [*ROWS[:2], {"instruction": "yes", "response": "so"}, *ROWS[2:]],
    ),
    "an unused column of any kind": (
        changed(tags=[1, [2, {"a": None}]]),
        [*ROWS[:-1], {**ROWS[-1], "tags": [1, [2, {"a": None}]]}],
    ),
    "an unused column whose type changes": (
        raw(
            "rows.jsonl",
            "".join(json.dumps({**row, "id": n if n < 30 else str(n)}) + "\n" for n, row in enumerate(ROWS)),
        ),
        [{**row, "id": n if n < 30 else str(n)} for n, row in enumerate(ROWS)],
    ),
    "separators of Unicode within a text": (
        changed(response="a\u2028b\x85c"),
        [*ROWS[:-1], {**ROWS[-1], "response": "a\u2028b\x85c"}],
    ),
    "a character of NUL": (changed(response="a\0b"), [*ROWS[:-1], {**ROWS[-1], "response": "a\0b"}]),
    "an emoji in two escapes": (
        inserted('{"instruction": "\\ud83d\\ude00", "response": "so"}'),
        [*ROWS[:2], {"instruction": "😀", "response": "so"}, *ROWS[2:]],
    ),
    "parquet": (table("rows.parquet", columns()), ROWS),
    "parquet with dates and bytes unused": (
        table("rows.parquet", columns(raw=[b"\xff"] * 40, day=pyarrow.array([0] * 40, pyarrow.date32()))),
        [],
    ),
    "arrow, stream": (table("rows.arrow", columns(), stream), ROWS),
    "arrow, file": (table("rows.arrow", columns(), file), ROWS),
    "saved by datasets": (saved, ROWS),
    "several files": (
        several(raw("a.jsonl", GOOD[: GOOD.index(b"\n") + 1]), raw("b.jsonl", GOOD[GOOD.index(b"\n") + 1 :])),
        ROWS,
    ),
    "several formats": (several(raw("a.jsonl", LINES), raw("b.csv", CSV)), ROWS + ROWS),
    "a folder": (several(raw("a.jsonl", LINES), raw("b.jsonl", LINES), path=""), ROWS + ROWS),
    "a folder with a stranger": (
        several(raw("a.jsonl", LINES), raw("README.md", "rows"), raw(".hidden.jsonl", "no"), path=""),
        ROWS,
    ),
    "a glob": (
        several(raw("a-1.jsonl", LINES), raw("a-2.jsonl", LINES), raw("b.jsonl", "no"), path="a-*.jsonl"),
        ROWS + ROWS,
    ),
    "a name like a glob": (raw("rows[1].jsonl", LINES), ROWS),
    "semicolons below a blank line": (raw("rows.csv", "\r\n" + CSV.replace(",", ";")), ROWS),
    "semicolons and a comma in a quoted name": (
        raw("rows.csv", CSV.replace(",", ";").replace("response\n", 'response;"a, b"\n').replace(".\n", ".;x\n")),
        [{**row, "a, b": "x"} for row in ROWS],
    ),
    "Excel's line of the separator": (raw("rows.csv", "sep=;\r\n" + CSV.replace(",", ";")), ROWS),
    "two byte-order marks": (raw("rows.csv", b"\xef\xbb\xbf\xef\xbb\xbf" + CSV.encode()), ROWS),
    "joined files with byte-order marks": (raw("rows.jsonl", b"\xef\xbb\xbf".join([b"", GOOD, GOOD])), ROWS + ROWS),
    "parquet with values unused that Python cannot hold": (
        table(
            "rows.arrow",
            columns(
                far=pyarrow.array([9 * 10**18] * 40, pyarrow.timestamp("us")),
                zone=pyarrow.array([1] * 40, pyarrow.timestamp("us", tz="Mars/Phobos")),
                junk=not_unicode(),
            ),
            file,
        ),
        [],
    ),
    "one empty file of several": (several(raw("a.jsonl", ""), raw("b.jsonl", LINES)), ROWS),
}

REFUSED: dict[str, tuple[Make, str]] = {
    "empty": (raw("rows.jsonl", ""), "is empty"),
    "empty gzip": (raw("rows.jsonl.gz", gzip.compress(b"")), "is empty"),
    "no byte of gzip": (raw("rows.jsonl.gz", b""), "is empty"),
    "truncated gzip": (raw("rows.jsonl.gz", gzip.compress(GOOD)[:-20]), "cannot be decompressed"),
    "damaged gzip": (raw("rows.jsonl.gz", gzip.compress(GOOD)[:-8] + b"12345678"), "cannot be decompressed"),
    "no gzip": (raw("rows.jsonl.gz", GOOD), "cannot be decompressed"),
    "truncated zstandard": (raw("rows.jsonl.zst", zstandard(GOOD)[:-20]), "cannot be decompressed"),
    "no zstandard": (raw("rows.jsonl.zst", GOOD), "cannot be decompressed"),
    "bzip2": (raw("rows.jsonl.bz2", bz2.compress(GOOD)), "files end in"),
    "gzip alone": (raw("rows.gz", gzip.compress(GOOD)), "files end in"),
    "no suffix": (raw("rows", GOOD), "files end in"),
    "UTF-16": (raw("rows.jsonl", LINES.encode("utf-16")), "save it as UTF-8"),
    "UTF-16 without a mark": (raw("rows.jsonl", LINES.encode("utf-16-le")), "is not JSON|save it as UTF-8"),
    "UTF-16 without a mark, csv": (raw("rows.csv", CSV.encode("utf-16-le")), "save it as UTF-8"),
    "UTF-32 without a mark": (raw("rows.json", json.dumps(ROWS).encode("utf-32-be")), "save it as UTF-8"),
    "gzip named lines": (raw("rows.jsonl", gzip.compress(GOOD)), r"compressed by gzip: let its name end in \.gz"),
    "gzip within gzip": (raw("rows.csv.gz", gzip.compress(gzip.compress(GOOD))), "compressed by gzip"),
    "Zstandard named csv": (raw("rows.csv", zstandard(CSV.encode())), "compressed by Zstandard"),
    "a workbook named csv": (raw("rows.csv", b"PK\x03\x04\0\0"), "zip archive, as Excel's"),
    "a pointer of Git LFS": (raw("rows.parquet", "version https://git-lfs.github.com/spec/v1\n"), "`git lfs pull`"),
    "a web page": (raw("rows.json", "<!DOCTYPE html><html></html>"), "is a web page"),
    "parquet named lines": (raw("rows.jsonl", b"PAR1\0PAR1"), r"let its name end in \.parquet"),
    "joined csv files": (raw("rows.csv", CSV + CSV), "line 42 is the header again"),
    "a response of marks that are not seen": (
        changed(response="\ufeff\u200b \0"),
        'row 40: column "response" is empty',
    ),
    "choices that were not asked for": (
        changed(choices="A, B"),
        r'row 40: the choices .*data\.choices_column = "none"',
    ),
    "UTF-16, csv": (raw("rows.csv", CSV.encode("utf-16")), "save it as UTF-8"),
    "Latin-1": (raw("rows.jsonl", LINES.replace("Answer 7", "Ré").encode("latin-1")), "line 8 is not UTF-8"),
    "Latin-1, csv": (raw("rows.csv", CSV.replace("Answer 7", "Ré").encode("latin-1")), "not UTF-8 text"),
    "NUL bytes": (raw("rows.jsonl", b"\0" * 4096), "is not JSON"),
    "NUL bytes at the end": (raw("rows.jsonl", GOOD + b"\0" * 4096), "line 41 is not JSON"),
    "half a line": (raw("rows.jsonl", LINES[:-20]), "line 40 is not JSON"),
    "an array named lines": (raw("rows.jsonl", json.dumps(ROWS)), r"name it \.json"),
    "lines named array": (raw("rows.json", LINES), r"ends in \.jsonl"),
    "half an array": (raw("rows.json", json.dumps(ROWS)[:-30]), "is not JSON"),
    "an array that does not end": (raw("rows.json", json.dumps(ROWS)[:-1]), "is not JSON"),
    "an array with a last comma": (raw("rows.json", json.dumps(ROWS)[:-1] + ",]"), "is not JSON"),
    "an array and more": (raw("rows.json", json.dumps(ROWS) + "{}"), "is not JSON"),
    "an object of columns": (
        raw("rows.json", json.dumps({"instruction": ["a"], "response": ["b"]})),
        "not a JSON array",
    ),
    "an array of arrays": (raw("rows.json", "[[1, 2]]"), "row 1 is not an object"),
    "a number": (raw("rows.json", "3"), "not a JSON array"),
    "a text among the lines": (inserted('"text"'), "line 3 is not an object"),
    "null among the lines": (inserted("null"), "line 3 is not an object"),
    "NaN among the lines": (inserted("NaN"), "line 3 is not an object"),
    "Python's words": (inserted("{'instruction': 'a', 'response': None}"), "line 3 is not JSON"),
    "two objects in a line": (inserted(LINES[:60].split("\n")[0] * 2), "line 3 is not JSON: Extra data"),
    "a number of 6,000 digits": (
        inserted('{"instruction": "a", "response": ' + "9" * 6000 + "}"),
        "number of more than",
    ),
    "6,000 digits in an array": (
        raw("rows.json", '[{"instruction": "a", "response": ' + "9" * 6000 + "}]"),
        "number of more than",
    ),
    "6,000 digits, unused": (
        inserted('{"instruction": "a", "response": "b", "id": ' + "9" * 6000 + "}"),
        "number of more than",
    ),
    "deep nesting": (inserted('{"instruction": "a", "response": ' + DEEP + "}"), "nested too deep"),
    "deep nesting in an array": (raw("rows.json", '[{"a": ' + DEEP + "}]"), "nested too deep"),
    "deep nesting alone": (raw("rows.json", DEEP), "nested too deep"),
    "a response of NaN": (inserted('{"instruction": "a", "response": NaN}'), 'row 3: column "response" holds NaN'),
    "a response of Infinity": (inserted('{"instruction": "a", "response": -Infinity}'), "row 3.*infinite"),
    "a response beyond all numbers": (inserted('{"instruction": "a", "response": 1e999}'), "row 3.*infinite"),
    "a response of null": (changed(response=None), 'row 40: column "response" is empty'),
    "a response of spaces": (changed(response=" \u00a0\n"), 'row 40: column "response" is empty'),
    "a response that is a number": (changed(response=42), 'row 40: column "response" holds a number'),
    "a response that is a list": (changed(response=["a"]), 'row 40: column "response" holds a list'),
    "a response that is an object": (changed(response={"a": 1}), 'row 40: column "response" holds an object'),
    "a prompt that is true": (changed(instruction=True), 'row 40: column "instruction" holds the value true'),
    "a prompt that is a number": (changed(instruction=7), 'row 40: column "instruction" holds a number'),
    "an input that is a list": (changed(input=[]), 'row 40: column "input" holds a list'),
    "an input of NaN": (changed(input=float("nan")), 'row 40: column "input" holds NaN'),
    "half of a character": (inserted('{"instruction": "a", "response": "b \\ud83d"}'), "row 3.*half of a character"),
    "half of a character in the prompt": (inserted('{"instruction": "\\ude00", "response": "b"}'), "row 3.*half of a"),
    "half of a character in bytes": (
        raw("rows.jsonl", GOOD + b'{"instruction": "\xed\xa0\xbd"}'),
        "line 41 is not UTF-8",
    ),
    "csv with a header alone": (raw("rows.csv", "instruction,response\n"), "is empty"),
    "csv with a column twice": (raw("rows.csv", CSV.replace("instruction", "response", 1)), 'two columns "response"'),
    "csv with a quote that stays open": (raw("rows.csv", CSV + '"open,closed\n'), "line 42 is not CSV"),
    "csv with a field too many": (raw("rows.csv", CSV + "a,b,c\n"), "line 42: not as many fields"),
    "csv with a field too few": (raw("rows.csv", CSV + "a\n"), "line 42: not as many fields"),
    "csv of one column": (raw("rows.csv", "text\nhello\n"), "partition.clients is 2 but there are 1 rows"),
    "no parquet": (raw("rows.parquet", GOOD), "is not a Parquet file"),
    "half a parquet": (half_a_parquet, "is not a Parquet file"),
    "empty parquet": (
        table("rows.parquet", {"instruction": pyarrow.array([], "string"), "response": pyarrow.array([], "string")}),
        "is empty",
    ),
    "parquet with a column twice": (
        several(lambda folder: pyarrow.parquet.write_table(duplicated(), folder / "rows.parquet"), path="rows.parquet"),
        "two columns",
    ),
    "parquet with lists": (
        table("rows.parquet", columns(response=[[row["response"]] for row in ROWS])),
        'row 1: column "response" holds a list',
    ),
    "parquet with structs": (
        table("rows.parquet", columns(response=[[{"a": 1}] for row in ROWS])),
        "row 1.*message 1 has no",
    ),
    "parquet with texts that are not UTF-8": (
        table("rows.arrow", columns(response=not_unicode()), file),
        'row 1: column "response" holds a text that is not UTF-8',
    ),
    "parquet with bytes": (table("rows.parquet", columns(response=[b"\xff" for row in ROWS])), "holds bytes"),
    "parquet with NaN": (table("rows.parquet", columns(response=[float("nan") for row in ROWS])), "holds NaN"),
    "parquet with nulls": (
        table("rows.parquet", columns(response=pyarrow.array([None] * 40, "string"))),
        "row 1.*is empty",
    ),
    "parquet with dates": (
        table("rows.parquet", columns(response=pyarrow.array([0] * 40, pyarrow.date32()))),
        "not a text",
    ),
    "arrow without a column": (
        several(
            lambda folder: file(pyarrow.table({"a": [1]}).select([]), str(folder / "rows.arrow")), path="rows.arrow"
        ),
        r'no column "instruction" \(data\.prompt_column\): there is none',
    ),
    "arrow that is none": (raw("rows.arrow", GOOD), "is not an Arrow file"),
    "half an arrow": (raw("rows.arrow", b"ARROW1\0\0" + b"\0" * 100), "is not an Arrow file"),
    "saved splits": (saved_splits, "holds several splits.*train"),
    "a broken save": (broken_save, "is not a folder of save_to_disk"),
    "a link to nowhere": (dangling, "it is a link"),
    "a link to itself": (circular, "there is no file|cannot be looked at"),
    "a pipe": (named_pipe, "neither a file nor a folder"),
    "an empty folder": (directory, "holds no file to read"),
    "a folder of strangers": (several(raw("README.md", "a"), path=""), "holds no file to read"),
    "a folder of splits": (several(*SPLIT, path=""), "holds several splits"),
    "a glob of nothing": (several(path="*.jsonl"), "no file matches"),
    "a glob of strangers": (several(raw("a.md", "a"), path="*"), "cannot be read"),
    "no path": (lambda folder: [], "names no file"),
    "a blank path": (lambda folder: " ", "names no file"),
    "a path with NUL": (lambda folder: "rows\0.jsonl", "no valid path"),
    "a path of 5,000 characters": (lambda folder: "a" * 5000 + ".jsonl", "cannot be looked at|there is no file"),
    "a file twice": (several(raw("a.jsonl", LINES), path=["a.jsonl", "a.jsonl"]), "twice"),
    "an absent file of several": (several(raw("a.jsonl", LINES), path=["a.jsonl", "b.jsonl"]), "there is no file"),
    "a faulty row of the second file": (
        several(raw("a.jsonl", LINES), raw("b.jsonl", '{"instruction": "a", "response": [1]}')),
        r"b\.jsonl, row 1",
    ),
}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run whose data were accepted ends before weights are read."""

    def load(*args: Any, **options: Any) -> None:
        raise UserError(ACCEPTED)

    monkeypatch.setattr(models, "load", load)
    yield


def line_of(folder: Path, path: Any, **settings: Any) -> str:
    """The one line that a run of these data ends with."""
    tables = tiny_tables(folder)
    tables["data"] = {"source": "files", "path": path, "partition": {"clients": 2}, **settings}
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(tables))
    result = CliRunner().invoke(app, ["run", str(recipe), "--out", str(folder / "run")])
    assert result.exit_code == 2 and "Traceback" not in result.output, (result.output, result.exception)
    assert result.stderr.count("\n") == 1, result.stderr
    assert not (folder / "run").exists()
    return result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For the input alone."""
    (tmp_path / "input").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", READ)
def test_rows_are_what_the_file_holds(name: str, folder: Path) -> None:
    make, rows = READ[name]
    path = make(folder / "input")
    assert ACCEPTED in line_of(folder, path)
    if rows:
        assert list(read_rows(tuple(path) if isinstance(path, list) else path)) == rows


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line_and_leaves_nothing(name: str, folder: Path) -> None:
    make, message = REFUSED[name]
    line = line_of(folder, make(folder / "input"))
    assert ACCEPTED not in line and re.search(message, line), line
