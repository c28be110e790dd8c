"""Many rows: made of their file when they are asked for, and tokenised when a batch needs them, with the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedferret.core.keys import Key
from fedferret.data import faulty_rows
from fedferret.data.batches import TokenisedData
from fedferret.data.encoding import Tokens
from fedferret.data.examples import Example, Turn
from fedferret.data.files import Files
from fedferret.data.held_out import hold_out
from fedferret.data.on_demand import TokenisedOnDemand
from fedferret.data.partition import Partition
from fedferret.data.summary import summarise
from fedferret.data.template_probes import check, fitted
from fedferret.data.templates import template_of
from fedferret.data.text import TextSettings
from fedferret.models.tiny import tiny_tokenizer


def test_rows_that_are_made_when_asked_for_are_those_that_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, object]] = []
    for number in range(60):
        said = [("user", f"a{number}"), ("assistant", "b"), ("user", "c"), ("assistant", f"d{number}")]
        messages = [{"role": role, "content": content} for role, content in said[: 2 + number % 3]]
        rows.append({"messages": messages, "category": "xyz"[number % 3]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = Files(path=str(tmp_path / "rows.jsonl"), partition=Partition(clients=3), held_out_categories=("z",))
    kept = hold_out(files.load(Key.of(1)), 0.2, Key.of(2))
    monkeypatch.setattr(faulty_rows, "KEPT", 0)
    made = hold_out(files.load(Key.of(1)), 0.2, Key.of(2))
    assert not isinstance(next(iter(made.clients.values())), tuple)
    assert made.fingerprint == kept.fingerprint and summarise(made) == summarise(kept)
    template = fitted(template_of(TextSettings()), tiny_tokenizer())
    notes = check(template, tiny_tokenizer(), made, 8)
    assert notes == check(template, tiny_tokenizer(), kept, 8) and "cuts, of all 80 examples" in notes[-1]
    for client, examples in kept.clients.items():
        assert list(made.clients[client]) == list(examples)
        assert [made.clients[client][index] for index in range(len(examples))] == list(examples)
        assert tuple(made.clients[client][-3:]) == tuple(examples[-3:])
    assert made.held_out["rows"] == kept.held_out["rows"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("count", "size"), [(200, 3), (64, 4), (65, 4), (7, 8)])
def test_tokens_on_demand_make_the_same_batches(count: int, size: int, packed: bool) -> None:
    lengths = Key.of(5).permutation(count)
    examples = [Example((Turn("user", str(row)), Turn("assistant", "x"))) for row in range(count)]

    def encode(some: object) -> TokenisedData:
        numbers = [int(each.prompt) for each in some]  # type: ignore[attr-defined]
        tokens = [Tokens(tuple(range(row, row + 2 + lengths[row] % 9)), 1, False) for row in numbers]
        return TokenisedData(tokens, packed)

    whole, lazy = encode(examples), TokenisedOnDemand(examples, encode)
    for key in (Key.of(1), Key.of(2), None, Key.of(3)):
        for one, other in zip(whole.batches(size, key), lazy.batches(size, key), strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
    assert lazy.lengths == whole.lengths and len(lazy) == count
    assert list(lazy.take([1, 0]).lengths) == list(whole.take([1, 0]).lengths)


def test_the_held_out_share_of_many_rows_is_bounded_and_said(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": f"q{number}", "response": "a"}) for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    files = Files(path=str(tmp_path / "rows.jsonl"), partition=Partition(clients=3), held_out_fraction=0.5)
    data = replace(files, max_held_out=7).load(Key.of(1))
    assert len(data.held_out["rows"]) == 7 and sum(map(len, data.clients.values())) == 53
    assert any("7 rows are held out and not 30" in note for note in data.notes)
    assert len(replace(files, max_held_out=None).load(Key.of(1)).held_out["rows"]) == 30
