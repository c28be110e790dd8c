"""What a chat template takes, found out by rendering turns and looking for their words in the text.

``fitted`` asks once per model; ``check`` renders every order of roles that the data have, so a template that fails
does so before work, and says what it changes and what ``max_tokens`` cuts off.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import dropwhile, pairwise
from typing import TYPE_CHECKING, Literal

from fedferret.core.errors import UserError
from fedferret.core.text import plain_line
from fedferret.data.chat_template import Chat, Habits, TemplateFailure
from fedferret.data.encoding import Template, Tokens
from fedferret.data.examples import Example, FederatedData, Turn, TurnExtra
from fedferret.data.stored import Order, outlines_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ASSISTANT = Turn("system", "zqsystem"), Turn("user", "zquser"), Turn("assistant", "zqassistant")
_LATER = (Turn("user", "zqlater"), Turn("assistant", "zqanswer"))
_MANY = tuple(Turn(role, f"zq{role}{number}zq") for number in range(12) for role in ("user", "assistant"))
_ANY = "zq'one' \"two\"\n\n  <three> & Four\té " + "zqword " * 2_000 + "zqend"  # a content of any characters and length
_CALL = {"id": "zqcall001", "type": "function", "function": {"name": "zqname", "arguments": {"zqargument": "zqvalue"}}}
_CALLING = Turn("assistant", "", TurnExtra(tool_calls=(_CALL,)))
_RESULT = Turn("tool", "zqresult", TurnExtra(name="zqname", tool_call_id="zqcall001"))
_PARAMETERS = {"type": "object", "properties": {"zqargument": {"type": "string", "description": "zqwords"}}}
_TOOL = {"type": "function", "function": {"name": "zqname", "description": "zqtool", "parameters": _PARAMETERS}}
_ADDRESS = re.compile(r"<[^\n]{1,80} at 0x[0-9a-fA-F]+>")
_ORDERS = 64  # of roles that are rendered before work
_SAMPLE = 400  # examples that are tokenised before work


def fitted(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template with what it takes found out; a text template as it is.

    Args:
        template: of a recipe.
        tokenizer: the model's.

    Raises:
        UserError: a chat template that fails on a question and its answer, writes none of their words, draws at random,
            or writes a date that no setting gives.
    """
    return _fitted(template, tokenizer, str(tokenizer.chat_template)) if isinstance(template, Chat) else template


@lru_cache(maxsize=8)  # check, training and answers ask for the same one
def _fitted(template: Chat, tokenizer: PreTrainedTokenizerBase, own: str) -> Chat:
    """As ``fitted``; ``own`` is the tokenizer's chat template, which may be replaced."""
    plain = replace(template, habits=Habits())
    chat = next(
        (each for each in (plain, _with(plain, parts=True)) if _shows(each, tokenizer, _USER, _ASSISTANT)), None
    )
    if chat is not None and (written := _ADDRESS.search(chat.render([_USER, _ASSISTANT], tokenizer, generate=True))):
        raise UserError(
            f"the chat template writes {plain_line(written[0], 80)}, an object and not its content: its address "
            f"differs from run to run; mend it, for instance with | list"
        )
    if chat is None:
        plain.render([_USER, _ASSISTANT], tokenizer, generate=False)  # raises where it fails
        raise UserError('the chat template does not write what turns say: mend it, or set template = "alpaca"')
    if not _shows(chat, tokenizer, _SYSTEM, _USER, _ASSISTANT):
        chat = _with(chat, system="nowhere")
    elif not _shows(chat, tokenizer, _USER, _ASSISTANT, _SYSTEM, *_LATER):
        chat = _with(chat, system="first")
    twice = (Turn("user", "zqfirst"), _USER, _ASSISTANT), (_USER, Turn("assistant", "zqfirst"), _ASSISTANT, *_LATER)
    if not all(_shows(chat, tokenizer, *turns) for turns in twice):
        chat = _with(chat, alternates=True)
    if not _shows(chat, tokenizer, *_MANY):
        chat = _with(chat, earlier=False)
    if not _shows(chat, tokenizer, Turn("user", _ANY), _ASSISTANT):
        chat = _with(chat, verbatim=False)
        if repr(_ANY) in _written(chat, tokenizer, Turn("user", _ANY), _ASSISTANT):
            raise UserError(
                "the chat template writes messages in Python's spelling: let it write message['content'], or set "
                'template = "alpaca"'
            )
    tools = _shows(chat, tokenizer, _USER, _ASSISTANT, words=("zqname", "zqtool"), tools=True)
    return _with(chat, tools=tools, calls=_calls(chat, tokenizer))


