"""Models by name: fp32, tied weights once, padding on the right, the same bits every time; errors are one line."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedferret.models as models
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models import loading
from fedferret.models.tiny import tiny_model, tiny_tokenizer

TINY_SHA256 = "585291136f85767873810717c37a708eb029502a4fbf27fd9ebe1820d9be04f0"
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def tiny() -> models.LanguageModel:
    return models.load("tiny")


@pytest.fixture
def folder(tiny: models.LanguageModel, tmp_path: Path) -> Path:
    """The tiny model saved in a folder, which a test may damage."""
    models.save_folder(tiny, tmp_path / "saved")
    return tmp_path / "saved"


def edit(path: Path, **fields: object) -> None:
    """Set fields of a JSON file; None removes a field."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_catalogue_is_read_without_torch_or_transformers() -> None:
    program = (
        "import sys, fedferret.models as models\n"
        "assert {'tiny', 'packaged:smollm2', 'packaged:gemma3-270m'} <= models.catalogue().keys()\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_exported_name_exists() -> None:
    assert all(getattr(models, name) for name in models.__all__)
    with pytest.raises(AttributeError):
        _ = models.no_such_name


# --- tiny -------------------------------------------------------------------------------------------------------------


def test_tiny_has_90624_fp32_parameters_with_the_tied_embedding_counted_once(tiny: models.LanguageModel) -> None:
    assert sum(parameter.numel() for parameter in tiny.model.parameters()) == 90_624
    assert {parameter.dtype for parameter in tiny.model.parameters()} == {torch.float32}
    assert tiny.model.get_output_embeddings().weight is tiny.model.get_input_embeddings().weight
    assert "lm_head.weight" not in dict(tiny.model.named_parameters())
    assert not tiny.model.training


def test_tiny_is_the_same_bits_on_every_machine(tiny: models.LanguageModel) -> None:
    digest = hashlib.sha256()
    for name, parameter in sorted(tiny.model.named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == TINY_SHA256


def test_tiny_weights_depend_on_the_key_and_have_the_stated_spread(tiny: models.LanguageModel) -> None:
    other = tiny_model(Key.of(1, "tiny"))
    for (name, ours), theirs in zip(tiny.model.named_parameters(), other.parameters(), strict=True):
        if ours.ndim == 1:
            assert torch.equal(ours, torch.ones_like(ours))
        else:
            assert not torch.equal(ours, theirs), name
            assert abs(ours.std().item() / 0.02 - 1) < 0.05
            assert abs(ours.mean().item()) < 5 * 0.02 / math.sqrt(ours.numel())


def test_no_load_advances_the_global_generator(folder: Path) -> None:
    before = torch.get_rng_state()
    models.load("tiny")
    models.load(str(folder))
    models.parameter_shapes("tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_tiny_starts_at_the_uniform_loss_and_learns(tiny: models.LanguageModel) -> None:
    model = models.load("tiny").model
    tokens = torch.tensor([tiny.tokenizer("the quick brown fox jumps over the lazy dog").input_ids])
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    assert abs(losses[0] - math.log(259)) < 0.1
    assert losses[-1] < losses[0] - 1


def test_right_padding_does_not_change_the_logits_of_real_positions(tiny: models.LanguageModel) -> None:
    batch = tiny.tokenizer(["a long line of text", "short"], padding=True, return_tensors="pt")
    alone = tiny.tokenizer("short", return_tensors="pt")
    with torch.no_grad():
        padded, plain = tiny.model(**batch).logits[1, :5], tiny.model(**alone).logits[0]
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-5)
    assert batch.input_ids[1].tolist()[5:] == [0] * 14


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40))
def test_tiny_tokens_are_bytes_and_decode_to_the_text(text: str) -> None:
    if not any(special in text for special in TOKENIZER.all_special_tokens):
        tokens = TOKENIZER(text).input_ids
        assert len(tokens) == len(text.encode())
        assert TOKENIZER.decode(tokens) == text


