"""Adapters: the published sizes, the same bits from the same key, a frozen base, and models that others can load."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fedferret.algorithms.fedit import FedIT
from fedferret.algorithms.fedprompt import FedPrompt
from fedferret.algorithms.fedptuning import FedPTuning
from fedferret.build import check
from fedferret.config import build_algorithm
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.batches import Batch
from fedferret.estimate import estimate
from fedferret.experiment import Experiment
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters
from fedferret.objectives.next_token import NextToken, head_is_linear
from fedferret.runner import run
from fedferret.tracking.events import read
from fedferret.wire import codec
from tiny_runs import silent, tiny_experiment, tiny_recipe
from toys import AnyAlgorithm
from unit.tiny_adapters import METHODS, base, batch

KEY = Key.of(5, "prepare")
HEAD = ("model.layers.1.mlp.down_proj",)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> AnyAlgorithm:
    """Each of the adapters' methods in turn."""
    return METHODS[request.param]


SIZES = {"fedit": 12_712_960, "fedptuning": 30_793_600, "fedptuning-v2": 20 * 26 * 2 * 3200, "fedprompt": 64_000}


@pytest.mark.parametrize(("name", "count"), SIZES.items())
def test_the_sizes_on_open_llama_3b_are_the_published_ones(name: str, count: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 3200, "num_hidden_layers": 26, "intermediate_size": 8640, "num_attention_heads": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes))
    shapes = {name: tuple(each.shape) for name, each in tree.parameters(METHODS[name].prepare(model, KEY)).items()}
    assert sum(map(math.prod, shapes.values())) == count
    cost = METHODS[name].wire_cost(shapes, 4, 1)
    assert {cost.up_least, cost.up_most, cost.down_least, cost.down_most} == {4 * count}


def test_the_base_is_frozen_and_keeps_its_bits(method: AnyAlgorithm) -> None:
    plain, model = base(), base()
    prepared = method.prepare(model, KEY)
    inside: Any = prepared.get_base_model() if hasattr(prepared, "get_base_model") else prepared
    kept = {name.replace(".base_layer", ""): weight for name, weight in inside.named_parameters()}
    assert all(torch.equal(kept[name], weight) for name, weight in plain.named_parameters())
    assert not any(kept[name].requires_grad for name, _ in plain.named_parameters())
    assert not any(module.training for module in prepared.modules())


def test_the_same_key_gives_the_same_bits_and_no_global_generator_moves(method: AnyAlgorithm) -> None:
    before = torch.get_rng_state()
    first, again, other = (tree.parameters(method.prepare(base(), key)) for key in (KEY, KEY, Key.of(6, "prepare")))
    assert torch.equal(torch.get_rng_state(), before)
    assert tree.fingerprint(first) == tree.fingerprint(again) != tree.fingerprint(other)
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)
        assert tree.fingerprint(tree.parameters(method.prepare(base(), KEY))) == tree.fingerprint(first)


def test_first_values_are_spread_as_the_libraries_are() -> None:
    """Two-sided: two thirds and three halves of the figure are refused."""
    factors = adapters.factors(FedIT(rank=16).prepare(base(), KEY))
    assert len(factors) == 14
    for name, (a, b) in factors.items():
        assert a.shape[0] == b.shape[1] == 16 and not b.any()
        bound = 1 / math.sqrt(a.shape[1])
        assert a.abs().max() <= bound, name
        assert 0.9 < a.std().item() / (bound / math.sqrt(3)) < 1.1, name
    drawn = [a.flatten()[:64] for a, _ in factors.values()]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)
    prompt = tree.parameters(FedPrompt().prepare(base(), KEY))["prompt_encoder.default.embedding.weight"]
    assert abs(float(prompt.mean())) < 0.1 and 0.9 < float(prompt.std()) < 1.1
    encoder = tree.parameters(FedPTuning(encoder_width=32).prepare(base(), KEY))
    for place, inputs in ((0, 64), (2, 32), (4, 32)):
        for part in ("weight", "bias"):
            values = encoder[f"prompt_encoder.default.mlp_head.{place}.{part}"]
            assert values.abs().max() <= 1 / math.sqrt(inputs)
            assert 0.7 < float(values.std()) * math.sqrt(3 * inputs) < 1.4


def test_a_model_with_lora_begins_as_its_base() -> None:
    plain, prepared, ids = base(), FedIT().prepare(base(), KEY), batch().input_ids
    assert torch.equal(prepared(input_ids=ids).logits, plain(input_ids=ids).logits)


# --- which modules


@pytest.mark.parametrize(
    ("modules", "count"),
    [
        (("q_proj", "down_proj"), 4),
        (HEAD, 1),
        ("all-linear", 14),
        (r"model\.layers\.0\..*_proj", 7),
        (r".*\.mlp\..*", 6),
    ],
)
def test_modules_are_ends_of_names_or_a_pattern(modules: Any, count: int) -> None:
    assert len(adapters.factors(FedIT(modules=modules).prepare(base(), KEY))) == count


