"""Packaged models: exact conversion, checked digests, and a complete cache under concurrent loads.

The fast tests convert small GGUF files that they write. The tests marked slow use the real models in the real cache
and download them the first time.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import fedferret.models as models
from fedferret.core.errors import RunError, UserError
from fedferret.core.keys import Key
from fedferret.models import packaged
from fedferret.models.conversion import convert
from fedferret.models.gguf import read_gguf
from fedferret.models.packaged_models import MODELS, PackagedModel, Part

BYTES = [f"<0x{value:02X}>" for value in range(256)]
BYTE_LEVEL_TOKENS = ["<unk>", "<bos>", "<eos>", *"abcdefgh0123456789ĠĊ", "ab", "abc", "12"]
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "<b>", *BYTES, "▁", "a", "b", "c", "▁a", "bc", "▁abc"]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(BYTE_LEVEL_TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
GEMMA = LLAMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": len(PIECES),
    "head_dim": 32,
    "sliding_window": 16,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def random_model(config: dict[str, Any]) -> Any:
    """A model with keyed weights that blocks of 32 eight-bit elements represent exactly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            steps = (Key.of(0, name).uniform(parameter.numel()) * 255).floor().view(-1, 32) - 127
            steps[:, 0] = 127  # the largest element of each block sets its scale
            parameter.copy_((steps / 128).view_as(parameter))
    return model


