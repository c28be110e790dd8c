"""Templates by name: "chat" is the model's chat template; "alpaca" is the paper's; a ``.jinja`` file is a chat
template, any other file is a text with {instruction}, {input} (optional) and {response}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError
from fedferret.data.chat_template import NO_CHAT_TEMPLATE as NO_CHAT_TEMPLATE
from fedferret.data.chat_template import Chat as Chat
from fedferret.data.encoding import Template as Template
from fedferret.data.encoding import Tokens as Tokens
from fedferret.data.examples import Example, Turn
from fedferret.data.text import TextSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Text(Template):
    """Plain text around the instruction, the input and the response."""

    before: str  # the response, with {instruction} and {input}
    after: str = ""  # the response
    without_input: str | None = None  # instead of ``before`` for examples without input

    def prompt_text(self, example: Example, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        apart = "{input}" in self.before  # without a place for it, the input follows the instruction, as in a chat
        given = str(example.metadata.get("input", "")) if apart else ""
        instruction = str(example.metadata["instruction"]) if given else _transcript(turns)
        text = self.before if given or self.without_input is None else self.without_input
        return _fill(text, {"instruction": instruction, "input": given})

    def beginning(
        self, example: Example, turns: Sequence[Turn], count: int, tokenizer: PreTrainedTokenizerBase
    ) -> str | None:
        text = self.before if self.without_input is None else self.without_input
        return text.partition("{instruction}")[0] + "\n".join(_lines(turns)[:count])

    def response_text(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
        return example.response + self.after + (tokenizer.eos_token or "")


_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
)
ALPACA = Text(
    before=_ALPACA.replace("{paired}", ", paired with an input that provides further context")
    + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    without_input=_ALPACA.replace("{paired}", "") + "\n\n### Instruction:\n{instruction}\n\n### Response:",
)


def template_of(text: TextSettings) -> Template:
    """The template that the settings name, with the settings. Raises UserError."""
    chosen = template(text.template)
    dated = {"date": text.date} if isinstance(chosen, Chat) else {}
    return replace(chosen, cut=text.cut, train_on=text.train_on, **dated)


def template(name: str) -> Template:
    """The template called ``name``: "chat", "alpaca" or the path of a file.

    Raises:
        UserError: for an unknown name or a faulty file.
    """
    if name == "chat":
        return Chat()
    if name == "alpaca":
        return ALPACA
    path = Path(name)
    if not path.is_file():
        raise UserError(f'there is no template "{name}": give "chat", "alpaca" or the path of a template file')
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of a prompt
    except UnicodeDecodeError:
        raise UserError(f'template "{name}" is not UTF-8 text') from None
    if path.suffix in (".jinja", ".jinja2", ".j2"):
        if "messages" not in text:
            raise UserError(f'template "{name}" does not use "messages": a .jinja file is a chat template')
        return Chat(jinja=text)
    before, response, after = text.partition("{response}")
    for placeholder, there in (("{response}", response), ("{instruction}", "{instruction}" in before)):
        if not there:
            raise UserError(
                f'template "{name}" has no {placeholder}: write {{instruction}}, {{input}} if wanted, then {{response}}'
            )
    unknown = [*(set(_PLACEHOLDER.findall(before)) - {"instruction", "input"}), *_PLACEHOLDER.findall(after)]
    if unknown:
        place = " after {response}" if f"{{{unknown[0]}}}" in after else ""
        raise UserError(
            f'template "{name}" has {{{unknown[0][:40]}}}{place}: write {{instruction}}, {{input}} if wanted, then '
            f"{{response}} once, and other words without braces"
        )
    return Text(before=before, after=after.rstrip("\n"))


def _transcript(turns: Sequence[Turn]) -> str:
    """The content of a single turn; several turns as a transcript with roles."""
    return "\n".join(_lines(turns))


def _lines(turns: Sequence[Turn]) -> list[str]:
    if len(turns) == 1:
        return [turns[0].content]
    return [f"{turn.role.capitalize()}: {turn.content}" for turn in turns]


def _fill(text: str, fields: Mapping[str, str]) -> str:
    # one pass, so that a placeholder in a field's text is not replaced
    return re.sub(r"\{(instruction|input)\}", lambda match: fields[match[1]], text)
