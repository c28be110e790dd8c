"""The source "sites": the sites that may take part, and files only where they are local."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.files import Files
from fedferret.data.sites import SiteFile, Sites
from fedferret.settings import build, table_of

KEY = Key.of(1, "data")


def write(path: Path, count: int, name: str) -> str:
    rows = [{"question": f"What is {number}?", "answer": f"{name}'s {number}."} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "sites": ["site-2", "site-1"],
        "files": {name: write(tmp_path / f"{name}.jsonl", 3, name) for name in ("site-1", "site-2")},
        "prompt_column": "question",
        "response_column": "answer",
        **changes,
    }


def test_where_the_files_are_local_each_site_has_all_rows_of_one_file(tmp_path: Path) -> None:
    data = build(Sites, settings(tmp_path), "data").load(KEY)
    assert list(data.clients) == ["site-1", "site-2"] and data.held_out == {}
    assert [example.response for example in data.clients["site-1"]] == [f"site-1's {number}." for number in range(3)]


def test_a_site_reads_the_same_examples_from_a_file_as_the_server(tmp_path: Path) -> None:
    table = settings(tmp_path)
    expected = build(Sites, table, "data").load(KEY).clients["site-1"]
    columns = {"prompt_column": "question", "response_column": "answer"}
    assert SiteFile(path=table["files"]["site-1"], **columns).load() == expected
    files = Files(path=table["files"]["site-1"], held_out_fraction=0.0, client_column="answer", **columns).load(KEY)
    assert {example.turns for held in files.clients.values() for example in held} == {
        example.turns for example in expected
    }


def test_the_server_evaluates_on_the_held_out_file(tmp_path: Path) -> None:
    path = write(tmp_path / "held-out.jsonl", 2, "nobody")
    data = build(Sites, settings(tmp_path, files="none", held_out_path=path), "data").load(KEY)
    assert [len(examples) for examples in data.clients.values()] == [0, 0]
    assert list(data.held_out) == ["rows"] and len(data.held_out["rows"]) == 2


def test_settings_survive_a_round_trip_through_toml(tmp_path: Path) -> None:
    for table in (settings(tmp_path), settings(tmp_path, files="none")):
        sites = build(Sites, table, "data")
        assert build(Sites, table_of(sites), "data") == sites


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sites": []}, r"name at least one site, and each once"),
        ({"sites": ["a", "a"], "files": "none"}, r"name at least one site, and each once"),
        ({"sites": ["a\nb"], "files": "none"}, r"'a\\nb' is not a valid name: use printable characters"),
        ({"files": {"site-3": "x.jsonl"}}, r'"site-3" is not in data.sites; did you mean "site-'),
        ({"held_out_fraction": 0.1}, r"data.held_out_fraction: there is no such setting"),
    ],
)
def test_a_wrong_list_is_one_line(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        build(Sites, settings(tmp_path, **changes), "data")
    assert "\n" not in str(raised.value)


def test_an_error_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'there is no file ".*none.jsonl"'):
        build(Sites, settings(tmp_path, files={"site-1": str(tmp_path / "none.jsonl")}), "data").load(KEY)