def test_a_prompt_by_the_chat_template_is_a_prefix_of_the_whole_conversation() -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    whole = TOKENIZER.apply_chat_template(turns, tokenize=False)
    prompt = TOKENIZER.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert whole == prompt + "hi<eos>\n"
    assert TOKENIZER(whole).input_ids[0] == TOKENIZER.bos_token_id


# --- folders and the hub ----------------------------------------------------------------------------------------------


def test_shapes_are_known_without_weights(tiny: models.LanguageModel, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shapes = {name: tuple(parameter.shape) for name, parameter in tiny.model.named_parameters()}
    assert models.parameter_shapes("tiny") == shapes
    assert models.parameter_shapes(str(folder)) == shapes


@pytest.mark.parametrize(("name", "count"), [("smollm2", 134_515_008), ("gemma3-270m", 268_098_176)])
def test_packaged_shapes_are_known_without_a_download(name: str, count: int) -> None:
    assert sum(map(math.prod, models.parameter_shapes(f"packaged:{name}").values())) == count


def test_a_missing_padding_token_becomes_the_end_token_and_that_token_still_learns(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None)
    edit(folder / "config.json", pad_token_id=2, tie_word_embeddings=False)
    weights = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    stored = load_file(weights)
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, weights, {"format": "pt"})
    loaded = models.load(str(folder))
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 2
    tokens = torch.tensor([[65, 2, 66, 67]])
    loaded.model(input_ids=tokens, labels=tokens).loss.backward()
    assert loaded.model.get_input_embeddings().weight.grad[2].abs().sum() > 0


def test_half_precision_folders_load_as_fp32(tiny: models.LanguageModel, tmp_path: Path) -> None:
    halved = models.LanguageModel("half", tiny_model(Key.of(2)).to(torch.bfloat16), tiny.tokenizer, None)
    models.save_folder(halved, tmp_path / "half")
    loaded = models.load(str(tmp_path / "half")).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_dropout_is_off_while_gradients_flow_and_where_activations_are_recomputed(
    tiny: models.LanguageModel, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from fedferret.local.recomputing import recomputed

    config = GPT2Config(vocab_size=259, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    assert config.resid_pdrop > 0
    gpt2 = models.LanguageModel("gpt2", GPT2LMHeadModel(config), tiny.tokenizer, None)
    models.save_folder(gpt2, tmp_path / "gpt2")
    model = models.load(str(tmp_path / "gpt2")).model
    tokens = torch.tensor([[5, 6, 7, 8]])
    first, second = (model(input_ids=tokens, labels=tokens).loss for _ in range(2))
    first.backward()
    assert first.item() == second.item()
    assert all(parameter.grad is not None for parameter in model.parameters())
    before = torch.get_rng_state()
    with recomputed(model, True):
        assert model(input_ids=tokens, labels=tokens).loss.item() == first.item()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("packaged:smollm", 'did you mean "packaged:smollm2"?'),
        ("packaged:", "no such packaged model"),
        ("./no/such/folder", "no such folder"),
        ("owner/name/more", "no such folder"),
        ("two words", "no such folder"),
    ],
)
def test_an_invalid_model_name_is_refused_before_any_work(name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        models.check(name)
    assert name in one_line(error) and message in one_line(error)


@pytest.mark.parametrize("name", ["tiny", "packaged:smollm2", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_valid_model_name_passes_the_check(name: str) -> None:
    models.check(name)


def test_a_chat_template_is_found_in_every_place_where_a_folder_may_have_it(folder: Path) -> None:
    assert (
        models.has_chat_template("tiny")
        and models.has_chat_template("packaged:smollm2")
        and models.has_chat_template(str(folder))
    )
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert not models.has_chat_template(str(folder))
    edit(folder / "tokenizer_config.json", chat_template=text)
    assert models.has_chat_template(str(folder))


def test_a_folder_without_or_with_a_broken_configuration_is_refused(folder: Path) -> None:
    models.check(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        models.check(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        models.check(str(folder))


@pytest.mark.parametrize(
    ("fields", "causal"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, False),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert"}, False),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert", "is_decoder": True}, True),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, False),
        ({"architectures": ["LlamaModel"], "model_type": "llama"}, False),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, True),
        ({"architectures": None, "model_type": "llama"}, True),
        ({"architectures": None, "model_type": "t5"}, False),
    ],
)
def test_only_causal_architectures_are_accepted(folder: Path, fields: dict[str, object], causal: bool) -> None:
    edit(folder / "config.json", **fields)
    if causal:
        models.check(str(folder))
        return
    for action in (models.check, models.load, models.parameter_shapes):
        with pytest.raises(UserError, match="not a causal language model") as error:
            action(str(folder))
        assert str(folder) in one_line(error)


