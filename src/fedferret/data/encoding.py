"""Text to tokens: a template turns an example into prompt and response tokens, and records where the response starts.

1. The texts of the prompt and of the response (with an end mark) are tokenised separately and concatenated. So the
   boundary is exact, no token spans it, and training prompts have the same tokens as generation prompts.
2. Where both exceed ``max_tokens``, the prompt is cut down to a quarter of it, then the response at its end. With
   ``cut = "prompt"`` the prompt is first cut down to one token. A prompt loses its oldest turns, up to a user turn
   (opening system turns stay), then tokens from the left.
3. The response ends with the chat template's end-of-turn mark, or with the end-of-text token where there is no mark.
4. A text alone has no template: its prompt is one token, begin of text or end of text.
5. Where prompts are trained on too, tokens of turns of weight 0 are named: those between the text of the turns before
   and the text of the turns up to there, where the prompt's text begins with both. Else the span is wider.

Cost of ``encode``: O(max_tokens log turns).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, overload

from fedferret.core.errors import UserError
from fedferret.core.text import plain_line
from fedferret.data.examples import Example, Turn
from fedferret.data.text import Cut, TrainOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = 8  # tokens at most that end a response
PROMPT_SHARE = 4  # a prompt keeps one of so many of the tokens, where the response is cut


@dataclass(frozen=True, slots=True)
class Tokens:
    """One tokenised example: a prompt of at least one token, then a response of at least one."""

    ids: tuple[int, ...]
    response_start: int  # ids[response_start:] is the response
    response_cut: bool  # whether max_tokens cut it
    response_lost: int = 0  # how many tokens of the response max_tokens cut off
    prompt_cut: bool = False  # whether max_tokens cut the prompt
    untrained: tuple[tuple[int, int], ...] = ()  # spans of turns of weight 0, where prompts are trained on too


@dataclass(frozen=True, kw_only=True)
class Template(ABC):
    """Turns an example into tokens; a subclass gives the texts of the prompt and of the response."""

    cut: Cut = "response"
    train_on: TrainOn = "completions"

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

    def beginning(
        self, example: Example, turns: Sequence[Turn], count: int, tokenizer: PreTrainedTokenizerBase
    ) -> str | None:
        """The text of the first turns of a prompt.

        Args:
            example: of which this is the prompt.
            turns: of the prompt.
            count: of turns, from 1.
            tokenizer: the model's.

        Returns:
            Text with which the prompt's text begins, if the template writes one turn after the other; None: not known.
        """
        return None

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
        if len(example.turns) == 1:
            return _whole_text(example.response, tokenizer, max_tokens)
        response = _ids(self.response_text(example, tokenizer), tokenizer)
        if len(response) <= _MARKS and not example.turns[-1].tool_calls:
            _check_tokens(_ids(example.response, tokenizer), example.response)
        share = 1 if self.cut == "prompt" else max(1, max_tokens // PROMPT_SHARE)
        prompt, prompt_cut, turns = self._prompt(example, tokenizer, max(max_tokens - len(response), share))
        kept = response[: max_tokens - len(prompt)]
        lost = len(response) - len(kept)
        untrained: tuple[tuple[int, int], ...] = ()
        if self.train_on == "all" and not all(turn.trained for turn in turns):
            untrained = self._untrained(example, turns, len(prompt), tokenizer)
        return Tokens(prompt + kept, len(prompt), lost > 0, lost, prompt_cut, untrained)

    def prompt(self, example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[int, ...]:
        """The tokens of the prompt, from which a response is generated.

        Args:
            example: of which this is the prompt; its response is not read.
            tokenizer: the model's.
            max_tokens: of the prompt.
        """
        return self._prompt(example, tokenizer, max_tokens)[0]

    def _prompt(
        self, example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> tuple[tuple[int, ...], bool, Sequence[Turn]]:
        """The tokens of the prompt, whether it was cut, and the turns that are left of it."""
        contexts = contexts_of(example.turns[:-1])

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
        left = (bos + whole[max(len(whole) - room, 0) :])[-max_tokens:]
        return left, kept < len(contexts) or len(left) < len(bos) + len(whole), contexts[kept - 1]

    def _untrained(
        self, example: Example, turns: Sequence[Turn], length: int, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[tuple[int, int], ...]:
        """The spans of turns of weight 0 in the prompt's last ``length`` tokens; tokens that two turns share count."""
        text = self.prompt_text(example, turns, tokenizer)
        ids, ends = _ids(text, tokenizer), {0: 0, len(turns): len(text)}
        for count in range(1, len(turns) + 1):
            beginning = self.beginning(example, turns, count, tokenizer)
            if beginning is not None and text.startswith(beginning):
                ends[count] = len(beginning)
        spans = []
        for index, turn in enumerate(turns):
            if turn.trained:
                continue
            start = ends[max(count for count in ends if count <= index)]
            end = ends[min(count for count in ends if count > index)]
            before = _in_common(_ids(text[:start], tokenizer), ids)
            after = _in_common(_ids(text[end:], tokenizer)[::-1], ids[::-1])
            shift = length - len(ids)
            spans.append((max(0, before + shift), max(0, len(ids) - after + shift)))
        return tuple(spans)


