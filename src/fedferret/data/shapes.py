"""Which shape rows have, by their columns, and the examples that a row of each shape gives.

    column "messages"                                      conversational: OpenAI's messages
    column "conversations"                                 conversational: ShareGPT's
    "instruction", "input" or "context", "response"        instruction: Dolly; Alpaca with "output"
    "prompt", "completion"                                 prompt and completion, each a text or messages
    "text"                                                 language modelling: all of the text is trained on

The first that fits is the shape. A column that a setting names is used before any of these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from fedferret.core.errors import UserError, nearest
from fedferret.data.examples import Example, Turn, instruction_example, listed
from fedferret.data.faulty_rows import FaultyRow, optional_text_of, shows, text_in, text_of
from fedferret.data.messages import ASSISTANT, USER, tools_of, turns_of, unread_keys
from fedferret.data.rows import Row

Metadata: TypeAlias = Mapping[str, Any]

_MESSAGES = ("messages", "conversations")
_PROMPTS = ("instruction", "prompt")
_INPUTS = ("input", "context")
_RESPONSES = ("response", "output", "completion")
_TEXT = "text"
_NO_MESSAGES = ("tools", "choices")


@dataclass(frozen=True)
class Shape:
    """How rows are read."""

    described: str  # for the user
    used: tuple[str, ...]  # the columns that are read
    examples: Callable[[Row, Metadata, str], tuple[Example, ...]]  # of a row, its metadata, words that name it


def shape_of(columns: Collection[str], asked: Mapping[str, str], source: str) -> Shape:
    """The shape of rows with these columns.

    Args:
        columns: of the rows.
        asked: columns that settings name, by "messages", "text", "prompt", "input" and "response".
        source: names the rows in errors.

    Raises:
        UserError: the columns fit no shape, or a column that a setting names is missing.
    """
    for setting, column in asked.items():
        require(column, columns, f"{setting}_column", source)
    paired = "prompt" in asked or "response" in asked
    if "messages" in asked or (not paired and "text" not in asked and (_first(_MESSAGES, columns))):
        column = asked.get("messages") or _first(_MESSAGES, columns) or ""
        return Shape(f'conversational, column "{column}"', (column, "tools"), partial(_conversation, column))
    if "text" in asked and not paired:
        return _text_shape(asked["text"])
    prompt = asked.get("prompt") or _first(_PROMPTS, columns)
    response = asked.get("response") or _first(_RESPONSES, columns)
    if prompt and response:
        used = [name for name in (prompt, asked.get("input"), response) if name]
        if len(set(used)) < len(used):
            raise UserError(
                f"{source}: prompt, input and response are read of the columns {listed(used)}: give each another"
            )
        return _pair_shape(prompt, asked.get("input"), response, columns, "response" in asked)
    if not paired and _TEXT in columns:
        return _text_shape(_TEXT)
    setting, column = ("response", _RESPONSES[0]) if prompt else ("prompt", _PROMPTS[0])
    require(column, columns, f"{setting}_column", source)
    raise AssertionError("a missing column is refused")


def require(column: str, columns: Collection[str], setting: str, source: str) -> None:
    """Refuse a column that is missing.

    Args:
        column: its name.
        columns: that there are.
        setting: that names it, without "data.".
        source: names the rows.

    Raises:
        UserError: with the nearest column.
    """
    if column not in columns:
        hint = nearest(column, columns)
        there = "" if hint.startswith(("allowed", "there")) else f" (columns: {', '.join(sorted(columns))})"
        raise UserError(f'{source} has no column "{column}" (data.{setting}): {hint}{there}')


def unused(rows: Sequence[Row], columns: Collection[str], used: Collection[str]) -> tuple[str, ...]:
    """Lines that name what is not read.

    Args:
        rows: some of the data.
        columns: that there are.
        used: the columns that are read.

    Returns:
        A line on columns and one on keys of messages; none where all are read.
    """
    keys = unread_keys(row.get(column) for row in rows for column in used if column not in _NO_MESSAGES)
    left = {"column": set(columns) - set(used), "key of messages": keys}
    plural = {"column": "columns", "key of messages": "keys of messages"}
    return tuple(
        f"not read: {what if len(names) == 1 else plural[what]} {listed(sorted(names))}"
        for what, names in left.items()
        if names
    )


def _first(names: Sequence[str], columns: Collection[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _text_shape(column: str) -> Shape:
    return Shape(f'language modelling, column "{column}"', (column,), partial(_whole_text, column))


def _pair_shape(prompt: str, given: str | None, response: str, columns: Collection[str], labels: bool) -> Shape:
    """A prompt with an optional input and a response; messages where the columns hold messages."""
    inputs = _INPUTS if prompt == _PROMPTS[0] else _INPUTS[:1]
    extra = given or _first(inputs, columns)
    kind = {"instruction": "instruction", "prompt": "prompt and completion"}.get(prompt, "prompt and response")
    used = tuple(name for name in (prompt, extra, response) if name is not None)
    return Shape(f"{kind}, columns {listed(used)}", (*used, "tools"), partial(_pair, prompt, extra, response, labels))


def _whole_text(column: str, row: Row, metadata: Metadata, where: str) -> tuple[Example, ...]:
    return (Example((Turn(ASSISTANT, text_of(row, column, where)),), metadata),)


def _conversation(column: str, row: Row, metadata: Metadata, where: str) -> tuple[Example, ...]:
    turns = turns_of(row.get(column), f'{where}: column "{column}"')
    return _examples((), turns, _with_tools(row, metadata, where), where)


def _pair(
    prompt: str, extra: str | None, response: str, labels: bool, row: Row, metadata: Metadata, where: str
) -> tuple[Example, ...]:
    asked, answer = row.get(prompt), row.get(response)
    if isinstance(asked, list | tuple) or isinstance(answer, list | tuple):
        before = _turns(asked, USER, prompt, row, where)
        return _examples(
            before, _turns(answer, ASSISTANT, response, row, where), _with_tools(row, metadata, where), where
        )
    text = text_of(row, response, where, numbers=labels)
    given = optional_text_of(row, extra, where) if extra is not None else ""
    return (instruction_example(text_of(row, prompt, where), given, text, _with_tools(row, metadata, where)),)


def _turns(value: object, role: str, column: str, row: Row, where: str) -> tuple[Turn, ...]:
    """A column that holds messages, or the text of one turn of the role."""
    if isinstance(value, list | tuple):
        if value and not isinstance(value[0], Mapping):
            text_in(value, f'{where}: column "{column}"')  # refuses a list of anything but messages in plain words
        return turns_of(value, f'{where}: column "{column}"')
    return (Turn(role, text_of(row, column, where)),)


def _examples(before: tuple[Turn, ...], turns: tuple[Turn, ...], metadata: Metadata, where: str) -> tuple[Example, ...]:
    """An example for every message of the assistant among ``turns`` that follows another message and has weight 1."""
    whole = before + turns
    found = []
    for index in range(max(1, len(before)), len(whole)):
        turn = whole[index]
        if turn.role != ASSISTANT or not turn.trained:
            continue
        if not shows(turn.content) and not turn.tool_calls:
            raise FaultyRow(f"{where}: message {index + 1}, of the assistant, is empty; fill it or remove the row")
        found.append(Example(whole[: index + 1], metadata))
    if not found:
        raise FaultyRow(
            f"{where}: no assistant message follows another message with weight 1, so nothing can be trained on"
        )
    return tuple(found)


def _with_tools(row: Row, metadata: Metadata, where: str) -> Metadata:
    given = row.get("tools")
    tools = () if given is None else tools_of(given, f'{where}: column "tools"')
    return {**metadata, "tools": tools} if tools else metadata