def write_gguf(path: Path, model: Any, architecture: str) -> None:
    """Store ``model`` as llama.cpp does: tensor names, row order, Gemma's norms plus 1, matrices in eight bits."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if architecture == "llama":
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(BYTE_LEVEL_TOKENS)
        writer.add_token_types([3, 3, 3] + [1] * (len(BYTE_LEVEL_TOKENS) - 3))
        writer.add_token_merges(["a b", "ab c", "1 2"])
        writer.add_unk_token_id(0)
        writer.add_chat_template("{{ messages[0]['content'] }}")
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(PIECES)
        writer.add_token_types([3, 3, 3, 3, 4, 4] + [6] * 256 + [1] * 7)
        writer.add_token_scores([-1000.0] * 262 + [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0])
        writer.add_unk_token_id(3)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        elements = parameter.detach().numpy()
        if architecture == "gemma3" and name.endswith("norm.weight"):
            elements = elements + np.float32(1)
        if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            elements = elements.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(-1, 64)
        stored = names.get_name(name, (".weight",))
        if parameter.ndim == 1:
            writer.add_tensor(stored, np.ascontiguousarray(elements))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quantize(np.ascontiguousarray(elements), kind)
            writer.add_tensor(stored, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("architecture", "config"), [("llama", LLAMA), ("gemma3", GEMMA)])
def test_conversion_is_exact_and_repeatable(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    model = random_model(config)
    write_gguf(tmp_path / "model.gguf", model, architecture)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        convert(tmp_path / "model.gguf", tmp_path / name, config)
    converted = models.load(str(tmp_path / "first")).model
    expected = dict(model.named_parameters())
    assert expected.keys() == dict(converted.named_parameters()).keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in converted.named_parameters())
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


def test_slabs_do_not_change_the_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", random_model(LLAMA), "llama")
    tensor = read_gguf(tmp_path / "model.gguf").tensors["blk.0.ffn_up.weight"]
    (whole,) = tensor.rows()
    monkeypatch.setattr("fedferret.models.gguf._SLAB_ELEMENTS", 500)
    slabs = list(tensor.rows())
    assert len(slabs) > 1
    assert np.array_equal(np.concatenate(slabs), whole)


def test_each_digit_is_a_token_in_a_converted_byte_level_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", random_model(LLAMA), "llama")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "model.gguf", tmp_path / "out", LLAMA)
    tokenizer = models.load(str(tmp_path / "out")).tokenizer
    assert tokenizer.tokenize("abc 12<eos>") == ["abc", "Ġ", "1", "2", "<eos>"]
    assert tokenizer.chat_template
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_converted_sentence_piece_tokenizer_keeps_user_defined_tokens_and_bytes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", random_model(GEMMA), "gemma3")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "model.gguf", tmp_path / "out", GEMMA)
    tokenizer = models.load(str(tmp_path / "out")).tokenizer
    tokens = tokenizer("a abc\n\n<b>é").input_ids
    assert tokenizer.convert_ids_to_tokens(tokens) == ["<bos>", "a", "▁abc", "\n\n", "<b>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "a abc\n\n<b>é"


# --- fetching and the cache -------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model "small", installed in two parts that must not be imported, and an empty cache."""
    write_gguf(tmp_path / "model.gguf", random_model(LLAMA), "llama")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "out").mkdir()
    convert(tmp_path / "model.gguf", tmp_path / "out", LLAMA)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    for module, piece in (("small_part1", content[:1000]), ("small_part2", content[1000:])):
        (tmp_path / "site" / module).mkdir(parents=True)
        (tmp_path / "site" / module / "__init__.py").write_text("raise RuntimeError('imported')")
        (tmp_path / "site" / module / "piece").write_bytes(piece)
    model = PackagedModel(
        title="Small",
        licence="none",
        parts=(Part("small-part1", "1.0", "small_part1/piece"), Part("small-part2", "1.0", "small_part2/piece")),
        source_sha256=hashlib.sha256(content).hexdigest(),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        config=LLAMA,
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(MODELS, "small", model)
    monkeypatch.setenv("FEDFERRET_CACHE", str(tmp_path / "cache"))
    return model


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock")]


def test_an_installed_package_is_read_but_never_imported(small: PackagedModel, tmp_path: Path) -> None:
    loaded = models.load("packaged:small")
    assert not {"small_part1", "small_part2"} & sys.modules.keys()
    assert loaded.folder is not None and loaded.folder.is_relative_to(tmp_path / "cache")
    assert "small-part1==1.0, small-part2==1.0" in (loaded.folder / "NOTICE").read_text()
    assert leftovers(tmp_path / "cache") == [loaded.folder.name]


def test_a_second_load_takes_the_cached_folder(small: PackagedModel) -> None:
    lines: list[str] = []
    first = packaged.ensure("packaged:small", lines.append)
    inode = first.stat().st_ino
    assert [line.split()[0] for line in lines] == ["converting"]
    assert packaged.ensure("packaged:small", lines.append).stat().st_ino == inode
    assert len(lines) == 1


def test_concurrent_loads_build_one_folder_once(small: PackagedModel, tmp_path: Path) -> None:
    lines: list[str] = []
    folders: list[Path] = []
    load = lambda: folders.append(packaged.ensure("packaged:small", lines.append))  # noqa: E731
    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 and len(set(folders)) == 1
    assert sum(line.startswith("converting") for line in lines) == 1
    assert leftovers(tmp_path / "cache") == [folders[0].name]


def test_the_folder_of_a_killed_process_is_removed(small: PackagedModel, tmp_path: Path) -> None:
    name = packaged.ensure("packaged:small", print).name
    cache = tmp_path / "cache" / "models"
    (cache / name).rename(cache / f".{name}.abandoned")
    packaged.ensure("packaged:small", print)
    assert leftovers(tmp_path / "cache") == [name]


@pytest.mark.parametrize(("part", "offset"), [("small_part1", 500), ("small_part2", -1)])
def test_a_flipped_bit_is_refused(small: PackagedModel, tmp_path: Path, part: str, offset: int) -> None:
    piece = tmp_path / "site" / part / "piece"
    content = bytearray(piece.read_bytes())
    content[offset] ^= 1
    piece.write_bytes(content)
    with pytest.raises(RunError, match="SHA-256") as error:
        models.load("packaged:small")
    assert "small-part1==1.0" in str(error.value) and "\n" not in str(error.value)
    assert leftovers(tmp_path / "cache") == []


def test_weights_that_convert_to_other_bits_are_refused(
    small: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedferret.models.conversion._FFN_NORM", {"llama": "input_layernorm"})
    with pytest.raises(RunError, match="converted weights"):
        models.load("packaged:small")
    assert leftovers(tmp_path / "cache") == []


def test_a_package_that_cannot_be_fetched_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDFERRET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    unknown = Part("fedferret-no-such-package", "0.0.1", "fedferret_no_such_package/model.gguf")
    monkeypatch.setitem(MODELS, "small", PackagedModel("", "", (unknown,), "", "", LLAMA))
    with pytest.raises(UserError, match=r"fedferret-no-such-package==0\.0\.1") as error:
        models.load("packaged:small")
    assert "\n" not in str(error.value)
    assert leftovers(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(small: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in place of the folder")
    with pytest.raises(UserError, match="FEDFERRET_CACHE"):
        models.load("packaged:small")


# --- the real models -------------------------------------------------------------------------------------------------

PARAGRAPH = (
    "The river rises in the mountains and flows south for about two hundred miles before it reaches the sea. "
    "In spring the water is high, and the people who live along its banks move their animals to the hills."
)


def loss(language_model: models.LanguageModel, text: str) -> float:
    tokens = language_model.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(language_model.model(input_ids=tokens, labels=tokens).loss)


def continuation(language_model: models.LanguageModel, tokens: torch.Tensor, count: int) -> str:
    new = language_model.model.generate(tokens, max_new_tokens=count, do_sample=False)[0, tokens.shape[1] :]
    return str(language_model.tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.slow
def test_smollm2_is_complete() -> None:
    smollm2 = models.load("packaged:smollm2")
    assert sum(parameter.numel() for parameter in smollm2.model.parameters()) == 134_515_008
    shapes = {name: tuple(parameter.shape) for name, parameter in smollm2.model.named_parameters()}
    assert shapes == models.parameter_shapes("packaged:smollm2")
    tokenizer = smollm2.tokenizer
    text = "In 1969, 2 people  walked\ton it: naïve 😀\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert [token for token in tokenizer.tokenize("x 31415") if token.isdigit()] == list("31415")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert loss(smollm2, PARAGRAPH) < 4
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert "Paris" in continuation(smollm2, prompt["input_ids"], 12)


@pytest.mark.slow
def test_gemma3_270m_is_complete() -> None:
    gemma = models.load("packaged:gemma3-270m")
    assert sum(parameter.numel() for parameter in gemma.model.parameters()) == 268_098_176
    tokenizer = gemma.tokenizer
    text = "In 1969, 2 people   walked\t\ton it: <b>naïve</b> 😀\n\n"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert loss(gemma, PARAGRAPH) < 4
    prompt = tokenizer("Monday, Tuesday, Wednesday,", return_tensors="pt").input_ids
    assert continuation(gemma, prompt, 5).startswith(" Thursday, Friday")
