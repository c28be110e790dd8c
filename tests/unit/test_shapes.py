"""Rows as people have them: each shape is recognised, said, and read whole; what cannot be read is named by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.examples import Example, FederatedData
from fedferret.data.files import Files
from fedferret.data.partition import Partition


def load(folder: Path, rows: list[Any], **settings: Any) -> FederatedData:
    """The data of these rows, all of one client and none held out."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Files(path=str(path), held_out_fraction=0.0, partition=Partition(clients=1), **settings).load(Key.of(1))


def trained(data: FederatedData) -> list[Example]:
    """All training examples."""
    return [example for examples in data.clients.values() for example in examples]


def said(example: Example) -> list[str]:
    """Roles and texts of an example."""
    return [f"{turn.role}: {turn.content}" for turn in example.turns]


def chat(*messages: Any) -> dict[str, Any]:
    """A row of OpenAI's messages, from pairs of role and content."""
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


SHAPES: list[tuple[dict[str, Any], str, list[str]]] = [
    (chat(("user", "q"), ("assistant", "a")), 'conversational, column "messages"', ["user: q", "assistant: a"]),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        'conversational, column "conversations"',
        ["system: s", "user: q", "assistant: a"],
    ),
    (
        {"prompt": "q", "completion": "a"},
        'prompt and completion, columns "prompt", "completion"',
        ["user: q", "assistant: a"],
    ),
    (
        {
            "prompt": [{"role": "developer", "content": "s"}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        'prompt and completion, columns "prompt", "completion"',
        ["system: s", "user: q", "assistant: a"],
    ),
    (
        {"instruction": "q", "input": "i", "output": "a"},
        'instruction, columns "instruction", "input", "output"',
        ["user: q\n\ni", "assistant: a"],
    ),
    (
        {"instruction": "q", "context": "i", "response": "a"},
        'instruction, columns "instruction", "context", "response"',
        ["user: q\n\ni", "assistant: a"],
    ),
    ({"text": "all of it"}, 'language modelling, column "text"', ["assistant: all of it"]),
    (
        chat(("user", [{"type": "text", "text": "q1, "}, {"type": "text", "text": "q2"}]), ("assistant", "a")),
        'conversational, column "messages"',
        ["user: q1, q2", "assistant: a"],
    ),
]


@pytest.mark.parametrize(("row", "shape", "turns"), SHAPES)
def test_each_shape_is_recognised_said_and_read_whole(
    tmp_path: Path, row: dict[str, Any], shape: str, turns: list[str]
) -> None:
    data = load(tmp_path, [row])
    assert [said(example) for example in trained(data)] == [turns]
    assert data.notes == (f"read as: {shape}",)


def test_columns_that_a_setting_names_win_and_the_unused_are_named(tmp_path: Path) -> None:
    row = {**chat(("user", "q"), ("assistant", "a")), "text": "t", "question": "Q", "answer": "A", "id": 7}
    by_columns = load(tmp_path, [row], prompt_column="question", response_column="answer")
    assert said(trained(by_columns)[0]) == ["user: Q", "assistant: A"]
    assert 'not read: columns "id", "messages", "text"' in by_columns.notes
    assert said(trained(load(tmp_path, [row], text_column="text"))[0]) == ["assistant: t"]
    assert (
        said(trained(load(tmp_path, [{**row, "chat": row["messages"], "messages": 1}], messages_column="chat"))[0])[0]
        == "user: q"
    )


@pytest.mark.parametrize("asked", [{"prompt_column": "response"}, {"input_column": "instruction"}])
def test_one_column_has_one_part(asked: dict[str, str], tmp_path: Path) -> None:
    """A model would learn to repeat its prompt."""
    with pytest.raises(UserError, match="give each another"):
        load(tmp_path, [{"instruction": "q", "response": "a"}], **asked)


def test_keys_of_messages_that_are_not_read_are_named(tmp_path: Path) -> None:
    row = chat(("user", "q"), ("assistant", "a"))
    row["messages"][1] |= {"reasoning_content": "hm", "refusal": None}
    assert load(tmp_path, [row]).notes[1:] == ('not read: key of messages "reasoning_content"',)


def test_messages_as_json_text_are_messages(tmp_path: Path) -> None:
    row = chat(("user", "q"), ("assistant", "a"))
    assert said(trained(load(tmp_path, [{"messages": json.dumps(row["messages"])}]))[0]) == ["user: q", "assistant: a"]


def test_a_turn_of_weight_0_is_context_and_no_example(tmp_path: Path) -> None:
    row = chat(("user", "a"), ("assistant", "unlearned"), ("user", "b"), ("assistant", "learned"))
    row["messages"][1]["weight"], row["messages"][3]["weight"] = 0, 1
    (example,) = trained(load(tmp_path, [row]))
    assert said(example)[1::2] == ["assistant: unlearned", "assistant: learned"]
    assert [turn.trained for turn in example.turns] == [True, False, True, True]
    row["messages"][3]["weight"] = 0
    with pytest.raises(UserError, match=r"row 1: no assistant message .* with weight 1"):
        load(tmp_path, [row])


def test_tools_and_their_calls_are_kept_with_arguments_as_objects(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    row = chat(("user", "q"), ("assistant", None), ("tool", "2"), ("assistant", "two"))
    row["messages"][1]["tool_calls"] = [call]
    row["messages"][2] |= {"tool_call_id": "c1", "name": "add"}
    row["tools"] = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    first, second = trained(load(tmp_path, [row]))
    assert first.turns[-1].tool_calls[0]["function"] == {"name": "add", "arguments": {"x": 1}}
    assert second.turns[2].role == "tool" and second.turns[2].name == "add"
    assert second.metadata["tools"][0]["function"]["name"] == "add"
    fingerprints = {load(tmp_path, [row]).fingerprint}
    row["tools"][0]["function"]["name"] = "sum"
    fingerprints.add(load(tmp_path, [row]).fingerprint)
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = "{}"
    assert len(fingerprints | {load(tmp_path, [row]).fingerprint}) == 3


CALLED = {"function": {"name": "f", "arguments": '{"a": '}}
FAULTS: list[tuple[dict[str, Any], str]] = [
    (chat(("user", "q"), ("assistant", "")), "message 2, of the assistant, is empty"),
    (chat(("user", "q"), ("assistant", None)), 'message 2 has no "role" and "content"'),
    (
        chat(("user", [{"type": "image_url"}]), ("assistant", "a")),
        "message 1: a part of the content is of type 'image_url'",
    ),
    (chat(("user", ["a"]), ("assistant", "a")), "message 1: a part of the content is no object"),
    (chat(("user", 5), ("assistant", "a")), "message 1: the content holds a number, not a text"),
    (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]},
        "weight 0.5: give 0 or 1",
    ),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [3]}]}, "a tool call has no"),
    (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"name": "f\ud800"}]}]},
        "a tool or a call holds half of a character",
    ),
    (
        {**chat(("user", "q"), ("assistant", "a")), "tools": [{"name": "f", "parameters": {"\udfff": 1}}]},
        "a tool or a call holds half of a character",
    ),
    (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALLED]}]},
        "the arguments of a tool call are no JSON object: '{\"a\": '",
    ),
    ({"messages": [{"role": "user", "from": "gpt", "value": "q"}]}, 'message 1 has "role" and "from", and they differ'),
    ({"messages": [["user", "q"]]}, "message 1 is not an object"),
    ({"conversations": [{"from": "martian", "value": "q"}]}, "role 'martian' of a message is not one of"),
    ({"prompt": "q", "completion": ""}, 'column "completion" is empty'),
    ({"instruction": "q", "output": ["a"]}, 'column "output" holds a list, not a text'),
    ({"text": " "}, 'column "text" is empty'),
    ({"text": None}, 'column "text" is empty'),
]


@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_a_faulty_row_is_one_line_with_its_number(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, [row])
    assert "row 1: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