def _check_tokens(ids: Sequence[int], text: str) -> None:
    """Refuse a text to train on of which the tokenizer makes nothing. Raises UserError."""
    if not ids:
        raise UserError(
            f"the tokenizer has no token for any character of the response {plain_line(repr(text), 60)}: give another "
            f"model, or leave such rows out"
        )


def _in_common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


class Contexts(Sequence[list[Turn]]):
    """The possible prompts of a conversation, made when they are asked for: all of them grow with its square."""

    def __init__(self, system: Sequence[Turn], dialogue: Sequence[Turn], starts: Sequence[int]) -> None:
        """Make none yet.

        Args:
            system: turns that each has first.
            dialogue: the turns after these.
            starts: where in it each begins, shortest first.
        """
        self._system, self._dialogue, self._starts = system, dialogue, starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> list[Turn]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Turn]]: ...

    def __getitem__(self, index: int | slice) -> list[Turn] | list[list[Turn]]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return [*self._system, *self._dialogue[self._starts[index] :]]


def contexts_of(turns: Sequence[Turn]) -> Contexts:
    """The possible prompts, shortest first: each has the system turns before all others, and starts at a user turn.

    Many chat templates refuse a conversation that starts with the assistant, so an opening message of the assistant
    is left out, unless there is no user turn. ``template_probes.check`` counts these examples.
    """
    system = list(takewhile(lambda turn: turn.role == "system", turns))
    dialogue = turns[len(system) :]
    starts = [index for index, turn in enumerate(dialogue) if turn.role == "user"] or [0]
    return Contexts(system, dialogue, starts[::-1])


def _whole_text(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Tokens:
    """A text alone: one token as the prompt, so that the text's first token is predicted too."""
    ids = _ids(text, tokenizer)
    _check_tokens(ids, text)
    ids += () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    first = _bos(tokenizer) or tuple(
        token for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) if token is not None
    )
    if not first:
        raise UserError("the tokenizer has no begin, end or padding token to put before a text alone: use prompts")
    kept = ids[: max_tokens - 1]
    lost = len(ids) - len(kept)
    return Tokens((int(first[0]), *kept), 1, lost > 0, lost)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of a text. Pieces between special tokens are cached: conversations repeat their turns."""
    pieces = _special(tokenizer).split(text)
    return tuple(token for piece in pieces if piece for token in _piece(piece, tokenizer))


@lru_cache(maxsize=2**14)
def _piece(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    try:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # a tokenizer can fail as its author likes
        reason = plain_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(
            f"the tokenizer fails on {plain_line(repr(text), 60)} ({reason}): mend it, or give another"
        ) from error


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
