"""What a chat template takes is found out before work: turns are put so, or one line refuses the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedferret import models
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.batches import IGNORED, TokenisedData
from fedferret.data.chat_template import Chat
from fedferret.data.encoding import Template
from fedferret.data.examples import Example, FederatedData, Turn, TurnExtra
from fedferret.data.template_probes import check, fitted
from fedferret.data.templates import template_of
from fedferret.data.text import TextSettings
from fedferret.evaluation.scorers import check_metrics
from fedferret.models.tiny import tiny_tokenizer
from fedferret.objectives.next_token import NextToken

TOKENIZER = tiny_tokenizer()
EACH = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + EACH
DROPS_SYSTEM = EACH.replace("%}<", "%}{% if m['role'] != 'system' %}<").replace("</s>", "</s>{% endif %}")
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
)
PARTS_ONLY = (
    "{% for m in messages %}<{{ m['role'] }}>{% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endfor %}"
)
ASK, SYSTEM, REPLY = Turn("user", "why?"), Turn("system", "be kind"), Turn("assistant", "so.")
CALL = {"type": "function", "function": {"name": "w", "arguments": {"place": "Ulm"}}}
CALLING = Turn("assistant", "", TurnExtra(tool_calls=(CALL,)))
TOOLS = {"tools": ({"type": "function", "function": {"name": "w", "description": "weather"}},)}


def made(folder: Path, source: str, **settings: Any) -> Template:
    """The fitted template of a file."""
    path = folder / "template.jinja"
    path.write_text(source)
    return fitted(template_of(TextSettings(template=str(path), **settings)), TOKENIZER)


def text(template: Template, *turns: Turn, **metadata: Any) -> str:
    """Prompt and response as text, after the check that a run makes."""
    example = Example(turns, metadata)
    check(template, TOKENIZER, data(example), 1000)
    return str(TOKENIZER.decode(template.encode(example, TOKENIZER, 1000).ids))


def data(*examples: Example) -> FederatedData:
    """One client's data."""
    return FederatedData({"a": examples}, {}, source="a test")


