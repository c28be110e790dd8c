"""Every architecture of causal language models is treated right, or refused by name; tiny random instances of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from fedferret import models
from fedferret.algorithms.fedprompt import FedPrompt
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Task
from fedferret.data.batches import TokenisedData
from fedferret.data.templates import Tokens
from fedferret.data.text import TextSettings
from fedferret.evaluation.generation import generate
from fedferret.experiment import Experiment
from fedferret.export import TunedDelta, apply_delta
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters
from fedferret.models.tiny import tiny_tokenizer
from fedferret.objectives.next_token import NextToken
from fedferret.wire import codec
from tiny_runs import silent, tiny_recipe
from unit.tiny_architectures import ARCHITECTURES, tiny_instance

pytestmark = pytest.mark.slow(seconds=80)

# What lets an example of a packed row see the one before: state-space, recurrent and convolutional layers, ALiBi,
# positions counted over the row, masks of an architecture's own.
NOT_PACKED = {
    *("opt", "opt-projected", "bloom", "falcon", "falcon-alibi", "mpt", "gpt_oss", "mamba", "mamba2", "falcon_mamba"),
    *("rwkv", "xglm", "recurrent_gemma", "lfm2", "bert-generation", "electra", "jamba", "qwen3_next"),
}
# What does not attend by transformers' interface, or not at all.
NO_PREFIX = {
    *("gpt_neo", "gptj", "codegen", "bloom", "falcon", "falcon-alibi", "mpt", "xglm"),
    *("mamba", "mamba2", "falcon_mamba", "rwkv"),
}
OBJECTIVE = NextToken()
KEY = Key.of(5, "prepare")
FOLDERS = TemporaryDirectory(prefix="fedferret-architectures-")  # is removed with this module


@cache
def saved(architecture: str) -> Path:
    """The folder of a tiny model."""
    folder = Path(FOLDERS.name) / architecture
    models.save_folder(models.LanguageModel(architecture, tiny_instance(architecture), tiny_tokenizer(), None), folder)
    return folder


@cache
def loaded(architecture: str) -> models.LanguageModel:
    """The model; a test leaves its weights as they are."""
    return models.load(str(saved(architecture)))


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Put the weights back."""
    before = tree.clone(tree.parameters(model))
    yield
    tree.copy_(tree.parameters(model), before)