def check(
    template: Template, tokenizer: PreTrainedTokenizerBase, data: FederatedData, max_tokens: int
) -> tuple[str, ...]:
    """Refuse examples that the template cannot take, before work.

    Args:
        template: as ``fitted`` gives it.
        tokenizer: the model's.
        data: of the run; of a site, the site's own.
        max_tokens: of prompt and response together.

    Returns:
        Lines for the user: what the template changes, and what ``max_tokens`` cuts off.

    Raises:
        UserError: tools, or an order of roles, that the template does not take.
    """
    parts = (*data.clients.values(), *data.held_out.values(), *data.kept.values())
    total = sum(map(len, parts))
    if not total:
        return ()
    step, before = -(-total // _SAMPLE), 0
    orders: dict[Order, Example] = {}
    counts: Counter[Order] = Counter()
    chosen: list[Example] = []
    offering = 0
    for part in parts:  # no row of many is read, but those that are encoded
        if part and part[0].image is not None:
            return ()
        number = 0
        for outline in outlines_of(part):
            for order in outline.orders():
                if order not in counts and len(orders) < _ORDERS:
                    orders[order] = part[number]
                counts[order] += 1
                number += 1
            offering += len(outline.lengths) * outline.tools
        chosen += [part[number] for number in range(-before % step, len(part), step)]
        before += len(part)
    _check_tools(template, offering, sum(count for order, count in counts.items() if _calls_tools(order)))
    for example in orders.values():
        template.encode(example, tokenizer, max_tokens)
    notes = _changes(template, orders.values()) if isinstance(template, Chat) else []
    if opening := sum(count for order, count in counts.items() if _opens_otherwise(order)):
        notes.append(
            f"{opening:,} of {total:,} examples open with a message that is not the user's: prompts begin with the "
            f"user's first, because chat templates want that"
        )
    asked = next((example for example in orders.values() if len(example.turns) > 1), None)
    if asked is not None and template.response_text(asked, tokenizer).strip() == asked.response.strip():
        notes.append(
            "responses have no end mark, because neither the template nor the tokenizer has one: answers go on until "
            "evaluation.max_new_tokens"
        )
    sample = [template.encode(example, tokenizer, max_tokens) for example in chosen]
    return (*notes, *_cuts(sample, total, max_tokens))


def has_prompts(examples: Iterable[Example]) -> bool:
    """Whether an example has a prompt, so that a template is needed: texts alone have none."""
    return any(len(example.turns) > 1 for example in examples)


def _with(chat: Chat, **habits: object) -> Chat:
    return replace(chat, habits=replace(chat.habits, **habits))  # type: ignore[arg-type]  # fields by name


def _shows(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, *turns: Turn, words: Sequence[str] = (), tools: bool = False
) -> bool:
    """Whether the template writes all content of the turns, and the words."""
    text = _written(chat, tokenizer, *turns, tools=tools)
    return all(word in text for word in (*(turn.content for turn in turns), *words))


def _written(chat: Chat, tokenizer: PreTrainedTokenizerBase, *turns: Turn, tools: bool = False) -> str:
    """What the template writes of the turns; "" where it refuses them."""
    try:
        return chat.render(turns, tokenizer, generate=False, tools=(_TOOL,) if tools else ())
    except TemplateFailure:
        return ""


def _calls(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Literal["objects", "texts", "none"]:
    kinds: tuple[Literal["objects", "texts"], ...] = ("objects", "texts")
    for calls in kinds:
        turns = (_USER, _CALLING, _RESULT, _ASSISTANT)
        if _shows(_with(chat, calls=calls), tokenizer, *turns, words=("zqname", "zqargument", "zqvalue")):
            return calls
    return "none"


def _calls_tools(order: Order) -> bool:
    return any(called or role == "tool" for role, called in order)


def _opens_otherwise(order: Order) -> bool:
    """Whether a prompt leaves out what comes before the user's first turn."""
    roles = list(dropwhile(lambda role: role == "system", (role for role, _ in order[:-1])))
    return "user" in roles and roles[0] != "user"


def _check_tools(template: Template, offering: int, calling: int) -> None:
    """Refuse so many examples that offer tools and that call them, where the template does not write that."""
    habits = template.habits if isinstance(template, Chat) else Habits(tools=False, calls="none")
    offering = 0 if habits.tools else offering
    calling = calling if habits.calls == "none" else 0
    if offering or calling:
        what = "the tools that are offered" if offering else "calls of tools and their results"
        raise UserError(
            f"text.template: this template does not write {what}, which {max(offering, calling):,} examples have: "
            f"give a .jinja file that does, or leave such rows out"
        )


def _changes(chat: Chat, examples: Iterable[Example]) -> list[str]:
    """Lines on what the template makes of the data's orders of roles."""
    examples = list(examples)
    notes = []
    if not chat.habits.verbatim:
        notes.append("the chat template changes what turns say: quotes, line ends, spaces or the length of long texts")
    moved = 0 if chat.habits.system == "nowhere" else 1
    if chat.habits.system != "anywhere" and any(
        turn.role == "system" for example in examples for turn in example.turns[moved:]
    ):
        notes.append("the chat template takes no such system turn: its text goes before the next turn of the user")
    if not chat.habits.earlier and any(
        "assistant" in (turn.role for turn in example.turns[:-1]) for example in examples
    ):
        notes.append("the chat template leaves out earlier turns of long conversations")
    if chat.habits.alternates and any(
        left.role == right.role != "tool" for example in examples for left, right in pairwise(example.turns[:-1])
    ):
        notes.append("the chat template demands that roles alternate: consecutive turns of one role are merged")
    return notes


def _cuts(sample: Sequence[Tokens], total: int, max_tokens: int) -> list[str]:
    """A line on what ``max_tokens`` cuts off; none where all examples fit."""
    responses = [tokens for tokens in sample if tokens.response_cut]
    prompts = sum(tokens.prompt_cut for tokens in sample)
    said = []
    if responses:
        lost = sum(tokens.response_lost for tokens in responses)
        whole = lost + sum(len(tokens.ids) - tokens.response_start for tokens in responses)
        said.append(f"{len(responses):,} at the end of the response ({lost / whole:.0%} of its tokens are lost)")
    if prompts:
        said.append(f"{prompts:,} at the beginning of the prompt")
    if not said:
        return []
    of = f"all {total:,} examples" if len(sample) == total else f"{len(sample):,} examples looked at, of {total:,}"
    return [f"text.max_tokens={max_tokens} cuts, of {of}, {' and '.join(said)}; text.cut says where"]
