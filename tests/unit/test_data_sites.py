"""Sites as a source of data: who may take part, and files only where they are at hand."""

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
        "sites": ["ward-2", "ward-1"],
        "files": {name: write(tmp_path / f"{name}.jsonl", 3, name) for name in ("ward-1", "ward-2")},
        "prompt_column": "question",
        "response_column": "answer",
        **changes,
    }


def test_where_the_files_are_at_hand_each_site_holds_all_of_its_own(tmp_path: Path) -> None:
    data = build(Sites, settings(tmp_path), "data").load(KEY)
    assert list(data.clients) == ["ward-1", "ward-2"] and data.held_out == {}
    assert [example.response for example in data.clients["ward-1"]] == [f"ward-1's {number}." for number in range(3)]


def test_a_sites_own_file_is_read_as_the_server_would_read_it(tmp_path: Path) -> None:
    table = settings(tmp_path)
    there = build(Sites, table, "data").load(KEY).clients["ward-1"]
    columns = {"prompt_column": "question", "response_column": "answer"}
    assert SiteFile(path=table["files"]["ward-1"], **columns).load() == there
    files = Files(path=table["files"]["ward-1"], held_out_fraction=0.0, client_column="answer", **columns).load(KEY)
    assert {example.turns for held in files.clients.values() for example in held} == {
        example.turns for example in there
    }


def test_what_the_server_evaluates_on_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "held-out.jsonl", 2, "nobody")
    data = build(Sites, settings(tmp_path, files="none", held_out_path=path), "data").load(KEY)
    assert [len(examples) for examples in data.clients.values()] == [0, 0]
    assert list(data.held_out) == ["rows"] and len(data.held_out["rows"]) == 2


def test_settings_survive_their_own_toml(tmp_path: Path) -> None:
    for table in (settings(tmp_path), settings(tmp_path, files="none")):
        sites = build(Sites, table, "data")
        assert build(Sites, table_of(sites), "data") == sites


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sites": []}, r"name at least one site, and each once"),
        ({"sites": ["a", "a"], "files": "none"}, r"name at least one site, and each once"),
        ({"sites": ["a\nb"], "files": "none"}, r"'a\\nb' is no name for a site"),
        ({"files": {"ward-3": "x.jsonl"}}, r'"ward-3" is not in data.sites; did you mean "ward-'),
        ({"held_out_fraction": 0.1}, r"data.held_out_fraction: there is no such setting"),
    ],
)
def test_a_wrong_list_is_one_line(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        build(Sites, settings(tmp_path, **changes), "data")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'there is no file ".*none.jsonl"'):
        build(Sites, settings(tmp_path, files={"ward-1": str(tmp_path / "none.jsonl")}), "data").load(KEY)
