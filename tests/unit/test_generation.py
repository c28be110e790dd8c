"""A model's answers are those of greedy decoding, in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedferret import models
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.examples import Example, Turn
from fedferret.data.templates import template
from fedferret.evaluation.generation import generate, prompt_room, stop_tokens
from fedferret.models import LanguageModel

END = 2  # the tiny tokenizer's <eos>


def varied() -> LanguageModel:
    """The tiny model with weights eight times as large, so that it does not repeat one token for ever."""
    language_model = models.load("tiny")
    with torch.no_grad():
        for parameter in language_model.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return language_model


def prompts(count: int) -> list[list[int]]:
    """Prompts of 5 to 61 tokens, not sorted by length."""
    lengths = [5 + 7 * (5 * number % 9) for number in range(count)]
    drawn = (Key.of(3, number).uniform(length) * 256 for number, length in enumerate(lengths))
    return [[1, *(values.long() + 3).tolist()] for values in drawn]


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> tuple[int, ...]:
    """Greedy decoding in four lines: no batch, no cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return tuple(ids[len(prompt) :])


def test_a_batch_of_prompts_of_many_lengths_gives_the_answers_one_by_one() -> None:
    model, asked = varied().model, prompts(7)
    expected = [greedy(model, prompt, 12) for prompt in asked]
    assert len(set(expected)) > 5
    for batch_size in (1, 4):
        assert generate(model, asked, {END}, 12, batch_size) == expected


def test_a_learned_prompt_comes_before_each_prompt() -> None:
    """In a batch, where peft's generate puts padding between the learned vectors and the prompt."""
    from fedferret.models.adapters import LearnedPrompt

    plain, asked = varied().model, prompts(5)
    without = generate(plain, asked, {END}, 12)
    model: Any = LearnedPrompt(tokens=5).attach(plain, Key.of(1))
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.mul_(8)
    expected = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        new = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=END
        )[0, len(prompt) :].tolist()
        expected.append(tuple(new[: new.index(END)] if END in new else new))
    assert generate(model, asked, {END}, 12, batch_size=4) == expected != without


def test_a_checkpoints_generation_config_has_no_effect_and_is_not_changed() -> None:
    model: Any = varied().model
    asked, before = prompts(4), torch.get_rng_state()
    expected = generate(model, asked, {END}, 12)
    config = model.generation_config
    config.do_sample, config.temperature, config.repetition_penalty, config.num_beams = True, 3.0, 5.0, 3
    config.suppress_tokens, config.forced_eos_token_id = [token for token in expected[0]], END
    config.min_new_tokens, config.no_repeat_ngram_size = 12, 1
    unchanged = config.to_dict()
    assert generate(model, asked, {END}, 12) == expected
    assert model.generation_config is config and config.to_dict() == unchanged
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_ends_before_the_first_stop_token() -> None:
    model, asked = varied().model, prompts(6)
    whole = generate(model, asked, (), 12)
    assert all(len(answer) == 12 for answer in whole)
    stops = {whole[0][4], whole[1][0]}
    for cut, answer in zip(generate(model, asked, stops, 12), whole, strict=True):
        place = min((answer.index(stop) for stop in stops if stop in answer), default=12)
        assert cut == answer[:place]


def test_progress_is_called_once_per_batch() -> None:
    calls: list[None] = []
    generate(varied().model, prompts(7), {END}, 2, batch_size=3, on_progress=lambda: calls.append(None))
    assert len(calls) == 3


def test_answers_stop_at_the_end_tokens_of_training_and_of_the_checkpoint() -> None:
    language_model: Any = varied()
    model, tokenizer = language_model.model, language_model.tokenizer
    example = Example((Turn("user", "Why?"), Turn("assistant", "So.")))
    assert stop_tokens(model, template("chat"), tokenizer, example, 64) == {END}
    model.generation_config.eos_token_id = [END, 77]
    assert stop_tokens(model, template("chat"), tokenizer, example, 64) == {END, 77}
    # a template that ends its turns with a token other than the end token
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<pad>")
    assert stop_tokens(model, template("chat"), tokenizer, example, 64) == {0, END, 77}
    # a response that was cut has no end token
    assert stop_tokens(model, template("chat"), tokenizer, example, 3) == {END, 77}


def test_prompts_leave_positions_for_the_answer() -> None:
    model = varied().model  # it has 2,048 positions
    assert prompt_room(model, 256, 128) == 256
    assert prompt_room(model, 2048, 128) == 1920
    with pytest.raises(UserError, match=r"max_new_tokens=2048: must be less than the model's 2048 positions"):
        prompt_room(model, 256, 2048)


@pytest.mark.slow
def test_a_real_models_answers_do_not_depend_on_the_batch() -> None:
    language_model: Any = models.load("packaged:smollm2")
    tokenizer, chat = language_model.tokenizer, template("chat")
    questions = ("Hi", "What is the capital of France?", "Name three colours and say why you like each of them. " * 4)
    examples = [Example((Turn("user", question), Turn("assistant", "Yes."))) for question in questions]
    asked = [chat.prompt(example, tokenizer, 256) for example in examples]
    stops = stop_tokens(language_model.model, chat, tokenizer, examples[0], 256)
    together = generate(language_model.model, asked, stops, 24)
    assert together == [generate(language_model.model, [prompt], stops, 24)[0] for prompt in asked]
    assert "Paris" in tokenizer.decode(together[1])