def test_a_name_alone_means_no_other_that_ends_like_it() -> None:
    model = nn.ModuleDict({"0": nn.Linear(2, 2), "deep": nn.Sequential(nn.Linear(2, 2))})
    chosen = adapters.LoRA(rank=1, alpha=1, modules="0").attach(model, KEY)
    assert list(adapters.factors(chosen)) == ["0"]


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        (("q_prj",), "q_prj"),
        (("q_proj", "query"), "query"),
        (("proj",), "proj"),
        ("q_proj", "q_proj"),
        (("embed_tokens",), "embed_tokens"),
        (("lm_head",), "lm_head"),
        ((), "[]"),
    ],
)
def test_modules_that_are_not_there_are_refused_before_weights_are_read(
    modules: Any, named: str, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, algorithm={"name": "fedit", "modules": modules})
    with pytest.raises(UserError) as raised:
        check(recipe)
    said = str(raised.value)
    assert f'modules="{named}": no linear module is called so; this model has q_proj, k_proj, v_proj' in said
    assert said.endswith('set modules = "all-linear", or leave modules out')


def test_other_bad_settings_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a regular expression"):
        FedIT(modules="(q_proj").prepare(base(), KEY)
    for name, settings in (("fedit", {"rank": 0}), ("fedit", {"alpha": 0}), ("fedprompt", {"virtual_tokens": 0})):
        with pytest.raises(UserError, match="must be at least 1"):
            build_algorithm(name, settings)
    with pytest.raises(UserError, match="encoder_width=0: must be at least 1"):
        FedPTuning(encoder_width=0)
    with pytest.raises(UserError, match="has an adapter already"):
        FedIT().prepare(FedIT().prepare(base(), KEY), KEY)
    for name in ("fedptuning", "fedprompt"):
        with pytest.raises(UserError, match=rf"text\.packed=true: {name} puts a prompt before every row"):
            check(tiny_recipe(tmp_path, algorithm={"name": name}, text={"packed": True}))
    check(tiny_recipe(tmp_path, algorithm={"name": "fedit"}, text={"packed": True}))


@pytest.mark.parametrize("name", METHODS)
def test_releasing_gives_the_plain_model_back_and_merging_keeps_outputs_to_rounding(name: str) -> None:
    model = METHODS[name].prepare(base(), KEY)
    with torch.no_grad():
        for place, weight in enumerate(tree.parameters(model).values()):
            weight.add_(0.05 * (KEY.fold(place).uniform(weight.numel()).float().view_as(weight) - 0.5))
    rows, objective = batch(), NextToken()
    before = objective.loss(model, rows)
    adapter = adapters.adapter_of(model)
    assert adapter is not None and set(adapter.parameters(model)) == set(tree.parameters(model))
    plain = METHODS[name].release(model)
    assert set(dict(plain.named_parameters())) == set(dict(base().named_parameters()))
    assert adapters.adapter_of(plain) is None
    if adapter.merges:
        torch.testing.assert_close(objective.loss(plain, rows), before, rtol=1e-5, atol=1e-6)
    else:  # the plain model has no place for a prompt: what is left is the base
        torch.testing.assert_close(objective.loss(plain, rows), objective.loss(base(), rows), rtol=0, atol=0)
        with pytest.raises(UserError, match="cannot be merged: the plain model has no place for it"):
            adapter.merge(plain)


def test_detaching_lora_leaves_the_base_to_the_bit() -> None:
    model = FedIT().prepare(base(), KEY)
    adapter = adapters.adapter_of(model)
    assert adapter is not None
    assert tree.fingerprint(dict(adapter.detach(model).named_parameters())) == tree.fingerprint(
        dict(base().named_parameters())
    )


@pytest.mark.parametrize("name", ["fedit", "fedit-sgd", "fedptuning", "fedprompt"])
def test_a_training_table_names_only_what_it_changes(name: str) -> None:
    plain: Any = build_algorithm(name, {})
    changed: Any = build_algorithm(name, {"training": {"batch_size": 2}})
    assert changed.training == FirstOrder(**{**vars(plain.training), "batch_size": 2})
    epochs: Any = build_algorithm(name, {"training": {"epochs": 2}})
    assert (epochs.training.steps, epochs.training.epochs) == (None, 2)
    assert epochs.training.learning_rate == plain.training.learning_rate


# --- training on it


