"""A chat template: what it takes is found out once per model (``data/template_probes.py``), and turns are put so.

* A system turn that the template refuses or drops goes before the text of the next user turn.
* Consecutive turns of one role are merged where the template demands alternation.
* Content is a text, or a list of parts where the template reads nothing else.
* A date is the recipe's, never the machine's: a run would differ from day to day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from fedferret.core.errors import UserError
from fedferret.core.text import plain_line
from fedferret.data.encoding import Template, contexts_of
from fedferret.data.examples import Example, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_CHAT_TEMPLATE = 'this model has no chat template: set template = "alpaca" or give a template file'
_RESPONSE = "zqresponse"  # stands for the response where the text around it is asked for
_DRAWS = re.compile(r"\|\s*random\b|\bmap\(\s*['\"]random['\"]|\blipsum\s*\(")


@lru_cache(maxsize=8)  # a template is long, and is rendered for every example
def _draws(source: str) -> bool:
    return bool(_DRAWS.search(source))


class TemplateFailure(UserError):
    """A chat template that refuses turns, or fails on them."""


@dataclass(frozen=True)
class Habits:
    """What a chat template takes."""

    parts: bool = False  # content as a list of parts alone
    system: Literal["anywhere", "first", "nowhere"] = "anywhere"  # where a system turn may stand
    alternates: bool = False  # whether roles must alternate
    earlier: bool = True  # whether it writes the turns before the last question
    verbatim: bool = True  # whether it writes content as it stands, whatever its length, quotes and line ends
    tools: bool = True  # whether it writes the tools that are offered
    calls: Literal["objects", "texts", "none"] = "objects"  # how it reads the arguments of a call, if at all


@dataclass(frozen=True)
class Chat(Template):
    """A chat template."""

    jinja: str | None = None  # None: the tokenizer's chat template
    date: str | None = None  # today, such as "2026-11-28"; None: a template that writes the date is refused
    habits: Habits = field(default_factory=Habits)

    def includes_bos(self) -> bool:
        return True

    def prompt_text(self, example: Example, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        tools = example.metadata.get("tools", ())
        if self._joins(turns, example):
            return self._around(turns, tokenizer, tools)[0]
        return self.render(turns, tokenizer, generate=True, tools=tools)

    def beginning(
        self, example: Example, turns: Sequence[Turn], count: int, tokenizer: PreTrainedTokenizerBase
    ) -> str | None:
        try:
            return self.render(turns[:count], tokenizer, generate=False, tools=example.metadata.get("tools", ()))
        except TemplateFailure:  # such as a template that takes no end with this role
            return None

    def response_text(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
        newest, tools = contexts_of(example.turns[:-1])[0], example.metadata.get("tools", ())
        if self._joins(newest, example):
            end = self._around(newest, tokenizer, tools)[1].rstrip()
            return example.response + (end or tokenizer.eos_token or "")
        prompt = self.render(newest, tokenizer, generate=True, tools=tools)
        whole = self.render([*newest, example.turns[-1]], tokenizer, generate=False, tools=tools)
        calls, written = example.turns[-1].tool_calls, whole.removeprefix(prompt)
        if calls and not whole.startswith(prompt):
            raise TemplateFailure("the chat template begins a turn with a tool call unlike other turns; give another")
        # some templates open a thinking block in the prompt that a finished turn does not contain, and some take such
        # a block out of a finished turn: then use the text
        as_it_is = whole.startswith(prompt) and (calls or example.response.strip() in written)
        text = written.rstrip() if as_it_is else example.response
        ended = text.strip() != example.response.strip()
        return text if ended else text + (tokenizer.eos_token or "")

    def _joins(self, turns: Sequence[Turn], example: Example) -> bool:
        """Whether the response goes on with the prompt's last turn, because roles must alternate."""
        last, response = turns[-1], example.turns[-1]
        calls = last.tool_calls or response.tool_calls
        return self.habits.alternates and last.role == response.role == "assistant" and not calls

    def _around(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[str, str]:
        """The texts before and after a response that goes on with the last turn."""
        text = self.render([*turns, Turn("assistant", _RESPONSE)], tokenizer, generate=False, tools=tools)
        before, _, after = text.rpartition(_RESPONSE)
        return before, after

    def render(
        self,
        turns: Sequence[Turn],
        tokenizer: PreTrainedTokenizerBase,
        *,
        generate: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text of turns.

        Args:
            turns: of a conversation.
            tokenizer: the model's.
            generate: whether the beginning of the assistant's next turn follows.
            tools: that are offered, as JSON schemas.

        Raises:
            TemplateFailure: the template refuses the turns, or fails.
            UserError: there is no chat template, or it writes a date that no setting gives, or draws at random.
        """
        if self.jinja is None and not tokenizer.chat_template:
            raise UserError(NO_CHAT_TEMPLATE)
        import jinja2

        offered: Any = list(tools) or None
        messages = [self._message(turn) for turn in self._put(turns)]
        try:
            source = tokenizer.get_chat_template(self.jinja, offered)
            if _draws(source):
                raise UserError('the chat template draws at random: take that out, or set template = "alpaca"')
            if "strftime_now" in source:
                return self._dated(source, tokenizer, messages, offered, generate)
            return str(
                tokenizer.apply_chat_template(
                    messages,
                    tools=offered,
                    chat_template=self.jinja,
                    tokenize=False,
                    add_generation_prompt=generate,
                )
            )
        except UserError:
            raise
        except Exception as error:  # a template is a program, and can raise whatever Python can
            roles = plain_line(", ".join(turn.role for turn in turns), 100)
            reason = plain_line(str(error)) or "it gives no reason"
            if type(error) is jinja2.TemplateError:  # its own raise_exception
                said = f"refuses turns {roles}: {reason}"
            else:
                said = f"fails on turns {roles}: {type(error).__name__}: {reason}"
            raise TemplateFailure(f'the chat template {said}; set template = "alpaca"') from None

    def _dated(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[dict[str, Any]],
        tools: Any,
        generate: bool,
    ) -> str:
        """As ``apply_chat_template``, which takes no function, with the recipe's date for the machine's."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        given: dict[str, Any] = {**tokenizer.special_tokens_map, "strftime_now": self._today()}
        return str(
            _compile_jinja_template(source).render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=generate, **given
            )
        )

    def _today(self) -> Callable[[str], str]:
        day = None if self.date is None else datetime.fromisoformat(self.date)

        def strftime_now(format: str) -> str:
            if day is None:
                raise UserError(
                    "the chat template writes the date, so every day gives another run: "
                    'set text.date, such as "2026-11-28"'
                )
            return day.strftime(format)

        return strftime_now

    def _put(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns as the template takes them."""
        put = list(turns) if self.habits.system == "anywhere" else _folded(turns, self.habits.system == "first")
        return _merged(put) if self.habits.alternates else put

    def _message(self, turn: Turn) -> dict[str, Any]:
        content: Any = [{"type": "text", "text": turn.content}] if self.habits.parts else turn.content
        message = {"role": turn.role, "content": content}
        if turn.extra is None:
            return message
        if turn.tool_calls:
            message["tool_calls"] = [self._call(call) for call in turn.tool_calls]
        named = {"name": turn.name, "tool_call_id": turn.extra.tool_call_id}
        return message | {name: value for name, value in named.items() if value is not None}

    def _call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call["function"]
        if self.habits.calls != "texts" or isinstance(function["arguments"], str):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


def _folded(turns: Sequence[Turn], keeps_first: bool) -> list[Turn]:
    """System turns put before the text of the user turn that follows, or as a user turn where none follows."""
    put: list[Turn] = []
    waiting: list[str] = []
    for index, turn in enumerate(turns):
        if turn.role == "system" and (index or not keeps_first):
            waiting.append(turn.content)
            continue
        if waiting and turn.role == "user":
            turn = replace(turn, content="\n\n".join([*waiting, turn.content]))
        elif waiting:
            put.append(Turn("user", "\n\n".join(waiting)))
        waiting = []
        put.append(turn)
    return [*put, Turn("user", "\n\n".join(waiting))] if waiting else put


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Consecutive turns of the user, or of the assistant, as one; a turn with tool calls stays apart."""
    put: list[Turn] = []
    for turn in turns:
        last = put[-1] if put else None
        same = last is not None and last.role == turn.role and turn.role in ("user", "assistant")
        if last is not None and same and not last.tool_calls and not turn.tool_calls:
            put[-1] = Turn(turn.role, f"{last.content}\n\n{turn.content}")
        else:
            put.append(turn)
    return put