def rows() -> list[Tokens]:
    """Five examples of 5 to 20 tokens, 57 in all."""
    drawn = [((Key.of(3, number).uniform(length) * 250).long() + 3) for number, length in enumerate((9, 17, 5, 20, 6))]
    return [Tokens(tuple(ids.tolist()), len(ids) // 3 + 1, False) for ids in drawn]


def data(packed: bool = False) -> TokenisedData:
    """The examples as a client's."""
    return TokenisedData(rows(), packed)


@torch.no_grad()
def by_row(model: Any, size: int) -> Tensor:
    """The summed loss of each row, in evaluation order."""
    return torch.cat([OBJECTIVE.by_example(model, batch)[0] for batch in data().batches(size, None)])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([rows()[1].ids]), use_cache=False).logits
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_has_the_loss_in_a_batch_that_it_has_alone(architecture: str) -> None:
    model = loaded(architecture).model
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    assert models.parameter_shapes(str(saved(architecture))) == shapes
    torch.testing.assert_close(by_row(model, 5), by_row(model, 1), rtol=1e-4, atol=1e-4)
    OBJECTIVE.check_loaded(loaded(architecture), model, TextSettings())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_step_is_the_padded_one_or_refused_by_the_architectures_name(architecture: str) -> None:
    model, text = loaded(architecture).model, TextSettings(packed=True)
    if architecture in NOT_PACKED:
        with pytest.raises(UserError, match=rf"text\.packed=true: {type(model).__name__} does not keep the examples"):
            OBJECTIVE.check_loaded(loaded(architecture), model, text)
        return
    OBJECTIVE.check_loaded(loaded(architecture), model, text)
    results = []
    for packed in (False, True):
        with unchanged(model):
            training = FirstOrder(learning_rate=0.1, steps=1, batch_size=5)
            training.train(Task.of(model, OBJECTIVE, 1), data(packed), KEY)
            results.append(tree.clone(tree.parameters(model)))
    padded, packed_weights = results
    assert any(not torch.equal(weight, padded[name]) for name, weight in tree.parameters(model).items())
    for name, weight in padded.items():
        torch.testing.assert_close(packed_weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_do_not_depend_on_the_batch_behind_a_learned_prompt_either(architecture: str) -> None:
    asked = [row.ids for row in rows()[:4]]
    model = loaded(architecture).model
    alone = [generate(model, [prompt], (), 5)[0] for prompt in asked]
    assert generate(model, asked, (), 5, batch_size=4) == alone
    prompted: Any = FedPrompt(virtual_tokens=3).prepare(models.load(str(saved(architecture))).model, KEY)
    OBJECTIVE.check_loaded(loaded(architecture), prompted, TextSettings())
    (batch,) = data().batches(5, None)
    OBJECTIVE.loss(prompted, batch).backward()
    assert all(weight.grad.any() for weight in prompted.parameters() if weight.requires_grad)
    assert generate(prompted, asked, (), 5, batch_size=4) == [generate(prompted, [each], (), 5)[0] for each in asked]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_do_not_depend_on_batch_or_cache_behind_prefixes_or_they_are_refused(architecture: str) -> None:
    model: Any = tiny_instance(architecture).eval()
    if architecture in NO_PREFIX:
        with pytest.raises(UserError, match=f"{type(model).__name__} has no attention layer that reads a prefix"):
            adapters.Prefix(tokens=3).attach(model, KEY)
        return
    adapters.Prefix(tokens=3).attach(model, KEY)
    tree.copy_(tree.parameters(model), {name: 50 * each for name, each in tree.parameters(model).items()})
    OBJECTIVE.check_loaded(loaded(architecture), model, TextSettings(packed=architecture not in NOT_PACKED))
    asked, slow = [row.ids for row in rows()[:3]], []
    for prompt in asked:
        row = list(prompt)
        for _ in range(4):
            row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        slow.append(tuple(row[len(prompt) :]))
    assert generate(model, asked, (), 4, batch_size=3) == slow


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputing_activations_draws_nothing_and_changes_nothing(architecture: str) -> None:
    model = loaded(architecture).model
    before, results = torch.get_rng_state(), []
    for recomputed in (False, True):
        with unchanged(model):
            training = FirstOrder(learning_rate=0.1, steps=1, checkpoint_activations=recomputed)
            training.train(Task.of(model, OBJECTIVE, 1), data(), KEY)
            results.append(tree.clone(tree.parameters(model)))
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-4, atol=1e-5)


TUNED = [(architecture, method) for architecture in ARCHITECTURES for method in ("fedavg", "fedit")]
EXPERTS = ("mixtral", "qwen2_moe", "deepseek_v3", "jamba", "qwen3_next")


@pytest.mark.parametrize(
    ("architecture", "method"), [*TUNED, *((architecture, "fedit all-linear") for architecture in EXPERTS)]
)
def test_a_delta_gives_the_tuned_model_in_plain_transformers(architecture: str, method: str, tmp_path: Path) -> None:
    """FedIT with the modules that it has by default, and with all linear ones where one tensor holds the experts."""
    from transformers import AutoModelForCausalLM

    name, _, modules = method.partition(" ")
    algorithm: dict[str, Any] = {"name": name, "training": {"learning_rate": 0.05, "steps": 1, "clip": 1.0}}
    if modules:
        algorithm["modules"] = modules
    recipe = tiny_recipe(
        tmp_path, rounds=1, model={"name": str(saved(architecture))}, algorithm=algorithm, clients={"per_round": 1}
    )
    experiment = Experiment.load(recipe, log=silent)
    state = experiment.initial_state()
    list(experiment.run_rounds(state, experiment.engine(state)))
    delta = TunedDelta.of(recipe, state.log.since(0), experiment.base_fingerprint)
    with recipe.algorithm.model(experiment.task, state.public) as model:
        assert model is not None
        fingerprint, expected = tree.fingerprint(tree.parameters(model)), logits(model)
    (tmp_path / "delta").write_bytes(codec.encode(replace(delta, fingerprint=fingerprint)))
    assert apply_delta(str(saved(architecture)), tmp_path / "delta", tmp_path / "tuned", silent) == fingerprint
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(loaded(architecture).model), rtol=1e-4, atol=1e-5)
