"""Text to tokens: a template turns an example into prompt and response, and says where the response starts.

1. The prompt's text and the response's text (with its end mark) are tokenised apart and concatenated, so the
   boundary is exact and what is trained is what generation will see: no token spans both.
2. The response is kept whole up to ``max_tokens - 1``, then cut at its end. The prompt gets the room that is left:
   the oldest turns go first, up to a user turn (a system turn stays), then tokens from the left.
3. The response ends with the chat template's end-of-turn mark, or with the end-of-text token where that has none.

Templates: "chat" is the model's own; "alpaca" the paper's; a ``.jinja`` file is a chat template, any other file a
text with {instruction}, {input} (optional) and {response}. Cost of ``encode``: O(max_tokens log turns).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError
from fedferret.data.examples import Example, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example: ``ids[response_start:]`` is the response, at least one token, after at least one of the prompt."""

    ids: tuple[int, ...]
    response_start: int
    response_cut: bool


class Template(ABC):
    """Two texts from an example; the rest is shared."""

    @abstractmethod
    def prompt_text(self, example: Example, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        """What the model reads before it answers; ``turns`` are those of the prompt that are kept."""

    @abstractmethod
    def response_text(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
        """The response with its end mark."""

    def begins_itself(self) -> bool:
        """Whether the text holds the begin-of-text token where the model wants one."""
        return False

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
        """Prompt and response, at most ``max_tokens`` (at least 2) in all."""
        response = _ids(self.response_text(example, tokenizer), tokenizer)
        kept = response[: max_tokens - 1]
        prompt = self.prompt(example, tokenizer, max_tokens - len(kept))
        return Tokens(prompt + kept, len(prompt), len(kept) < len(response))

    def prompt(self, example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[int, ...]:
        """The prompt's tokens, at most ``max_tokens``: what to generate from."""
        contexts = _contexts(example.turns[:-1])

        @cache
        def ids(kept: int) -> tuple[int, ...]:
            return _ids(self.prompt_text(example, contexts[kept - 1], tokenizer), tokenizer)

        begin = () if self.begins_itself() else _begin(tokenizer)
        room = max_tokens - len(begin)
        # gallop from the newest turn, then bisect: nothing much longer than the room is ever tokenised
        reach = 1
        while reach < len(contexts) and len(ids(reach)) <= room:
            reach *= 2
        counts = range(1, min(reach, len(contexts)) + 1)
        kept = max(bisect_right(counts, room, key=lambda count: len(ids(count))), 1)
        whole = ids(kept)
        return (begin + whole[max(len(whole) - room, 0) :])[-max_tokens:]


NO_CHAT_TEMPLATE = 'this model has no chat template: set template = "alpaca" or give a template file'


@dataclass(frozen=True)
class Chat(Template):
    """A chat template: the tokenizer's own, or ``jinja``."""

    jinja: str | None = None

    def begins_itself(self) -> bool:
        return True

    def prompt_text(self, example: Example, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        return self._render(turns, tokenizer, generate=True)

    def response_text(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
        newest = _contexts(example.turns[:-1])[0]
        prompt = self._render(newest, tokenizer, generate=True)
        whole = self._render([*newest, example.turns[-1]], tokenizer, generate=False)
        # some templates open a thought in the prompt that a finished turn does not show: then the text alone
        text = whole.removeprefix(prompt).rstrip() if whole.startswith(prompt) else example.response
        ended = text.strip() != example.response.strip()
        return text if ended else text + (tokenizer.eos_token or "")

    def _render(self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, generate: bool) -> str:
        if self.jinja is None and not tokenizer.chat_template:
            raise UserError(NO_CHAT_TEMPLATE)
        import jinja2

        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=self.jinja, tokenize=False, add_generation_prompt=generate
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(turn.role for turn in turns)
            raise UserError(f'the chat template refuses turns {roles}: {error}; set template = "alpaca"') from None
        return str(text)


@dataclass(frozen=True)
class Text(Template):
    """Plain text around the fields; ``without_input`` is used for examples that have none."""

    before: str
    after: str = ""
    without_input: str | None = None

    def prompt_text(self, example: Example, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        given = str(example.metadata.get("input", ""))
        instruction = str(example.metadata["instruction"]) if given else _transcript(turns)
        text = self.before if given or self.without_input is None else self.without_input
        return _fill(text, {"instruction": instruction, "input": given})

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


def template(name: str) -> Template:
    """ "chat", "alpaca" or the path of a file."""
    if name == "chat":
        return Chat()
    if name == "alpaca":
        return ALPACA
    path = Path(name)
    if not path.is_file():
        raise UserError(f'there is no template "{name}": give "chat", "alpaca" or the path of a template file')
    try:
        text = path.read_text(encoding="utf-8")
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
    return Text(before=before, after=after.rstrip("\n"))


def _contexts(turns: Sequence[Turn]) -> list[list[Turn]]:
    """The prompts that may stand for ``turns``, shortest first: each starts at a user turn, after the system's.

    Many chat templates refuse a conversation that starts with the assistant, so an opening message of the
    assistant's is left out, unless there is nothing else.
    """
    system = [turn for turn in turns[:1] if turn.role == "system"]
    spoken = turns[len(system) :]
    starts = [index for index, turn in enumerate(spoken) if turn.role == "user"] or [0]
    return [[*system, *spoken[start:]] for start in reversed(starts)]


def _transcript(turns: Sequence[Turn]) -> str:
    """One turn as it stands; several as a transcript with their roles."""
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)


def _fill(text: str, fields: Mapping[str, str]) -> str:
    # one pass, so that a field's text that looks like a placeholder stays as it is
    return re.sub(r"\{(instruction|input)\}", lambda match: fields[match[1]], text)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a text. Pieces between special tokens are remembered: conversations repeat their turns."""
    pieces = _special(tokenizer).split(text)
    return tuple(token for piece in pieces if piece for token in _piece(piece, tokenizer))


@lru_cache(maxsize=2**14)
def _piece(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Where a text may be cut without changing its tokens: at special tokens, if the tokenizer never looks across."""
    tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    if not tokens:
        return re.compile(r"(?!)")
    cuts = re.compile("(" + "|".join(map(re.escape, tokens)) + ")")
    probe = "".join(f"user one{token}\n two{token}three {token}" for token in tokens)
    apart = [_piece(piece, tokenizer) for piece in cuts.split(probe) if piece]
    return cuts if sum(apart, ()) == _piece(probe, tokenizer) else re.compile(r"(?!)")


def _begin(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The begin-of-text token, where the tokenizer puts one before plain text."""
    begin = tokenizer.bos_token_id
    return (begin,) if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else ()
