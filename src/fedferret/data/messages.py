"""One message of a row as a turn: OpenAI's form and ShareGPT's, in one column or mixed.

{"role": "user", "content": "hi"}                   content: a text, null beside tool calls, or a list of text parts
{"role": "assistant", "content": …, "weight": 0}    weight 0: context that is never trained on
{"from": "human", "value": "hi"}                    ShareGPT's names of roles
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from fedferret.core.text import plain_line
from fedferret.data.examples import ROLES, Turn, TurnExtra
from fedferret.data.faulty_rows import FaultyRow, text_in

SYSTEM, USER, ASSISTANT, TOOL = ROLES
_KEYS = {"role", "from", "content", "value", "weight", "tool_calls", "function_call", "name", "tool_call_id"}
_CALLS = ("function_call", "tool_call")  # roles of ShareGPT: the value is a call, as JSON
_ROLES: Mapping[str, str] = {
    **{role: role for role in ROLES},
    "developer": SYSTEM,
    **dict.fromkeys(("human",), USER),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "bing", "bard", *_CALLS), ASSISTANT),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), TOOL),
}


def turns_of(messages: object, where: str) -> tuple[Turn, ...]:
    """The turns of a list of messages; a system message without text is left out.

    Args:
        messages: as ``json.loads`` gives them.
        where: names file, row and column in errors.

    Raises:
        FaultyRow: a message that cannot be read, with its number.
    """
    if isinstance(messages, str):  # a column of CSV holds no list but as JSON text
        messages = _parsed(messages)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise FaultyRow(f'{where} is not a list of {{"role", "content"}} messages')
    turns = [_turn(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]
    return tuple(turn for turn in turns if turn.role != SYSTEM or turn.content.strip())


def tools_of(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """The tools that a row offers: a list of JSON schemas, or that list as JSON text; null and "" offer none.

    Args:
        value: of the column.
        where: names file, row and column in errors.

    Raises:
        FaultyRow: anything else.
    """
    if isinstance(value, str):
        value = _parsed(value) if value.strip() else None
    if value is None:
        return ()
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(tool, Mapping) for tool in value)
    ):
        raise FaultyRow(f"{where} is not a list of tools, each an object with a name and parameters")
    return tuple(_plain(tool, where) for tool in value)


def unread_keys(values: Iterable[object]) -> set[str]:
    """The keys of messages that are not read, such as "reasoning_content".

    Args:
        values: of columns; those that hold no messages are passed over.
    """
    lists = (value for value in values if isinstance(value, list | tuple))
    return {
        str(key)
        for message in chain.from_iterable(lists)
        if isinstance(message, Mapping)
        for key, value in message.items()
        if key not in _KEYS and value is not None
    }


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise FaultyRow(f'{where} is not an object with "role" and "content": {shown(message)}')
    for one, other in (("role", "from"), ("content", "value")):
        if None not in (message.get(one), message.get(other)) and message[one] != message[other]:
            raise FaultyRow(f'{where} has "{one}" and "{other}", and they differ: leave one of the two')
    given = message.get("role") or message.get("from")
    content = message["content"] if message.get("content") is not None else message.get("value")
    calls = _calls(message, where)
    if given is None or (content is None and not calls):
        raise FaultyRow(f'{where} has no "role" and "content": {shown(message)}')
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise FaultyRow(f"{where}: role {shown(given)} of a message is not one of {', '.join(_ROLES)}")
    text = "" if content is None else _text(content, where)
    if given in _CALLS:
        text, calls = "", _called(text, where)
    extra = TurnExtra(
        tool_calls=calls,
        name=_word(message, "name", where),
        tool_call_id=_word(message, "tool_call_id", where),
        trained=_weight(message, where),
    )
    return Turn(role, text, None if extra == TurnExtra() else extra)


def shown(value: object) -> str:
    """The beginning of a value's spelling, for an error; nested values are cut off, so any depth is shown."""
    try:
        return plain_line(reprlib.repr(value), 60)
    except ValueError:  # Python refuses to spell an integer of thousands of digits
        return f"a value of type {type(value).__name__}"


def _text(content: object, where: str) -> str:
    """A text, or the texts of a list of parts, joined as chat templates join them: with nothing between."""
    if not isinstance(content, Sequence) or isinstance(content, str | bytes):
        return text_in(content, f"{where}: the content")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind != "text":
            what = "no object" if kind is None else f"of type {shown(kind)}"
            raise FaultyRow(f'{where}: a part of the content is {what}; only {{"type": "text", "text": …}} is read')
        texts.append(text_in(part.get("text"), f"{where}: a part of the content"))
    return "".join(texts)


def _weight(message: Mapping[str, Any], where: str) -> bool:
    weight = message.get("weight")
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise FaultyRow(f"{where}: weight {shown(weight)}: give 0 or 1")
    return bool(weight)


def _calls(message: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    given, legacy = message.get("tool_calls"), message.get("function_call")
    if given is None:
        given = [] if legacy is None else [legacy]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise FaultyRow(f'{where}: "tool_calls" is not a list of calls')
    return tuple(_call(call, where) for call in given)


def _called(text: str, where: str) -> tuple[Mapping[str, Any], ...]:
    """The calls in ShareGPT's JSON text."""
    value = _parsed(text)
    return tuple(_call(call, where) for call in (value if isinstance(value, list) else [value]))


def _call(call: object, where: str) -> Mapping[str, Any]:
    """A call in OpenAI's form. Arguments that are JSON text become an object, as chat templates expect them."""
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise FaultyRow(f'{where}: a tool call has no "function" with a "name": {shown(call)}')
    arguments = function.get("arguments")
    read = _parsed(arguments) if isinstance(arguments, str) else arguments
    parsed = {} if arguments in (None, "") else read
    if not isinstance(parsed, Mapping):
        raise FaultyRow(f"{where}: the arguments of a tool call are no JSON object: {shown(arguments)}")
    head = {name: call[name] for name in ("id",) if call.get(name) is not None}
    return _plain({**head, "type": "function", "function": {"name": function["name"], "arguments": parsed}}, where)


def _word(message: Mapping[str, Any], name: str, where: str) -> str | None:
    value = message.get(name)
    return None if value is None else text_in(value, f'{where}: "{name}"')


def _parsed(text: str) -> object:
    """The JSON value of a text; the text where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _plain(value: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The same value, made of JSON's types alone: it is hashed, and handed to templates."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        plain: Mapping[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise FaultyRow(f"{where}: a tool or a call holds values that JSON has not") from None
    text_in(text, f"{where}: a tool or a call")  # refuses half of a character
    return plain
