"""Peft's options: every adapter is one that plain peft loads, and that a run goes on from where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from fedferret import models
from fedferret.algorithms.fedit import FedIT
from fedferret.build import check
from fedferret.cli import app
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.sites import SiteFile
from fedferret.experiment import Experiment
from fedferret.export import apply_delta, export_delta, export_folder
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters
from fedferret.resident.site import Site, adapted, pins_of, work
from fedferret.runner import run
from fedferret.tracking.events import read
from tiny_runs import silent, tiny_experiment, tiny_recipe
from unit.tiny_adapters import base, batch
from unit.tiny_architectures import tiny_instance

pytestmark = pytest.mark.slow(seconds=11)

KEY = Key.of(5, "prepare")
TRAINING = FirstOrder(optimizer="adamw", learning_rate=0.01, steps=2, clip=None)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 3, "alpha": 7, "modules": ("q_proj", "down_proj")},
    "pattern": {"modules": r"model\.layers\.1\..*_proj"},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "tied head": {"modules_to_save": ("lm_head",)},
    "norms": {"modules_to_save": ("input_layernorm",), "freeze_a": True},
    "all": {"rank": 4, "rslora": True, "dora": True, "modules_to_save": ("embed_tokens", "norm")},
}


def logits(model: Any) -> Tensor:
    """What a model says after the words of the batch."""
    with torch.no_grad():
        said: Tensor = model(input_ids=batch().input_ids).logits
    return said


def tuned(**options: Any) -> nn.Module:
    """The tiny model with an adapter after one client's training."""
    experiment = tiny_experiment(FedIT(training=TRAINING, **options), 1)
    TRAINING.train(experiment.task, experiment.examples["Ann"], KEY)
    return experiment.model


def exported(folder: Path, **options: Any) -> Path:
    """The folder of an adapter that says something."""
    model = tuned(**options)
    adapter = adapters.adapter_of(model)
    assert adapter is not None
    adapter.export(model, "tiny", folder)
    return folder