@pytest.mark.parametrize("name", ["fedptuning", "fedprompt"])
@pytest.mark.parametrize("linear_head", [True, False])
def test_the_loss_behind_a_prompt_is_the_librarys(name: str, linear_head: bool) -> None:
    model: Any = METHODS[name].prepare(base(), KEY)
    if not linear_head:
        capped(model.get_base_model())
    loss, rows, weights = NextToken(), batch(), [each for each in model.parameters() if each.requires_grad]
    assert head_is_linear(model.get_base_model()) == linear_head
    ours = loss.loss(model, rows)
    gradients = torch.autograd.grad(ours, weights)
    theirs = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels).loss
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(gradients, torch.autograd.grad(theirs, weights), strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.any()


def capped(model: Any) -> None:
    """Make ``model`` do something to its logits, as Gemma does."""
    plain: Callable[..., Any] = model.forward

    def forward(**inputs: Any) -> Any:
        labels = inputs.pop("labels", None)
        output = plain(**inputs)
        output.logits = torch.tanh(output.logits / 0.1) * 0.1
        if labels is not None:
            output.loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output

    model.forward = forward


def test_padding_does_not_count_behind_a_prompt() -> None:
    model, rows = FedPrompt().prepare(base(), KEY), batch()
    other = Batch(rows.input_ids.clone(), rows.attention_mask, rows.labels)
    other.input_ids[1, 6:] = 77
    loss = NextToken()
    assert torch.equal(loss.loss(model, rows), loss.loss(model, other))
    with torch.autocast("cpu", torch.bfloat16):
        logits, targets = loss.scored(model, rows)
    assert len(logits) == len(targets) == 16
    rounded = functional.cross_entropy(logits, targets).item()
    assert rounded == pytest.approx(loss.loss(model, rows).item(), rel=0.02)


def trained(algorithm: Any, **changes: Any) -> dict[str, Tensor]:
    """The weights after one client's training on the tiny model."""
    experiment = tiny_experiment(algorithm, 1)
    training = FirstOrder(learning_rate=0.1, steps=2, batch_size=2, **changes)
    training.train(experiment.task, experiment.examples["Ann"], KEY)
    return tree.clone(tree.parameters(experiment.model))


def test_recomputing_activations_changes_nothing(method: AnyAlgorithm) -> None:
    plain, recomputed = trained(method), trained(method, checkpoint_activations=True)
    before = tree.parameters(tiny_experiment(method, 1).model)
    assert any(not torch.equal(weight, before[name]) for name, weight in plain.items())
    for name, weight in plain.items():
        torch.testing.assert_close(recomputed[name], weight, rtol=1e-5, atol=1e-7)


def test_frozen_factors_stay_and_do_not_travel() -> None:
    experiment = tiny_experiment(FedIT(freeze_a=True, training=FirstOrder(learning_rate=1.0, steps=2)), 2)
    before = {name: a.clone() for name, (a, _) in adapters.factors(experiment.model).items()}
    state = experiment.initial_state()
    list(experiment.run_rounds(state, experiment.engine(state)))
    assert all(".lora_B." in name for name in state.public.weights)
    for name, (a, b) in adapters.factors(experiment.model).items():
        assert torch.equal(a, before[name]) and b.any()


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_run_that_is_stopped_and_resumed_is_uninterrupted(method: AnyAlgorithm, memory: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, rounds=2, algorithm={"name": method.name}, execution={"memory": memory})
    whole = Experiment.load(recipe, log=silent)
    expected = whole.initial_state()
    list(whole.run_rounds(expected, whole.engine(expected)))
    for _ in range(2):
        experiment = Experiment.load(recipe, tmp_path / "run", silent)
        state = experiment.initial_state()
        next(experiment.run_rounds(state, experiment.engine(state)))
    assert state.round == 2
    assert codec.encode(dict(state.public.weights)) == codec.encode(dict(expected.public.weights))


def test_what_a_recipe_costs_is_known_before_weights_are_read(method: AnyAlgorithm, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, algorithm={"name": method.name})
    expected = tree.parameters(method.prepare(base(), KEY))
    assert check(recipe)(1) == {name: tuple(weight.shape) for name, weight in expected.items()}
    cost, whole = estimate(recipe), estimate(tiny_recipe(tmp_path, algorithm={"name": "fedavg"}))
    assert (cost.tuned, cost.parameters) == (tree.size(expected), 90_624)
    assert (cost.bytes_up, cost.bytes_fedavg) == (4 * tree.size(expected), 4 * 90_624)
    assert cost.memory < whole.memory and whole.tuned == whole.parameters


def test_a_run_tells_what_it_tuned_of_what_and_its_yardstick_trains_the_same(tmp_path: Path) -> None:
    algorithm = {"name": "fedit", "training": {"learning_rate": 0.01, "steps": 3}}
    recipe = tiny_recipe(tmp_path, rounds=2, algorithm=algorithm, evaluation={"local_only_clients": 1})
    summary = run(recipe, tmp_path / "run", silent)
    start = read(tmp_path / "run").start
    assert (start["parameters"], start["tuned"]) == (90_624, 16_384)
    assert start["base"] == tree.fingerprint(tree.parameters(base()))
    assert summary["bytes_fedavg"] == 4 * 90_624 * 8  # two clients in two rounds, both ways
    assert summary["baselines"]["local-only"] < summary["baselines"]["untuned"] - 0.1


# --- handing over
