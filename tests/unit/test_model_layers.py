"""The layers of a model are its blocks, whatever is in or around the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedferret.algorithms.fedit import FedIT
from fedferret.algorithms.fedprompt import FedPrompt
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models import classifiers, images, tiny
from fedferret.models.layers import by_layer, layers_named, layers_of
from toys import toy_language_model, toy_model
from unit.tiny_architectures import ARCHITECTURES, tiny_configuration

KEY = Key.of(5, "layers")
LENET5 = ["body.conv1", "body.conv2", "body.linear1", "body.linear2"]
TABLES_FIRST = nn.ModuleDict(
    {
        "tables": nn.ModuleList(nn.Embedding(3, 2) for _ in range(3)),
        "blocks": nn.ModuleList(nn.Linear(9, 9) for _ in range(2)),
    }
)


def classifier() -> nn.Module:
    return classifiers.TextClassifier(tiny.tiny_encoder(KEY), nn.Linear(64, 3), "mean")


def lenet5() -> nn.Module:
    made = images.MODELS["lenet5"]
    return classifiers.ImageClassifier(made.body(), nn.Linear(made.width, 10), 1, 28, 0.5, 0.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layers_of_every_architecture_are_its_blocks(architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    configuration = tiny_configuration(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)  # type: ignore[no-untyped-call]
    assert len(layers_of(model)) == configuration.num_hidden_layers
    names = [name for name, _ in model.named_parameters()]
    *layers, rest = by_layer(names, model)
    assert layers_named(names) == dict(zip(layers_of(model), layers, strict=True))
    assert all(layers) and any(model.get_input_embeddings().weight is model.get_parameter(name) for name in rest)


@pytest.mark.parametrize(
    "model, expected",
    [
        (tiny.tiny_encoder(KEY), ["encoder.layer.0", "encoder.layer.1"]),
        (classifier(), ["encoder.encoder.layer.0", "encoder.encoder.layer.1"]),
        (FedIT().prepare(classifier(), KEY), ["encoder.encoder.layer.0", "encoder.encoder.layer.1"]),
        (FedPrompt().prepare(toy_language_model(), KEY), ["base_model.model.layers.0"]),
        (lenet5(), LENET5),
        (FedIT(modules=("linear1",)).prepare(lenet5(), KEY), LENET5),
        (toy_model(), ["0", "2"]),
        (FedIT(modules=("0",)).prepare(toy_model(), KEY), ["0", "2"]),
    ],
)
def test_an_adapter_a_wrapper_and_a_head_change_no_layer(model: nn.Module, expected: list[str]) -> None:
    assert list(layers_of(model)) == expected
    assert all(model.get_submodule(name) is layer for name, layer in layers_of(model).items())
    *layers, _ = by_layer([name for name, _ in model.named_parameters()], model)
    assert layers_named(name for name, _ in model.named_parameters()) == dict(zip(expected, layers, strict=True))


def test_names_are_grouped_by_layer_and_the_others_come_last() -> None:
    model = FedIT(modules="all-linear").prepare(classifier(), KEY)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    first, second, rest = by_layer(names, model)
    assert [name.replace(".layer.0.", ".layer.1.") for name in first] == second
    assert rest == ["head.weight", "head.bias"] and first + second + rest == names


def test_of_several_lists_the_one_with_most_weights_has_the_layers() -> None:
    assert list(layers_of(TABLES_FIRST)) == ["blocks.0", "blocks.1"]


def test_a_model_of_one_module_has_no_layers() -> None:
    with pytest.raises(UserError, match="a Linear has no layers"):
        layers_of(nn.Linear(2, 2))
