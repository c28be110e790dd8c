"""Local files: every format gives the same rows, training uses no held-out row, every fault is one line."""

from __future__ import annotations

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.files import Files
from fedferret.data.partition import Partition

ROWS = [
    {
        "instruction": f"Question {n}?",
        "input": "Some, input" if n % 2 else "",
        "response": f"Answer {n}.",
        "category": "abc"[n % 3],
    }
    for n in range(40)
]


def _write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def _texts(examples):
    return sorted("|".join(turn.content for turn in example.turns) for example in examples)


def _trained(data):
    return [example for examples in data.clients.values() for example in examples]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_every_row_once(tmp_path, suffix):
    data = Files(path=_write(tmp_path / f"rows.{suffix}", ROWS), partition=Partition(clients=3)).load(Key.of(1))
    assert list(data.clients) == ["client-0", "client-1", "client-2"]
    assert len(data.held_out["rows"]) == 4
    expected = sorted(
        f"{row['instruction']}\n\n{row['input']}|{row['response']}"
        if row["input"]
        else f"{row['instruction']}|{row['response']}"
        for row in ROWS
    )
    assert _texts([*_trained(data), *data.held_out["rows"]]) == expected
    example = next(example for example in _trained(data) if "input" in example.metadata)
    assert example.metadata["input"] == "Some, input" and example.metadata["instruction"].startswith("Question")
    assert example.metadata["category"] in "abc"


def test_the_data_follow_from_the_key(tmp_path):
    files = Files(path=_write(tmp_path / "rows.jsonl", ROWS))
    assert files.load(Key.of(1)) == files.load(Key.of(1))
    assert files.load(Key.of(1)) != files.load(Key.of(2))


def test_published_formats_by_column_names(tmp_path):
    dolly = [{"instruction": "Why?", "context": "A text", "response": "So.", "category": "open_qa"}] * 12
    gsm8k = [{"question": "2 + 2?", "answer": "#### 4"}] * 12
    data = Files(path=_write(tmp_path / "dolly.jsonl", dolly), input_column="context").load(Key.of(1))
    assert _trained(data)[0].turns[0].content == "Why?\n\nA text"
    data = Files(path=_write(tmp_path / "gsm8k.jsonl", gsm8k), prompt_column="question", response_column="answer").load(
        Key.of(1)
    )
    assert _trained(data)[0].response == "#### 4"


def test_a_client_column_names_the_clients_and_each_keeps_at_least_one_row(tmp_path):
    rows = [{**row, "who": f"site {min(n, 3)}"} for n, row in enumerate(ROWS)]
    data = Files(path=_write(tmp_path / "rows.csv", rows), client_column="who", held_out_fraction=0.9).load(Key.of(1))
    assert list(data.clients) == ["site 0", "site 1", "site 2", "site 3"]
    assert [len(examples) for examples in data.clients.values()] == [1, 1, 1, 1]
    assert len(data.held_out["rows"]) == 36
    assert data.clients["site 1"][0].response == "Answer 1."


def test_chat_rows_train_on_every_assistant_message_and_are_held_out_whole(tmp_path):
    def conversation(n):
        messages = [
            ("system", "Be kind."),
            ("user", f"a{n}"),
            ("assistant", f"b{n}"),
            ("user", f"c{n}"),
            ("assistant", f"d{n}"),
        ]
        return {"messages": [{"role": role, "content": content} for role, content in messages]}

    path = _write(tmp_path / "chat.jsonl", [conversation(n) for n in range(20)])
    data = Files(path=path, held_out_fraction=0.25, partition=Partition(clients=2)).load(Key.of(1))
    trained, held_out = _trained(data), data.held_out["rows"]
    assert len(trained) == 30 and len(held_out) == 10
    assert {example.response[0] for example in trained} == {"b", "d"}
    assert [turn.role for turn in trained[1].turns] == ["system", "user", "assistant", "user", "assistant"]

    def numbers(examples):
        return {turn.content[1:] for example in examples for turn in example.turns if turn.role != "system"}

    assert not numbers(trained) & numbers(held_out)


