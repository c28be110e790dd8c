"""Laws of templates: an exact boundary, whole responses, oldest turns removed first, the same prompt for generation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.batches import TokenisedData
from fedferret.data.encoded import EncodedData
from fedferret.data.examples import Example, FederatedData, Turn, instruction_example
from fedferret.data.templates import template
from fedferret.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def _dialogue(*contents: str, first: str = "user", system: str | None = None) -> Example:
    roles = itertools.cycle(["user", "assistant"] if first == "user" else ["assistant", "user"])
    turns = [Turn(role, content) for role, content in zip(roles, contents, strict=False)]
    return Example((*([Turn("system", system)] if system else []), *turns))


def _split(example, name, max_tokens=10_000):
    tokens = template(name).encode(example, TOKENIZER, max_tokens)
    return TOKENIZER.decode(tokens.ids[: tokens.response_start]), TOKENIZER.decode(tokens.ids[tokens.response_start :])


def test_chat_is_the_models_chat_template():
    prompt, response = _split(_dialogue("Hi", "Hello", "Why?", "So."), "chat")
    assert prompt == "<bos>user\nHi<eos>\n<bos>assistant\nHello<eos>\n<bos>user\nWhy?<eos>\n<bos>assistant\n"
    assert response == "So.<eos>"


def test_alpaca_is_the_papers_template():
    head = "Below is an instruction that describes a task"
    tail = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"
    assert _split(_dialogue("Add.", "4"), "alpaca") == (f"{head}{tail}Add.\n\n### Response:", "4<eos>")
    both = Example((Turn("user", "Add.\n\n2, 2"), Turn("assistant", "4")), {"instruction": "Add.", "input": "2, 2"})
    paired = (
        f"{head}, paired with an input that provides further context{tail}Add.\n\n### Input:\n2, 2\n\n### Response:"
    )
    assert _split(both, "alpaca") == (paired, "4<eos>")


def test_alpaca_writes_conversations_as_transcripts():
    prompt, response = _split(_dialogue("Hi", "Hello", "Why?", "So."), "alpaca")
    assert "### Instruction:\nUser: Hi\nAssistant: Hello\nUser: Why?\n\n### Response:" in prompt
    assert response == "So.<eos>"


def test_a_text_file_is_a_template(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("Q: {instruction} {input}\nA: {response} END\n")
    assert _split(_dialogue("What is {input}?", "It"), str(path)) == ("Q: What is {input}? \nA: ", "It END<eos>")


def test_a_text_file_without_a_place_for_the_input_has_it_after_the_instruction(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("\ufeffQ: {instruction}\nA: {response}", encoding="utf-8")
    example = instruction_example("Add.", "1 and 2", "3", {})
    assert _split(example, str(path)) == ("Q: Add.\n\n1 and 2\nA: ", "3<eos>")


def test_a_jinja_file_is_a_chat_template(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    # the template has no end mark, so the end-of-text token ends the response
    assert _split(_dialogue("Why?", "So."), str(path)) == ("[user] Why?\n[assistant] ", "So.<eos>")


def test_a_prompt_that_opens_a_thinking_block_keeps_the_response(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    assert _split(_dialogue("Why?", "So."), str(path)) == ("<user>Why?<assistant><think>", "So.<eos>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "{instruction}", "has no {response}"),
        ("a.txt", "{response} {instruction}", "has no {instruction}"),
        ("a.txt", "{instruction} {Input} {response}", "has {Input}: write"),
        ("a.txt", "{instruction} {response} {response}", "has {response} after {response}"),
        ("a.jinja", "{{ prompt }}", 'does not use "messages"'),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_faulty_file_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        template(str(tmp_path / name))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match='give "chat", "alpaca" or the path'):
        template("alpacca")


def test_an_error_on_a_model_without_a_chat_template_suggests_alpaca():
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match='template = "alpaca"'):
        template("chat").encode(_dialogue("Why?", "So."), bare, 100)


def test_an_error_in_a_chat_template_is_one_line(tmp_path):
    path = tmp_path / "strict.jinja"
    path.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}")
    with pytest.raises(UserError, match="refuses turns system, user: no system turns"):
        template(str(path)).encode(_dialogue("Why?", "So.", system="Be kind."), TOKENIZER, 100)


# Text that holds special tokens, line ends and placeholders too.
texts = st.lists(
    st.sampled_from(["a", "é", "\n", " ", "<eos>", "<bos>", "{input}", "Hello"]), min_size=1, max_size=8
).map(lambda parts: "x" + "".join(parts) + "y")
dialogues = st.builds(
    lambda contents, first, system: _dialogue(*contents, first=first, system=system),
    st.lists(texts, min_size=2, max_size=8),
    st.sampled_from(["user", "assistant"]),
    st.none() | texts,
)


@settings(deadline=None, max_examples=50)
@given(dialogues, st.sampled_from(["chat", "alpaca"]), st.sampled_from(["response", "prompt"]), st.integers(2, 300))
def test_the_limit_holds_and_the_end_is_cut_that_the_setting_names(example, name, cut, max_tokens):
    chosen = replace(template(name), cut=cut)
    tokens = chosen.encode(example, TOKENIZER, max_tokens)
    response = TOKENIZER(chosen.response_text(example, TOKENIZER), add_special_tokens=False)["input_ids"]
    whole = len(chosen.prompt(example, TOKENIZER, 10**9))
    share = 1 if cut == "prompt" else max(1, max_tokens // 4)
    assert 1 <= tokens.response_start < len(tokens.ids) <= max_tokens
    # the response is cut at its end, and only where the prompt is down to its share
    kept = len(tokens.ids) - tokens.response_start
    assert list(tokens.ids[tokens.response_start :]) == response[:kept]
    assert tokens.response_lost == len(response) - kept and tokens.response_cut == (kept < len(response))
    assert not tokens.response_cut or (len(tokens.ids) == max_tokens and tokens.response_start <= share)
    assert tokens.prompt_cut == (tokens.response_start < whole)
    assert response[-1] == EOS
    # generation starts from the same prompt as training
    room = max_tokens - kept
    assert chosen.prompt(example, TOKENIZER, room) == tokens.ids[: tokens.response_start]


@settings(deadline=None, max_examples=50)
@given(dialogues, st.sampled_from(["chat", "alpaca"]), st.integers(60, 300))
def test_the_prompt_is_the_longest_that_fits_without_the_oldest_turns(example, name, max_tokens):
    chosen = template(name)
    system = [turn for turn in example.turns[:1] if turn.role == "system"]
    dialogue = example.turns[len(system) : -1]
    starts = [index for index, turn in enumerate(dialogue) if turn.role == "user"] or [0]
    rendered = [chosen.prompt_text(example, [*system, *dialogue[start:]], TOKENIZER) for start in starts]
    whole = [tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in rendered]
    fitting = [ids for ids in whole if len(ids) <= max_tokens]
    expected = fitting[0] if fitting else whole[-1][-max_tokens:]
    assert chosen.prompt(example, TOKENIZER, max_tokens) == expected


def test_the_system_turn_stays_when_old_turns_are_removed():
    example = _dialogue(*"abcdefgh", system="Be kind.")
    whole = template("chat").prompt(example, TOKENIZER, 10_000)
    text = TOKENIZER.decode(template("chat").prompt(example, TOKENIZER, len(whole) - 1))
    assert text.startswith("<bos>system\nBe kind.<eos>\n<bos>user\nc<eos>")


def test_the_begin_token_is_put_before_plain_text_where_the_tokenizer_does_so():
    from tokenizers.processors import TemplateProcessing

    adds_bos = tiny_tokenizer()
    adds_bos.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    for limit in (10_000, 20):
        ids = template("alpaca").encode(_dialogue("Why?", "So."), adds_bos, limit).ids
        assert ids[0] == BOS and ids.count(BOS) == 1 and len(ids) <= limit
    assert template("chat").encode(_dialogue("Why?", "So."), adds_bos, 100).ids.count(BOS) == 2  # one per turn


def test_federated_tokens_are_made_once_and_examples_are_counted_without_them():
    calls = []

    class Counting(type(template("alpaca"))):
        def response_text(self, example, tokenizer):
            calls.append(example)
            return super().response_text(example, tokenizer)

    data = FederatedData(
        clients={"a": (_dialogue("Why?", "So."),) * 3, "b": (_dialogue("Who?", "I, and you and they."),)},
        held_out={"rows": (_dialogue("When?", "Now."),) * 2},
        source="a test",
    )

    def encode(examples: Sequence[Example], for_training: bool) -> TokenisedData:
        return TokenisedData([Counting(before="{instruction}").encode(each, TOKENIZER, 12) for each in examples])

    tokens = EncodedData(data, encode)
    assert list(tokens) == ["a", "b"] and len(tokens) == 2 and tokens.num_examples("a") == 3 and not calls
    assert tokens["a"] is tokens["a"] and len(calls) == 3
    assert (len(tokens["a"]), tokens["a"].num_cut, tokens["b"].num_cut) == (3, 0, 1)
    assert tokens.held_out("rows") is tokens.held_out("rows") and len(tokens.held_out("rows")) == 2
    (batch,) = tokens["a"].batches(4, Key.of(1))
    assert TOKENIZER.decode(batch.labels[0][batch.labels[0] >= 0]) == "So.<eos>"