@pytest.mark.parametrize("source", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_system_turn_that_is_not_taken_goes_before_the_users_text_and_is_said_once(
    tmp_path: Path, source: str
) -> None:
    template = made(tmp_path, source)
    assert text(template, SYSTEM, ASK, REPLY).startswith("<user>be kind\n\nwhy?</s><assistant>so.</s>")
    (note,) = check(template, TOKENIZER, data(*[Example((SYSTEM, ASK, REPLY))] * 3), 1000)
    assert "takes no such system turn" in note
    assert check(template, TOKENIZER, data(Example((ASK, REPLY))), 1000) == ()


def test_turns_of_one_role_are_merged_where_roles_must_alternate(tmp_path: Path) -> None:
    template = made(tmp_path, ALTERNATES)
    twice = (SYSTEM, ASK, Turn("user", "well?"), Turn("assistant", "hm."), REPLY)
    assert text(template, *twice) == "<user>be kind\n\nwhy?\n\nwell?</s><assistant>hm.\n\nso.</s>"
    tokens = template.encode(Example(twice), TOKENIZER, 1000)
    assert TOKENIZER.decode(tokens.ids[tokens.response_start :]) == "so.</s>"  # the turn before is no target
    notes = check(template, TOKENIZER, data(Example(twice)), 1000)
    assert any("consecutive turns of one role are merged" in note for note in notes)
    assert "</s><user>well?" in text(made(tmp_path, EACH), *twice)  # another template gets them as they are


def test_content_is_given_as_parts_where_the_template_reads_nothing_else(tmp_path: Path) -> None:
    assert text(made(tmp_path, PARTS_ONLY), SYSTEM, ASK, REPLY) == "<system>be kind</s><user>why?</s><assistant>so.</s>"


def test_a_response_is_trained_on_whole_where_the_template_takes_a_part_out(tmp_path: Path) -> None:
    template = made(tmp_path, EACH.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}"))
    tokens = template.encode(Example((ASK, Turn("assistant", "<think>hm</think>so."))), TOKENIZER, 1000)
    assert str(TOKENIZER.decode(tokens.ids)).endswith("<think>hm</think>so.<eos>")


def test_the_date_is_the_recipes_whatever_the_day(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %B %Y %H:%M') }} " + EACH
    given = text(made(tmp_path, dated, date="2026-02-03"), ASK, REPLY)
    assert given.startswith("03 February 2026 00:00 <user>why?</s>")
    with pytest.raises(UserError, match=r'writes the date, .* set text.date, such as "2026-11-28"'):
        made(tmp_path, dated)
    for wrong in ("today", "2026-13-01", "2026-1-1"):
        with pytest.raises(UserError, match="give a day"):
            TextSettings(date=wrong)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}<{{ m['role'] }}></s>{% endfor %}", "does not write what turns say"),
        ("{{ messages + 1 }}", "fails on turns user, assistant: TypeError"),
        ("{{ messages[0].absent.field }}", "fails on turns user, assistant: UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}{{ messages }}", "user, assistant: RecursionError"),
        ("{% for m in messages %}", "fails on turns user, assistant: TemplateSyntaxError"),
        ("{{ ['a', 'b'] | random }}" + EACH, "draws at random"),
        ("{{ range(10 ** 9) | list }}{{ messages }}", "fails on turns user, assistant: OverflowError"),
        ("{{ messages | map(attribute='role') }}" + EACH, "an object and not its content"),
        ("{{ strftime_now }}" + EACH, "an object and not its content"),
        ("{{ messages }}", "writes messages in Python's spelling"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_one_line_before_work(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        made(tmp_path, source)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kept", ["| e", "| tojson", "[:500]", ".split() | join(' ')"])
def test_a_template_that_changes_what_turns_say_is_said(tmp_path: Path, kept: str) -> None:
    changes = made(tmp_path, EACH.replace("m['content'] }}", f"m['content']{kept} }}}}"))
    (note,) = check(changes, TOKENIZER, data(Example((ASK, REPLY))), 1000)
    assert note.startswith("the chat template changes what turns say: quotes, line ends")
    trims = made(tmp_path, EACH.replace("m['content'] }}", "m['content'] | trim }}"))
    assert check(trims, TOKENIZER, data(Example((ASK, REPLY))), 1000) == ()


def test_responses_without_an_end_mark_are_said() -> None:
    endless = tiny_tokenizer()
    endless.eos_token = None
    alpaca = template_of(TextSettings(template="alpaca"))
    (note,) = check(alpaca, endless, data(Example((ASK, REPLY))), 1000)
    assert note.startswith("responses have no end mark")
    assert check(alpaca, TOKENIZER, data(Example((ASK, REPLY))), 1000) == ()


def test_tools_are_written_or_the_template_is_refused(tmp_path: Path) -> None:
    turns = (ASK, CALLING, Turn("tool", "rain"), REPLY)
    own = fitted(template_of(TextSettings()), TOKENIZER)
    for words in ('"place": "Ulm"', "weather", "tool\nrain"):
        assert words in text(own, *turns, **TOOLS)
    assert '{"name": "w"' in text(own, ASK, CALLING)  # a call is a response to train on
    as_texts = EACH.replace("{{ m['content'] }}", "{{ m['content'] }}{% for c in m['tool_calls'] %}"
                            "{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}")  # fmt: skip
    assert 'w{"place": "Ulm"}' in text(made(tmp_path, as_texts), *turns)
    for template in (made(tmp_path, EACH), fitted(template_of(TextSettings(template="alpaca")), TOKENIZER)):
        with pytest.raises(UserError, match="does not write calls of tools and their results"):
            text(template, *turns)
        with pytest.raises(UserError, match="does not write the tools that are offered"):
            text(template, ASK, REPLY, **TOOLS)


def test_what_stands_before_the_users_first_message_is_kept_or_counted(tmp_path: Path) -> None:
    template = made(tmp_path, EACH)
    assert "<system>be kind</s><system>be brief</s><user>why?" in text(
        template, SYSTEM, Turn("system", "be brief"), ASK, REPLY
    )
    greeted = Example((SYSTEM, REPLY, ASK, REPLY), {})
    (note,) = check(template, TOKENIZER, data(greeted, Example((ASK, REPLY), {}), Example((REPLY, REPLY), {})), 1000)
    assert note.startswith("1 of 3 examples open with a message that is not the user's")


def test_a_template_without_memory_is_said(tmp_path: Path) -> None:
    template = made(tmp_path, EACH.replace("in messages", "in messages[-2:]"))
    assert check(template, TOKENIZER, data(Example((ASK, REPLY), {})), 1000) == ()
    (note,) = check(template, TOKENIZER, data(Example((ASK, REPLY, ASK, REPLY), {})), 1000)
    assert note == "the chat template leaves out earlier turns of long conversations"


def test_an_order_of_roles_that_fails_is_refused_before_work(tmp_path: Path) -> None:
    picky = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + EACH
    with pytest.raises(UserError, match="too long"):
        text(made(tmp_path, picky), ASK, REPLY, ASK, REPLY)


def test_what_is_cut_is_said_with_how_much(tmp_path: Path) -> None:
    template = made(tmp_path, EACH)
    long, short = Turn("assistant", "x" * 90), Turn("user", "y" * 50)
    (note,) = check(template, TOKENIZER, data(Example((short, long)), *[Example((ASK, REPLY))] * 3), 64)
    assert note.startswith("text.max_tokens=64 cuts, of all 4 examples, 1 at the end of the response (")
    assert note.endswith(" and 1 at the beginning of the prompt; text.cut says where")
    tokens = template.encode(Example((short, long)), TOKENIZER, 64)
    assert tokens.response_start == 16 and len(tokens.ids) == 64
    assert f"{tokens.response_lost / (tokens.response_lost + 48):.0%} of its tokens are lost" in note


def test_a_text_alone_is_trained_on_whole_after_one_token() -> None:
    tokens = fitted(template_of(TextSettings()), TOKENIZER).encode(Example((Turn("assistant", "abc"),)), TOKENIZER, 64)
    assert TOKENIZER.decode(tokens.ids) == "<eos>abc<eos>" and tokens.response_start == 1


@pytest.fixture(scope="module")
def language_model() -> models.LanguageModel:
    """The tiny model."""
    return models.load("tiny")


def labelled(language_model: models.LanguageModel, example: Example, **settings: Any) -> str:
    """The text that a training batch has labels on."""
    encode = NextToken().encoder(language_model, TextSettings(**settings))
    (batch,) = encode([example], True).batches(1, Key.of(1))
    return str(TOKENIZER.decode(batch.labels[batch.labels >= 0]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_all_of_a_text_alone_has_labels(language_model: models.LanguageModel, packed: bool, train_on: str) -> None:
    alone = Example((Turn("assistant", "abc"),))
    assert labelled(language_model, alone, packed=packed, train_on=train_on) == "abc<eos>"


def test_a_turn_of_weight_0_has_no_labels_whatever_is_trained_on(language_model: models.LanguageModel) -> None:
    unlearned = Turn("assistant", "no", TurnExtra(trained=False))
    for turns, expected in (
        ((ASK, unlearned, ASK, REPLY), "user\nwhy?<eos>\n<bos>user\nwhy?<eos>\n<bos>assistant\nso.<eos>"),
        ((ASK, REPLY), "user\nwhy?<eos>\n<bos>assistant\nso.<eos>"),
    ):
        assert labelled(language_model, Example(turns), train_on="all") == expected


def test_texts_alone_need_no_template_and_have_no_answers_to_score() -> None:
    alone, asked = data(Example((Turn("assistant", "abc"),))), data(Example((ASK, REPLY)))
    NextToken().check_template("packaged:gemma3-270m", TextSettings(), alone)
    with pytest.raises(UserError, match="this model has no chat template"):
        NextToken().check_template("packaged:gemma3-270m", TextSettings(), asked)
    check_metrics(("loss",), alone.clients)
    with pytest.raises(UserError, match='metric "exact-match" needs examples with a prompt and a text to write'):
        check_metrics(("exact-match",), alone.clients)


UNLEARNED = Turn("assistant", "no no", TurnExtra(trained=False))


@pytest.mark.parametrize(
    ("source", "unlabelled"),
    [
        (EACH, "<assistant>no no</s>"),
        (ALTERNATES, "<assistant>no no</s>"),
        ("<s>" + EACH + "{{ messages | length }}", None),  # no turn ends where the text of the first turns does
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_tokens_of_weight_0_are_no_targets_and_those_around_them_are(
    tmp_path: Path, source: str, unlabelled: str | None, packed: bool
) -> None:
    """A turn ends where the prompt's text begins with the text of the turns up to it; else no turn is a target."""
    template, others = made(tmp_path, source, train_on="all"), Example((ASK, REPLY))
    example = Example((ASK, UNLEARNED, ASK, REPLY))
    tokens = [template.encode(each, TOKENIZER, 1000) for each in (others, example)]
    data = TokenisedData(tokens, packed, train_on_prompts=True)
    prompt = tokens[1].response_start
    spans = tokens[1].untrained
    lost = [TOKENIZER.decode(tokens[1].ids[start:end]) for start, end in spans]
    assert lost == [TOKENIZER.decode(tokens[1].ids[:prompt]) if unlabelled is None else unlabelled]
    expected = [*tokens[0].ids[1:], *(each for at, each in enumerate(tokens[1].ids) if at and not _within(at, spans))]
    for whole in (data, data.take([1, 0])):
        labels = torch.cat([batch.labels.flatten() for batch in whole.batches(4, Key(1))])
        assert sorted(labels[labels != IGNORED].tolist()) == sorted(expected)
        assert whole.num_response_tokens == len(expected)
    assert template.encode(others, TOKENIZER, 1000).untrained == ()
    assert made(tmp_path, source).encode(example, TOKENIZER, 1000).untrained == ()  # only responses are targets then


@pytest.mark.parametrize("role", ["user", "assistant"])  # the first turns are cut off whole, or token by token
def test_what_is_cut_off_a_prompt_shifts_the_tokens_of_weight_0(tmp_path: Path, role: str) -> None:
    example = Example((ASK, UNLEARNED, Turn(role, "and then what?"), REPLY))
    template = made(tmp_path, EACH, train_on="all", cut="prompt")
    whole = template.encode(example, TOKENIZER, 1000)
    later = [id for at, id in enumerate(whole.ids[: whole.response_start]) if not _within(at, whole.untrained)]
    for lost in range(whole.response_start):
        cut = template.encode(example, TOKENIZER, len(whole.ids) - lost)
        targets = [id for at, id in enumerate(cut.ids[: cut.response_start]) if not _within(at, cut.untrained)]
        assert targets == later[len(later) - len(targets) :]
        assert all(0 <= start <= end <= cut.response_start for start, end in cut.untrained)


def test_a_transcript_in_a_text_template_has_turns_of_weight_0_too() -> None:
    template = template_of(TextSettings(template="alpaca", train_on="all"))
    tokens = template.encode(Example((ASK, UNLEARNED, ASK, REPLY)), TOKENIZER, 1000)
    (span,) = tokens.untrained
    assert TOKENIZER.decode(tokens.ids[slice(*span)]) == "\nAssistant: no no"


def test_a_template_is_fitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[object] = []
    render = Chat.render
    monkeypatch.setattr(Chat, "render", lambda *given, **kinds: rendered.append(given) or render(*given, **kinds))
    first = made(tmp_path, EACH + "{# once #}")
    count = len(rendered)
    assert count > 5 and made(tmp_path, EACH + "{# once #}") == first and len(rendered) == count


def _within(at: int, spans: tuple[tuple[int, int], ...]) -> bool:
    return any(start <= at < end for start, end in spans)
