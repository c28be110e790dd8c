"""The small model: its size, its tokenizer, and that prompts are learnt where a recipe says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedferret import models, recipe
from fedferret.data.batches import IGNORED
from fedferret.data.examples import Example, FederatedData, Turn
from fedferret.experiment import Experiment
from fedferret.models import LanguageModel

CHAT = [
    {"role": "user", "content": "1 and 12?"},
    {"role": "assistant", "content": "Thirteen, déjà vu \N{PARTY POPPER}"},
]


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    return models.load("small")


pytestmark = pytest.mark.slow  # the vocabulary comes from a package of 93 MB


def test_its_weights_are_counted_and_its_shapes_known_without_them(small: LanguageModel) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in small.model.named_parameters()}
    assert sum(weight.numel() for weight in small.model.parameters()) == 3_221_952
    assert models.parameter_shapes("small") == shapes


def test_its_tokenizer_splits_as_its_donor_and_loses_no_text(small: LanguageModel) -> None:
    tokenizer, donor = small.tokenizer, models.load("packaged:smollm2").tokenizer
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < len(tokenizer) == 4096 and tokenizer.decode(ids) == text
    assert (
        text == "<|im_start|>user\n1 and 12?<|im_end|>\n<|im_start|>assistant\n" + CHAT[1]["content"] + "<|im_end|>\n"
    )
    common = "The people of the state said that they had the right to be in the house."
    assert tokenizer(common)["input_ids"] == donor(common)["input_ids"]
    assert len(ids) > len(donor(text)["input_ids"])


@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_what_a_recipe_trains_on_is_what_its_training_labels(small: LanguageModel, train_on: str) -> None:
    settings = recipe(
        rounds=1,
        model={"name": "small"},
        data={"source": "chitchat"},
        text={"train_on": train_on},
        clients={"per_round": 1},
        algorithm={"name": "fedavg"},
    )
    example = Example((Turn("user", "the house of the state"), Turn("assistant", "the people")))
    experiment = Experiment(settings, small, FederatedData({"one": (example,)}, {"held out": (example,)}, "two lines"))
    (trained,) = experiment.tokens["one"].batches(1, None)
    (evaluated,) = experiment.tokens.held_out("held out").batches(1, None)
    responses = int((evaluated.labels != IGNORED).sum())
    assert responses < evaluated.labels.numel() - 1  # what is held out is scored on its responses, always
    assert int((trained.labels != IGNORED).sum()) == (
        responses if train_on == "completions" else trained.labels.numel() - 1
    )
    assert torch.equal(trained.input_ids, evaluated.input_ids)


def test_the_one_that_is_kept_has_learnt_to_chat_and_is_fp32_as_it_came(small: LanguageModel) -> None:
    kept = models.load(str(ROOT / "recipes" / "small" / "chat-3m"))
    assert {weight.dtype for weight in kept.model.parameters()} == {torch.float32}
    assert kept.tokenizer.get_vocab() == small.tokenizer.get_vocab()
    assert kept.tokenizer.chat_template == small.tokenizer.chat_template
    greeting = (
        "<|im_start|>user\nhi, how are you?<|im_end|>\n<|im_start|>assistant\ni am good, how are you?<|im_end|>\n"
    )
    ids = torch.tensor([kept.tokenizer(greeting)["input_ids"]])
    with torch.inference_mode():
        learnt, random = (float(each.model(input_ids=ids, labels=ids).loss) for each in (kept, small))
    assert learnt < 4 < 8 < random
