"""The hub's loader on a local folder in the hub's layout, and the loader's errors where there is nothing to load."""

from __future__ import annotations

import json

import pytest

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.hub import Hub


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "questions"
    path.mkdir()
    for split, count in (("train", 30), ("test", 6)):
        rows = [{"question": f"{split} {n}?", "answer": f"{n}"} for n in range(count)]
        (path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def test_splits_become_clients_and_held_out_rows(folder):
    hub = Hub(name=str(folder), held_out_split="test", prompt_column="question", response_column="answer")
    data = hub.load(Key.of(1))
    assert len(data.clients) == 10 and sum(map(len, data.clients.values())) == 30
    assert [example.turns[0].content for example in data.held_out["rows"]] == [f"test {n}?" for n in range(6)]
    assert data.notice is not None


def test_a_wrong_column_is_named(folder):
    with pytest.raises(UserError, match='no column "instruction"'):
        Hub(name=str(folder)).load(Key.of(1))


@pytest.mark.parametrize(("name", "split"), [("nobody/no-such-data", "train"), ("questions", "trian")])
def test_a_failed_load_is_one_line(folder, monkeypatch, name, split):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError) as error:
        Hub(name=name, split=split).load(Key.of(1))
    assert f'cannot load "{name}" (split "{split}") from the hub' in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_name_is_refused_at_once():
    with pytest.raises(UserError, match=r"data\.name is empty"):
        Hub(name="")