@pytest.mark.parametrize("name", list(OPTIONS))
def test_plain_peft_loads_an_exported_adapter_and_a_run_goes_on_from_it(name: str, tmp_path: Path) -> None:
    options = OPTIONS[name]
    model = tuned(**options)
    adapter, expected = adapters.adapter_of(model), logits(model)
    assert adapter is not None
    assert not torch.allclose(logits(base()), expected, atol=1e-3)
    adapter.export(model, "tiny", tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    going_on = FedIT(adapter=str(tmp_path / "adapter"), freeze_a=bool(options.get("freeze_a")))
    again = going_on.prepare(base(), KEY)
    assert torch.equal(logits(again), expected)
    assert tree.fingerprint(tree.parameters(again)) == tree.fingerprint(tree.parameters(model))
    torch.testing.assert_close(logits(adapters.released(model)), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_pefts_own_is_read(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules="all-linear", use_dora=True, lora_dropout=0.1, modules_to_save=["norm"]
        )
        theirs = peft.get_peft_model(base(), config).eval()
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight.data.add_(0.01 * torch.randn(weight.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = FedIT(adapter=str(tmp_path / "adapter")).prepare(base(), KEY)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_from_an_adapter_and_every_node_must_have_the_same(tmp_path: Path) -> None:
    settings = {"training": {"learning_rate": 0.01, "steps": 2, "clip": "none"}}
    first = {"name": "fedit", "dora": True, "modules_to_save": ["norm"], **settings}
    summary = run(tiny_recipe(tmp_path, rounds=2, algorithm=first), tmp_path / "first", silent)
    said = CliRunner().invoke(app, ["export", str(tmp_path / "first"), "--adapter", str(tmp_path / "adapter")])
    assert said.exit_code == 0 and "holds the adapter alone" in said.output
    second = {"name": "fedit", "adapter": str(tmp_path / "adapter"), **settings}
    recipe = tiny_recipe(tmp_path, rounds=1, algorithm=second)
    costs = check(recipe)(1)
    went_on = run(recipe, tmp_path / "second", silent)
    assert went_on["eval_loss"][0] == pytest.approx(summary["eval_loss"][-1], rel=1e-6)
    start = read(tmp_path / "second").start
    assert start["base"] != read(tmp_path / "first").start["base"] == tree.fingerprint(tree.parameters(base()))
    assert start["tuned"] == sum(torch.Size(shape).numel() for shape in costs.values())
    export_delta(tmp_path / "second", tmp_path / "delta", silent)
    fingerprint = export_folder(tmp_path / "second", tmp_path / "model", silent)
    # elsewhere the same adapter does, and no other
    (tmp_path / "adapter").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"algorithm\.adapter=.*there is no such folder"):
        apply_delta("tiny", tmp_path / "delta", tmp_path / "again", silent)
    given = ["apply", "tiny", str(tmp_path / "delta"), "--to", str(tmp_path / "again")]
    said = CliRunner().invoke(app, [*given, "--adapter", str(tmp_path / "moved")])
    assert said.exit_code == 0 and fingerprint[:16] in said.output
    other = exported(tmp_path / "adapter", dora=True, modules_to_save=("norm",))
    with pytest.raises(UserError, match="belongs to the base"):
        apply_delta("tiny", tmp_path / "delta", tmp_path / "third", silent, other)
    with pytest.raises(UserError, match="began from a base"):
        Experiment.load(recipe, tmp_path / "second", silent).initial_state()
    # a site has it where its own settings say
    site = Site(name="Ann", data=SiteFile(path="rows.jsonl"))
    with pytest.raises(UserError, match=r"set adapter in site\.toml"):
        adapted(site, recipe)
    moved = Site(name="Ann", data=SiteFile(path=str(tmp_path / "rows.jsonl")), adapter=str(tmp_path / "moved"))
    assert work(moved, None, recipe.identity_toml(), None).base == start["base"]
    # and pins it
    pinned = pins_of(moved, tmp_path, adapted(moved, recipe))["adapter"]
    assert sorted(pinned) == ["moved/adapter_config.json", "moved/adapter_model.safetensors"]


def change_config(**settings: Any) -> Callable[[Path], None]:
    """Write settings into a folder's configuration."""

    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def change_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Write other tensors into a folder."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return write


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def without_layer_1(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (shutil.rmtree, {}, r"algorithm\.adapter=.*there is no such folder"),
        (lambda folder: (folder / CONFIG).unlink(), {}, r"adapter_config\.json is missing"),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), {}, r"adapter_config\.json cannot be read"),
        (lambda folder: (folder / CONFIG).write_text("[1]"), {}, r"holds no settings"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"junk"), {}, r"safetensors cannot be read"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), {}, r"pickled: save it again"),
        (change_config(peft_type="IA3"), {}, r"of type 'IA3', not LORA"),
        (change_config(r=4), {}, r"does not fit its settings"),
        (change_config(r="4"), {}, r"r must be a whole number"),
        (change_config(lora_alpha=1e999), {}, r"lora_alpha must be a number"),
        (change_config(use_dora=True), {}, r"lora_magnitude_vector is odd or missing"),
        (change_config(init_lora_weights="pissa"), {}, r"sets init_lora_weights=pissa, which changes the model"),
        (change_config(rank_pattern={"q_proj": 4}), {}, r"sets rank_pattern="),
        (change_config(bias="all"), {}, r"sets bias=all"),
        (change_config(never_heard_of=True), {}, r"sets never_heard_of=True"),
        (change_weights(lambda tensors: tensors[A].fill_(float("nan"))), {}, r"q_proj\.lora_A\.weight holds NaN"),
        (change_weights(lambda tensors: tensors.pop(A)), {}, r"does not fit its settings"),
        (change_weights(lambda tensors: tensors.update({A: tensors[A].int()})), {}, r"lora_A\.weight is of type i32"),
        (change_weights(without_layer_1), {}, r"it names model\.layers\.1\.\S+, and has no weights for it"),
        (change_config(target_modules=["k_proj"]), {}, r"it names \S+k_proj, and has no weights for it"),
        (change_config(exclude_modules=["q_proj"]), {}, r"it has weights for \S+q_proj, which it does not name"),
        (change_config(layers_to_transform=[0]), {}, r"it has weights for \S+layers\.1\S+, which it does not name"),
        (change_config(modules_to_save=["norm"]), {}, r"it names norm, and has no weights for it"),
        (change_config(target_modules="("), {}, r"does not fit its settings"),
        (
            change_weights(lambda tensors: tensors.update({A: torch.ones(8, 3)})),
            {},
            r"does not fit this model: .*q_proj\.lora_A\.weight has the shape \(8, 3\), and here \(8, 64\)",
        ),
        (
            change_weights(lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(259, 64)})),
            {},
            r"does not fit this model",
        ),
        (lambda folder: None, {"rank": 4}, r"algorithm\.rank=4: the adapter in .* has 8; leave rank out"),
        (lambda folder: None, {"rslora": True}, r"algorithm\.rslora=True: the adapter"),
        (lambda folder: None, {"modules": ["up_proj"]}, r"algorithm\.modules: the adapter .* other modules"),
        (lambda folder: None, {"modules_to_save": ["norm"]}, r"algorithm\.modules_to_save=\['norm'\]: the adapter"),
    ],
)
def test_an_adapter_that_is_of_no_use_is_one_line(
    change: Callable[[Path], None], settings: dict[str, Any], message: str, plain: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(UserError, match=message) as raised:
        table = {"name": "fedit", "adapter": str(tmp_path / "adapter"), **settings}
        algorithm: Any = tiny_recipe(tmp_path, algorithm=table).algorithm
        algorithm.prepare(base(), KEY)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder, to be copied."""
    return exported(tmp_path_factory.mktemp("plain") / "adapter", modules=("q_proj",))


def test_settings_that_the_adapter_has_too_are_no_contradiction(plain: Path) -> None:
    given: dict[str, Any] = {"rank": 8, "alpha": 16, "dora": False, "rslora": False, "modules_to_save": ()}
    both = FedIT(adapter=str(plain), modules=("q_proj",), **given).prepare(base(), KEY)
    assert torch.equal(logits(both), logits(FedIT(adapter=str(plain)).prepare(base(), KEY)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ("haed",)}, r'algorithm\.modules_to_save="haed": no module with weights is called so'),
        ({"modules_to_save": ("mlp",)}, r'algorithm\.modules_to_save="mlp": .*gate_proj has LoRA factors'),
        ({"modules_to_save": ("q_proj",)}, r"has LoRA factors; name it in modules or in modules_to_save, not in both"),
    ],
)
def test_modules_that_cannot_be_dense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FedIT(**settings).prepare(base(), KEY)


def test_an_adapter_that_peft_would_attach_elsewhere_is_not_written(tmp_path: Path) -> None:
    model = adapters.LoRA(rank=2, alpha=4).attach(tiny_instance("deepseek_v3"), KEY)
    with pytest.raises(UserError, match="peft reads module names of deepseek_v3 as those of an older layout"):
        adapters.LoRA(rank=2, alpha=4).export(model, "tiny", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dora": True}, "DoRA's magnitudes begin as the norms of the weights"),
        (
            {"modules": ["q_proj"], "modules_to_save": ["k_proj"]},
            r"names .*k_proj, which is quantised; give embeddings",
        ),
    ],
)
def test_what_begins_from_quantised_weights_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = {"name": "tiny", "quantised": "4-bit"}
    with pytest.raises(UserError, match=message):
        check(tiny_recipe(tmp_path, model=model, algorithm={"name": "fedit", **settings}))


def test_over_a_bf16_base_an_adapter_and_dense_modules_are_trained_and_handed_over(tmp_path: Path) -> None:
    algorithm = {"name": "fedit", "dora": True, "modules_to_save": ["norm"], "training": {"learning_rate": 0.01}}
    recipe = tiny_recipe(tmp_path, rounds=2, algorithm=algorithm, model={"name": "tiny", "dtype": "bf16"})
    summary = run(recipe, tmp_path / "run", silent)
    assert summary["eval_loss"][-1] < summary["eval_loss"][0] - 0.05
    export_folder(tmp_path / "run", tmp_path / "adapter", silent, adapter_alone=True)
    again = {**algorithm, "adapter": str(tmp_path / "adapter")}
    recipe = tiny_recipe(tmp_path, rounds=1, algorithm=again, model={"name": "tiny", "dtype": "bf16"})
    went_on = run(recipe, tmp_path / "again", silent)
    assert went_on["eval_loss"][0] == pytest.approx(summary["eval_loss"][-1], rel=1e-6)


def test_a_method_without_an_adapter_writes_none(tmp_path: Path) -> None:
    run(tiny_recipe(tmp_path, rounds=1, algorithm={"name": "fedavg"}), tmp_path / "run", silent)
    with pytest.raises(UserError, match="there is no adapter to write; use --to"):
        export_folder(tmp_path / "run", tmp_path / "adapter", silent, adapter_alone=True)
    with pytest.raises(UserError, match="a classifier's adapter is merged"):
        model = models.classifier("tiny-encoder", 3).model
        adapters.LoRA(rank=2, alpha=4, modules="all-linear").attach(model, KEY)
        adapters.LoRA(rank=2, alpha=4, modules="all-linear").export(model, "tiny-encoder", tmp_path / "adapter")