def test_missing_or_damaged_weights_are_refused_and_never_initialised(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    stored = load_file(weights)
    removed = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in stored.items() if name != removed}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=removed) as error:
        models.load(str(folder))
    one_line(error)
    save_file(stored | {removed: torch.zeros(3, 3)}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="up_proj") as error:
        models.load(str(folder))
    one_line(error)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="could not be read") as error:
        models.load(str(folder))
    one_line(error)
    weights.unlink()
    with pytest.raises(UserError, match="could not be read") as error:
        models.load(str(folder))
    one_line(error)


class Planted:
    """A pickle that would run a command."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.victim}",)


def test_a_folder_is_built_without_weights_once_however_many_parameters_it_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for every parameter would take half a minute with thirty layers."""
    built, skeleton = [], loading.skeleton
    monkeypatch.setattr(loading, "skeleton", lambda name: built.append(name) or skeleton(name))
    models.load(str(folder))
    assert built == [str(folder)]


@pytest.mark.parametrize("kind", ["planted", "planted zip", "pickle of numbers", "text", "cut", "emptied"])
def test_weights_that_are_a_pickle_run_nothing_and_are_refused_in_our_words(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").unlink()
    weights, victim = folder / "pytorch_model.bin", tmp_path / "victim"
    torch.save({"w": torch.ones(9)}, weights)
    zipped = weights.read_bytes()
    if kind == "planted zip":
        torch.save({"w": Planted(victim)}, weights)
    else:
        contents = {
            "planted": pickle.dumps(Planted(victim)),
            "pickle of numbers": pickle.dumps([1, 2, 3]),
            "text": b"version https://git-lfs.github.com/spec/v1",
            "cut": zipped[:-100],
            "emptied": b"",
        }
        weights.write_bytes(contents[kind])
    with pytest.raises(UserError, match=r"could not be read from this folder|weights are missing") as refused:
        models.load(str(folder))
    assert len(one_line(refused)) < 500
    if kind.startswith("planted"):
        assert "pickle" in str(refused.value) and "safetensors" in str(refused.value)
    assert not victim.exists()


@pytest.mark.parametrize(
    "text", ["[]", "7", '{"architectures": 3}', '{"architectures": ["LlamaForCausalLM"], "hidden_size": {}}']
)
def test_a_configuration_of_another_form_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    for act in (models.check, models.skeleton, models.load):
        try:
            act(str(folder))  # type: ignore[operator]
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert act is models.check and "hidden_size" in text  # what a check does not see, loading refuses


def test_an_unreachable_hub_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Hugging Face hub") as error:
        models.load("nobody-here/nothing-here")
    assert "nobody-here/nothing-here" in one_line(error)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:99", "", "CPU"])
def test_a_device_that_this_machine_does_not_have_is_refused(device: str) -> None:
    with pytest.raises(UserError, match="device") as error:
        models.check("tiny", device=device)
    one_line(error)


def test_the_device_auto_works() -> None:
    model = models.load("tiny", device="auto").model
    assert model(input_ids=torch.tensor([[5]], device=model.device)).logits.shape == (1, 1, 259)


def test_a_tokenizer_that_merges_at_random_makes_the_same_tokens_each_time() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    merging = BPE({"<pad>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], dropout=0.5)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(merging), pad_token="<pad>")
    loading.prepare("drawing", tiny_model(Key.of(0, "tiny")), tokenizer)
    assert all(tokenizer("abababab")["input_ids"] == [3, 3, 3, 3] for _ in range(9))