def test_parquet_keeps_chat_messages(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 10
    data = Files(path=_write(tmp_path / "chat.parquet", rows), held_out_fraction=0.0).load(Key.of(1))
    assert len(_trained(data)) == 10 and not data.held_out


def test_objects_in_parquet_have_no_keys_of_other_rows(tmp_path):
    """A table's objects all have the same keys; a model would learn to call a tool with arguments that are null."""

    def row(number):
        arguments = {"city": f"Ulm {number}"} if number % 2 else {"day": number}
        call = {"function": {"name": "w", "arguments": arguments}}
        return {"messages": [{"role": "user", "content": "w?"}, {"role": "assistant", "tool_calls": [call]}]}

    rows = [row(number) for number in range(40)]
    paths = [_write(tmp_path / name, rows) for name in ("rows.jsonl", "rows.parquet")]
    lines, table = (Files(path, partition=Partition(clients=2)).load(Key.of(1)) for path in paths)
    assert lines.fingerprint == table.fingerprint


def test_held_out_path_and_categories(tmp_path):
    path, other = _write(tmp_path / "rows.jsonl", ROWS), _write(tmp_path / "test.jsonl", ROWS[:5])
    data = Files(path=path, held_out_path=other, held_out_categories=("c",)).load(Key.of(1))
    assert {name: len(examples) for name, examples in data.held_out.items()} == {"rows": 5, "categories": 13}
    assert {example.metadata["category"] for example in _trained(data)} == {"a", "b"}
    assert len(_trained(data)) == 27


def test_dirichlet_by_the_category_column(tmp_path):
    path = _write(tmp_path / "rows.jsonl", ROWS)
    data = Files(path=path, partition=Partition("pathological", 6, classes=1)).load(Key.of(1))
    assert [len({example.metadata["category"] for example in examples}) for examples in data.clients.values()] == [
        1
    ] * 6


def _fault(tmp_path, content, name="rows.jsonl", **settings):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        Files(path=str(path), **settings).load(Key.of(1))
    assert "\n" not in str(error.value)
    return str(error.value)


GOOD = '{"instruction": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "rows.jsonl", "is empty"),
        ("\n \n", "rows.jsonl", "is empty"),
        ("[]", "rows.json", "is empty"),
        ("instruction,response\n", "rows.csv", "is empty"),
        (GOOD + '{"instruction": \n', "rows.jsonl", "line 2 is not JSON"),
        (GOOD + "[1]\n", "rows.jsonl", "line 2 is not an object of named columns"),
        ("{}", "rows.json", "is not a JSON array"),
        (
            "a\n",
            "rows.txt",
            "files end in .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, each also with .gz or .zst",
        ),
        ("no parquet", "rows.parquet", "is not a Parquet file"),
        (b"\xff\xfe", "rows.jsonl", "is not UTF-8 text"),
        ("instruction,response\na\n", "rows.csv", "line 2: not as many fields"),
        ("instruction,response\na,b,c\n", "rows.csv", "line 2: not as many fields"),
        ('instruction,response\n"a"x,b\n', "rows.csv", "line 2 is not CSV"),
        (GOOD + '{"instruction": "a", "response": " "}', "rows.jsonl", 'row 2: column "response" is empty'),
        (GOOD + '{"instruction": "a"}', "rows.jsonl", 'row 2: column "response" is empty'),
        ('{"messages": "hello"}', "rows.jsonl", "is not a list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "rows.jsonl", "role 'robot'"),
        ('{"messages": [{"role": "user"}]}', "rows.jsonl", 'has no "role" and "content"'),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "rows.jsonl", "nothing can be trained on"),
        (GOOD, "rows.jsonl", "partition.clients is 10 but there are 1 rows"),
    ],
)
def test_a_faulty_file_is_one_line(tmp_path, content, name, message):
    assert message in _fault(tmp_path, content, name)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        Files(path=str(tmp_path / "absent.jsonl")).load(Key.of(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"response_column": "respnse"},
            'no column "respnse" (data.response_column): did you mean "response"? (columns: instruction, response)',
        ),
        ({"prompt_column": "xyz"}, 'no column "xyz" (data.prompt_column): allowed: instruction, response'),
        ({"input_column": "context"}, 'no column "context" (data.input_column)'),
        ({"client_column": "site"}, 'no column "site" (data.client_column)'),
        ({"category_column": "kind"}, 'no column "kind" (data.category_column)'),
        ({"messages_column": "chat"}, 'no column "chat" (data.messages_column)'),
        ({"held_out_categories": ("x",)}, 'has no category "x" to hold out'),
    ],
)
def test_an_error_on_a_wrong_column_suggests_the_nearest(tmp_path, settings, message):
    assert message in _fault(tmp_path, GOOD * 20, **settings)


def test_impossible_shares_are_refused(tmp_path):
    assert "held_out_fraction is 1.0" in _fault_of_settings(held_out_fraction=1.0)
    path = _write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match="no row is left"):
        Files(path=path, held_out_categories=("a", "b", "c")).load(Key.of(1))


def _fault_of_settings(**settings):
    with pytest.raises(UserError) as error:
        Files(path="rows.jsonl", **settings)
    return str(error.value)
