"""Text to tokens: a template turns an example into prompt and response tokens, and records where the response starts.

1. The texts of the prompt and of the response (with an end mark) are tokenised separately and concatenated. So the
   boundary is exact, no token spans it, and training prompts have the same tokens as generation prompts.
2. The response is kept whole up to ``max_tokens - 1`` tokens, then cut at the end. The prompt gets the remaining
   tokens: the oldest turns are removed first, up to a user turn (a system turn stays), then tokens from the left.
3. The response ends with the chat template's end-of-turn mark, or with the end-of-text token where there is no mark.

Templates: "chat" is the model's chat template; "alpaca" is the paper's; a ``.jinja`` file is a chat template, any other
file is a text with {instruction}, {input} (optional) and {response}. Cost of ``encode``: O(max_tokens log turns).
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
    """One tokenised example: a prompt of at least one token, then a response of at least one."""

    ids: tuple[int, ...]
    response_start: int  # ids[response_start:] is the response
    response_cut: bool  # whether max_tokens cut it


class Template(ABC):
    """Turns an example into tokens; a subclass gives the texts of the prompt and of the response."""

    @abstractmethod
    def prompt_text(self, example: Example, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of the prompt.

        Args:
            example: of which this is the prompt.
            turns: the turns of the prompt that are kept.
            tokenizer: the model's.
        """

    @abstractmethod
    def response_text(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of the response, with an end mark.

        Args:
            example: of which this is the response.
            tokenizer: the model's.
        """

    def includes_bos(self) -> bool:
        """Whether the prompt's text contains the begin-of-text token where the model needs one."""
        return False

    def encode(self, example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
        """Tokenise prompt and response.

        Args:
            example: to tokenise.
            tokenizer: the model's.
            max_tokens: of prompt and response together, at least 2.
        """
        response = _ids(self.response_text(example, tokenizer), tokenizer)
        kept = response[: max_tokens - 1]
        prompt = self.prompt(example, tokenizer, max_tokens - len(kept))
        return Tokens(prompt + kept, len(prompt), len(kept) < len(response))

    def prompt(self, example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[int, ...]:
        """The tokens of the prompt, from which a response is generated.

        Args:
            example: of which this is the prompt; its response is not read.
            tokenizer: the model's.
            max_tokens: of the prompt.
        """
        contexts = _contexts(example.turns[:-1])

        @cache
        def ids(kept: int) -> tuple[int, ...]:
            return _ids(self.prompt_text(example, contexts[kept - 1], tokenizer), tokenizer)

        bos = () if self.includes_bos() else _bos(tokenizer)
        room = max_tokens - len(bos)
        # exponential search from the newest turn, then bisection: no text much longer than the room is tokenised
        reach = 1
        while reach < len(contexts) and len(ids(reach)) <= room:
            reach *= 2
        counts = range(1, min(reach, len(contexts)) + 1)
        kept = max(bisect_right(counts, room, key=lambda count: len(ids(count))), 1)
        whole = ids(kept)
        return (bos + whole[max(len(whole) - room, 0) :])[-max_tokens:]


NO_CHAT_TEMPLATE = 'this model has no chat template: set template = "alpaca" or give a template file'


@dataclass(frozen=True)
class Chat(Template):
    """A chat template."""

    jinja: str | None = None  # None: the tokenizer's chat template

    def includes_bos(self) -> bool:
        return True

    def prompt_text(self, example: Example, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
        return self._render(turns, tokenizer, generate=True)

    def response_text(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
        newest = _contexts(example.turns[:-1])[0]
        prompt = self._render(newest, tokenizer, generate=True)
        whole = self._render([*newest, example.turns[-1]], tokenizer, generate=False)
        # some templates open a thinking block in the prompt that a finished turn does not contain: then use the text
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
    """Plain text around the instruction, the input and the response."""

    before: str  # the response, with {instruction} and {input}
    after: str = ""  # the response
    without_input: str | None = None  # instead of ``before`` for examples without input

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
    """The possible prompts, shortest first: each has the system turn, if any, and starts at a user turn.

    Many chat templates refuse a conversation that starts with the assistant, so an opening message of the assistant
    is left out, unless there is no user turn.
    """
    system = [turn for turn in turns[:1] if turn.role == "system"]
    dialogue = turns[len(system) :]
    starts = [index for index, turn in enumerate(dialogue) if turn.role == "user"] or [0]
    return [[*system, *dialogue[start:]] for start in reversed(starts)]


def _transcript(turns: Sequence[Turn]) -> str:
    """The content of a single turn; several turns as a transcript with roles."""
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)


def _fill(text: str, fields: Mapping[str, str]) -> str:
    # one pass, so that a placeholder in a field's text is not replaced
    return re.sub(r"\{(instruction|input)\}", lambda match: fields[match[1]], text)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a text. Pieces between special tokens are cached: conversations repeat their turns."""
    pieces = _special(tokenizer).split(text)
    return tuple(token for piece in pieces if piece for token in _piece(piece, tokenizer))


@lru_cache(maxsize=2**14)
def _piece(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern for the places where a cut keeps the tokens: special tokens, if the tokenizer never looks across."""
    tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    if not tokens:
        return re.compile(r"(?!)")
    cuts = re.compile("(" + "|".join(map(re.escape, tokens)) + ")")
    probe = "".join(f"user one{token}\n two{token}three {token}" for token in tokens)
    pieces = [_piece(piece, tokenizer) for piece in cuts.split(probe) if piece]
    return cuts if sum(pieces, ()) == _piece(probe, tokenizer) else re.compile(r"(?!)")


def _bos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The begin-of-text token, where the tokenizer puts one before plain text."""
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else ()
