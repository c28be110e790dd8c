"""The small model: its size, its tokenizer, and training on all tokens where a recipe sets it."""

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


pytestmark = pytest.mark.slow  # the vocabulary is in a package of 93 MB


def test_it_has_3221952_weights_and_its_shapes_are_known_without_them(small: LanguageModel) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in small.model.named_parameters()}
    assert sum(weight.numel() for weight in small.model.parameters()) == 3_221_952
    assert models.parameter_shapes("small") == shapes


def test_its_tokenizer_splits_common_words_as_smollm2_does_and_loses_no_text(small: LanguageModel) -> None:
    tokenizer, smollm2 = small.tokenizer, models.load("packaged:smollm2").tokenizer
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < len(tokenizer) == 4096 and tokenizer.decode(ids) == text
    assert (
        text == "<|im_start|>user\n1 and 12?<|im_end|>\n<|im_start|>assistant\n" + CHAT[1]["content"] + "<|im_end|>\n"
    )
    common = "The people of the state said that they had the right to be in the house."
    assert tokenizer(common)["input_ids"] == smollm2(common)["input_ids"]
    assert len(ids) > len(smollm2(text)["input_ids"])


@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_train_on_sets_the_labels_of_training_and_not_of_evaluation(small: LanguageModel, train_on: str) -> None:
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
    (trained,) = experiment.examples["one"].batches(1, None)
    (evaluated,) = experiment.examples.held_out("held out").batches(1, None)
    responses = int((evaluated.labels != IGNORED).sum())
    assert responses < evaluated.labels.numel() - 1  # held-out examples are always scored on their responses
    assert int((trained.labels != IGNORED).sum()) == (
        responses if train_on == "completions" else trained.labels.numel() - 1
    )
    assert torch.equal(trained.input_ids, evaluated.input_ids)


def test_the_committed_checkpoint_chats_and_is_fp32(small: LanguageModel) -> None:
    checkpoint = models.load(str(ROOT / "recipes" / "small" / "chat-3m"))
    assert {weight.dtype for weight in checkpoint.model.parameters()} == {torch.float32}
    assert checkpoint.tokenizer.get_vocab() == small.tokenizer.get_vocab()
    assert checkpoint.tokenizer.chat_template == small.tokenizer.chat_template
    greeting = (
        "<|im_start|>user\nhi, how are you?<|im_end|>\n<|im_start|>assistant\ni am good, how are you?<|im_end|>\n"
    )
    ids = torch.tensor([checkpoint.tokenizer(greeting)["input_ids"]])
    with torch.inference_mode():
        trained, random = (float(each.model(input_ids=ids, labels=ids).loss) for each in (checkpoint, small))
    assert trained < 4 < 8 < random
