"""A model that cannot be trained is one line and exit code 2, before round 1, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fedferret import models
from fedferret.cli import app
from tiny_runs import tiny_tables
from unit.tiny_architectures import tiny_instance

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model saved in a folder, which a test may damage."""
    models.save_folder(models.load("tiny"), tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, command: str = "run", **changes: Mapping[str, Any]) -> str:
    """The one line with which a run on the model in ``folder`` is refused."""
    work = folder.parent
    recipe, out = work / "recipe.toml", work / "run"
    recipe.write_text(tomli_w.dumps(tiny_tables(work, model={"name": str(folder)}, **changes)))
    words = [command, recipe, *(["--out", out] if command == "run" else [])]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 600, result.stderr
    assert not out.exists()
    return result.stderr


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def configured(content: object) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(content)) and None


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "tiny"}')


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").unlink()


def with_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_small_embedding(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", vocab_size=100)


def with_a_bias(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_codes(folder: Path, name: str = "model.layers.0.mlp.up_proj.weight") -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = (1000 * weights[name]).int()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_codes_without_a_prefix(folder: Path) -> None:
    weights = {name.removeprefix("model."): each for name, each in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with_codes(folder, "layers.0.mlp.up_proj.weight")


def with_codes_in_torchs_format(folder: Path) -> None:
    with_codes(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_complex_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.complex64)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_another_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_words(folder: Path, **model: object) -> None:
    """The tokenizer has no byte but a few words or letters."""
    kinds = {"vocab": {"<pad>": 0, "<bos>": 1, "<eos>": 2, "zq": 3}, "unk_token": None, **model}
    parts = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    edit(folder / "tokenizer.json", model=kinds, **parts)


def not_fetched(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def without_a_layer(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=1)


def code_in_the_tokenizer(folder: Path) -> None:
    code = {"AutoTokenizer": ["tokenization.Tokenizer", None]}
    edit(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="Tokenizer")


class Planted:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("exit 0",)


def pickled(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))

    return damage


def saved_by_torch(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Planted()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (configured([]), "its config.json is no configuration"),
        (configured([{"model_type": "llama"}]), "its config.json is no configuration"),
        (configured({**LLAMA, "hidden_size": [64]}), "could not be read from this folder"),
        (configured({**LLAMA, "num_attention_heads": 0}), "could not be read from this folder"),
        (configured({"model_type": ["llama"]}), "is not a causal language model"),
        (configured({"model_type": "new", "auto_map": {"AutoConfig": "x.C"}}), "no such code is run"),
        (configured({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}), "not a causal language"),
        (configured({"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}), "not a causal"),
        (configured({"architectures": ["ViTForImageClassification"], "model_type": "vit"}), "not a causal language"),
        (
            configured({"model_type": "gemma3", "vision_config": {"hidden_size": 8}}),
            "reads images or sound beside text",
        ),
        (configured({"model_type": "gemma3"}), "reads images or sound beside text"),
        (configured({"model_type": "whisper"}), "not a causal language model"),
        (adapter, "an adapter beside a base is in this folder"),
        (adapter_alone, "an adapter alone is in this folder"),
        (with_nan, "its weights model.norm.weight hold NaN or infinity"),
        (with_small_embedding, "and the embedding has 100 rows; give the tokenizer that belongs to the model"),
        (without_a_layer, "9 of its weights are of layers that its config.json does not count"),
        (with_a_bias, "1 of its weights belong to modules that by its config.json have no such part"),
        (with_codes, "its weights model.layers.0.mlp.up_proj.weight (i32) are whole numbers, so codes of a quantised"),
        (with_codes_without_a_prefix, "its weights layers.0.mlp.up_proj.weight (i32) are whole numbers"),
        (with_codes_in_torchs_format, "its weights model.layers.0.mlp.up_proj.weight (int32) are whole numbers"),
        (with_complex_numbers, "its weights model.norm.weight (c64) are complex numbers; give the model in full"),
        (with_another_head, "its lm_head.weight differs from its embedding, and its config.json ties the two"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=0), "num_hidden_layers is 0 in its config.json"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=10**6), "is 1,000,000 in its config.json; give"),
        (lambda folder: edit(folder / "config.json", hidden_size=0), "hidden_size is 0 in its config.json"),
        (
            lambda folder: with_words(folder, type="WordLevel", unk_token="<unk>"),
            "the tokenizer fails on 'user one' (Exception: WordLevel error",
        ),
        (
            lambda folder: with_words(folder, type="BPE", merges=[]),
            "the tokenizer has no token for any character of the response 'Ann says",
        ),
        (
            not_fetched,
            "model.safetensors is a pointer of Git LFS and not the file itself",
        ),
        (code_in_the_tokenizer, "no such code is run"),
        (lambda folder: edit(folder / "config.json", quantization_config=[]), "has another form than transformers"),
        (
            lambda folder: edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
            "its weights are quantised already",
        ),
        (pickled([1, 2, 3]), "could not be read from this folder"),
        (pickled(Planted()), "holds more than tensors, and nothing of it is run; save the model as safetensors"),
        (saved_by_torch, "holds more than tensors, and nothing of it is run; save the model as safetensors"),
    ],
)
def test_a_model_that_cannot_be_trained_is_one_line(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    assert message in refused(folder)


def test_a_token_beyond_the_embedding_is_refused_for_classes_too(folder: Path) -> None:
    with_small_embedding(folder)
    classes = {"name": "classification", "classes": ["Ann", "Bo", "Cleo", "Dov"]}
    data = {"client_column": "none", "partition": {"kind": "iid", "clients": 2}, "response_column": "who"}
    line = refused(folder, objective=classes, data=data, algorithm={"name": "fedavg"}, evaluation={"per_client": False})
    assert "and the embedding has 100 rows; give the tokenizer that belongs to the model" in line


def test_texts_and_packed_rows_longer_than_the_positions_are_refused_by_show_too(folder: Path) -> None:
    prompt = {"name": "fedprompt", "virtual_tokens": 20}
    for command in ("run", "show"):
        line = refused(folder, command, text={"max_tokens": 2049})
        assert "text.max_tokens=2049: model" in line and "has 2,048 positions; set max_tokens to at most 2,048" in line
        line = refused(folder, command, text={"max_tokens": 2040}, algorithm=prompt)
        assert "positions, 20 of which a learned prompt takes; set max_tokens to at most 2,028" in line
        line = refused(folder, command, evaluation={"metrics": ["rouge-l"], "max_new_tokens": 2048})
        assert "evaluation.max_new_tokens=2048: must be less than the model's 2048 positions" in line
    gpt_neo = models.LanguageModel("neo", tiny_instance("gpt_neo"), models.load("tiny").tokenizer, None)
    models.save_folder(gpt_neo, folder.parent / "neo")
    line = refused(folder.parent / "neo", text={"max_tokens": 64, "packed": True})
    assert "a packed row has up to 256 tokens, and GPTNeoForCausalLM reads at most 64" in line
