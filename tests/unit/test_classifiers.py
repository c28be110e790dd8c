"""Classifiers by name: features and a head, the same bits every time, padding ignored; errors are one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedferret.models as models
from fedferret.core import tree
from fedferret.core.keys import Key
from fedferret.models.adapters import ALL_LINEAR, LoRA, factors
from fedferret.models.tiny import tiny_encoder, tiny_encoder_tokenizer
from unit.classifying import LONG, SHORT, logits, one_line, tokens

TEXTS = [
    ("tiny", "last"),
    ("tiny", "mean"),
    ("tiny-encoder", "cls"),
    ("tiny-encoder", "mean"),
    ("tiny-encoder", "last"),
]
MADE_HERE = ["tiny", "tiny-encoder", "lenet5", "conv4"]


def shapes(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...], bool]]:
    """Parameters in their order, then buffers that are stored."""
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return [(name, state.pop(name), kept) for name, kept in trained.items()] + [
        (*item, False) for item in state.items()
    ]


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pooling"), [*TEXTS, ("lenet5", None), ("conv4", None)])
def test_a_skeleton_has_the_loaded_models_names_and_shapes(name: str, pooling: str | None) -> None:
    loaded, skeleton = models.classifier(name, 3, pooling), models.classifier_skeleton(name, 3, pooling)
    assert shapes(skeleton) == shapes(loaded.model)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training and not skeleton.training
    names = [name for name, _ in loaded.model.named_parameters()]
    assert [name for name in names if name.startswith("head.")] == names[-1:] if name == "tiny" else names[-2:]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tiny", 90_624 + 640),
        ("tiny-encoder", 120_704 + 650),
        ("lenet5", 61_706),
        ("conv4", 1_932_874),
        ("packaged:minilm", 22_565_376 + 3_850),
        ("packaged:smollm2", 134_515_008 + 5_760),
        ("packaged:efficientnet-lite0", 3_371_008 + 12_810),
    ],
)
def test_a_classifier_of_ten_classes_has_as_many_parameters_as_the_docs_say(name: str, count: int) -> None:
    assert (
        sum(math.prod(shape) for _, shape, trained in shapes(models.classifier_skeleton(name, 10)) if trained) == count
    )


@pytest.mark.parametrize("name", MADE_HERE)
def test_the_global_generator_is_as_before_and_the_bits_are_the_same(name: str) -> None:
    before = torch.get_rng_state()
    first = tree.fingerprint(models.classifier(name, 3).model.state_dict())
    models.classifier_skeleton(name, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert tree.fingerprint(models.classifier(name, 3).model.state_dict()) == first


def test_a_heads_first_values_depend_on_nothing_but_its_shape_and_are_torchs_for_a_linear_layer() -> None:
    causal, encoder = models.classifier("tiny", 3).model.head, models.classifier("tiny-encoder", 3).model.head
    assert torch.equal(causal.weight, encoder.weight)
    assert causal.bias is None and encoder.bias.tolist() == [0, 0, 0]
    wide = models.classifier("tiny", 900).model.head.weight
    assert wide.abs().max() < 1 / 8 and abs(wide.std() * 8 * math.sqrt(3) - 1) < 0.02


def test_a_relu_networks_first_values_are_hes() -> None:
    body = models.classifier("conv4", 10).model.body
    for name, parameter in body.named_parameters():
        if parameter.ndim == 1:
            assert not parameter.any()
        else:
            bound = math.sqrt(6 / math.prod(parameter.shape[1:]))
            assert parameter.abs().max() <= bound and abs(parameter.std() * math.sqrt(3) / bound - 1) < 0.1, name


# --- pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pooling"), TEXTS)
def test_padding_changes_no_logits(name: str, pooling: str) -> None:
    loaded = models.classifier(name, 3, pooling)
    alone, batch = tokens(loaded, SHORT), tokens(loaded, SHORT, LONG)
    torch.testing.assert_close(logits(loaded, batch)[:1], logits(loaded, alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "tiny-encoder"])
@pytest.mark.parametrize("pad", [0, 2, 70])
def test_pooling_last_ignores_padding_whatever_the_pad_id(name: str, pad: int) -> None:
    loaded = models.classifier(name, 3, "last")
    ids = torch.tensor([[70, 0, 2, 71, 70]])  # the pad token is the last of the text, and inside it
    filled = torch.cat((ids, torch.full((1, 4), pad)), dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 4])
    alone = loaded.model.features(SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids)))
    padded = loaded.model.features(SimpleNamespace(input_ids=filled, attention_mask=mask))
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-5)
    last = loaded.model.encoder(input_ids=ids).last_hidden_state[:, -1]
    torch.testing.assert_close(alone, last, atol=1e-6, rtol=1e-5)


def test_each_pooling_takes_what_it_says_and_no_weight_is_left_without_a_gradient() -> None:
    for pooling in ("cls", "mean", "last"):
        loaded = models.classifier("tiny-encoder", 3, pooling)
        batch = tokens(loaded, SHORT, SHORT)
        output = loaded.model.encoder(**batch)
        hidden = output.last_hidden_state
        expected = {"cls": output.pooler_output, "mean": hidden.mean(dim=1), "last": hidden[:, -1]}[pooling]
        torch.testing.assert_close(loaded.model.features(batch), expected)
        loaded.model(batch).logsumexp(dim=1).sum().backward()
        assert all(parameter.grad is not None for parameter in loaded.model.parameters()), pooling


@pytest.mark.parametrize(("name", "pooling"), [("tiny", "last"), ("tiny-encoder", "cls")])
def test_the_pooling_of_a_model_is_stated(name: str, pooling: str) -> None:
    loaded = models.classifier(name, 3)
    assert loaded.pooling == pooling
    assert loaded.max_tokens == {"tiny": 2048, "tiny-encoder": 512}[name]


def test_an_empty_text_is_read() -> None:
    for pooling in ("cls", "mean", "last"):
        loaded = models.classifier("tiny-encoder", 3, pooling)
        assert logits(loaded, tokens(loaded, "")).isfinite().all()


# --- what is tuned ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE_HERE)
def test_a_frozen_classifier_tunes_its_head_alone(name: str) -> None:
    model = models.classifier(name, 3).model
    model.freeze()
    assert set(tree.parameters(model)) == {f"head.{part}" for part in dict(model.head.named_parameters())}


def test_all_linear_modules_leave_the_head_out() -> None:
    model = models.classifier("tiny-encoder", 3).model
    LoRA(rank=2, alpha=4, modules=ALL_LINEAR).attach(model, Key.of(0, "lora"))
    assert "encoder.pooler.dense" in factors(model) and "head" not in factors(model)


def test_activations_are_recomputed_to_the_same_gradients() -> None:
    from fedferret.local.recomputing import recomputed

    gradients = []
    for enabled in (False, True):
        loaded = models.classifier("tiny-encoder", 3)
        with recomputed(loaded.model, enabled):
            loaded.model(tokens(loaded, SHORT, LONG)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in loaded.model.named_parameters()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name]) for name in gradients[0])
    with recomputed(models.classifier("lenet5", 3).model, True):
        pass


@pytest.mark.parametrize(("name", "pooling"), TEXTS)
def test_plain_sgd_learns_a_word(name: str, pooling: str) -> None:
    loaded = models.classifier(name, 2, pooling)
    batch = tokens(loaded, "good abc", "bad abcdef", "good a", "bad bcd")
    labels, losses = torch.tensor([1, 0, 1, 0]), []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(loaded.model(batch), labels)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    assert losses[-1] < 0.2 * losses[0]


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lenet5", "conv4"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 28, 28), (3, 40, 30)])
def test_images_of_any_size_and_either_number_of_channels_are_read(name: str, shape: tuple[int, ...]) -> None:
    loaded = models.classifier(name, 4)
    pixels = Key.of(1).uniform(2 * math.prod(shape)).float().view(2, *shape)
    both = logits(loaded, SimpleNamespace(pixels=pixels))
    assert both.shape == (2, 4) and both.isfinite().all()
    torch.testing.assert_close(both[:1], logits(loaded, SimpleNamespace(pixels=pixels[:1])), atol=1e-5, rtol=1e-5)


def test_a_grey_image_has_one_brightness_in_one_channel_and_in_three() -> None:
    loaded = models.classifier("lenet5", 4)
    grey = Key.of(2).uniform(784).float().view(1, 1, 28, 28)
    colours = SimpleNamespace(pixels=grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(logits(loaded, colours), logits(loaded, SimpleNamespace(pixels=grey)), atol=1e-5, rtol=0)


def test_pixels_are_normalised_to_minus_one_and_one() -> None:
    model = models.classifier("lenet5", 4).model
    for value in (0.0, 1.0):
        prepared = model.prepared(torch.full((1, 1, 8, 8), value))
        assert prepared.shape == (1, 1, 28, 28) and torch.allclose(prepared, torch.tensor(2 * value - 1))


def test_images_with_another_number_of_channels_are_refused() -> None:
    loaded = models.classifier("lenet5", 4)
    assert "4 channels" in one_line(lambda: logits(loaded, SimpleNamespace(pixels=torch.zeros(1, 4, 8, 8))))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pooling", "images", "message"),
    [
        ("lenet5", None, False, "reads images"),
        ("packaged:efficientnet-lite0", None, False, "reads images"),
        ("tiny-encoder", None, True, "reads no images"),
        ("lenet", None, True, 'did you mean "lenet5"?'),
        ("lenet5", "mean", True, "no pooling"),
        ("tiny", "cls", False, "the first token sees no other"),
        ("packaged:smollm2", "cls", False, "the first token sees no other"),
        ("tiny-encoder", "meen", False, 'did you mean "mean"?'),
        ("owner/name", "meen", False, 'did you mean "mean"?'),
        ("packaged:minilmm", None, False, 'did you mean "packaged:minilm"?'),
        ("./no/such/folder", None, False, "no such folder"),
    ],
)
def test_a_model_that_cannot_classify_the_data_is_refused_before_any_work(
    name: str, pooling: str | None, images: bool, message: str
) -> None:
    assert message in one_line(lambda: models.check_classifier(name, pooling, images))


def test_what_fits_is_accepted() -> None:
    for name, pooling in [*TEXTS, ("packaged:minilm", None), ("owner/name", None), ("packaged:smollm2", "mean")]:
        models.check_classifier(name, pooling, images=False)
    for name in ("lenet5", "conv4", "packaged:efficientnet-lite0"):
        models.check_classifier(name, None, images=True)


@pytest.mark.parametrize("name", ["tiny-encoder", "lenet5", "conv4", "packaged:minilm", "packaged:efficientnet-lite0"])
def test_a_model_that_only_classifies_is_no_language_model(name: str) -> None:
    for action in (models.check, models.load):
        assert name in one_line(lambda action=action: action(name))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny encoder in Hugging Face's format, which a test may damage."""
    tiny_encoder(Key.of(0, "tiny-encoder")).save_pretrained(tmp_path / "encoder")
    tiny_encoder_tokenizer().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_folder_with_an_encoder_is_the_encoder(folder: Path) -> None:
    for pooling in ("cls", "mean"):
        stored, made = models.classifier(str(folder), 3, pooling), models.classifier("tiny-encoder", 3, pooling)
        assert shapes(stored.model) == shapes(made.model) == shapes(models.classifier_skeleton(str(folder), 3, pooling))
        assert torch.equal(logits(stored, tokens(stored, SHORT)), logits(made, tokens(made, SHORT)))
        assert stored.folder == folder


def test_a_folder_with_a_causal_model_is_the_causal_model(tmp_path: Path) -> None:
    models.save_folder(models.load("tiny"), tmp_path / "causal")
    stored, made = models.classifier(str(tmp_path / "causal"), 3), models.classifier("tiny", 3)
    assert stored.pooling == "last"
    assert torch.equal(logits(stored, tokens(stored, SHORT)), logits(made, tokens(made, SHORT)))


def test_a_pooler_without_weights_is_refused_where_it_is_read_and_never_drawn(folder: Path) -> None:
    weights = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if not name.startswith("pooler.")}
    save_file(kept, weights, {"format": "pt"})
    message = one_line(lambda: models.classifier(str(folder), 3))
    assert "pooler" in message and 'pooling = "mean"' in message
    before = torch.get_rng_state()
    models.classifier(str(folder), 3, "mean")
    assert torch.equal(torch.get_rng_state(), before)
    kept.pop("encoder.layer.0.output.dense.weight")
    save_file(kept, weights, {"format": "pt"})
    assert "encoder.layer.0.output.dense.weight" in one_line(lambda: models.classifier(str(folder), 3, "mean"))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("T5ForConditionalGeneration", "t5"), ("BartModel", "bart"), ("ViTModel", "vit"), ("Wav2Vec2Model", "wav2vec2")],
)
def test_an_architecture_that_reads_no_text_in_one_pass_is_refused(folder: Path, architecture: str, kind: str) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": kind}))
    for action in (
        lambda: models.classifier(str(folder), 3),
        lambda: models.classifier_skeleton(str(folder), 3),
    ):
        message = one_line(action)
        assert str(folder) in message and architecture in message and "cannot classify texts" in message


@pytest.mark.parametrize("edit", [{"hidden_size": {}}, {"text_config": {"a": 1}}, {"num_attention_heads": 0}])
def test_a_configuration_of_another_form_is_one_line(folder: Path, edit: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    for action in (models.classifier, models.classifier_skeleton):
        assert str(folder) in one_line(lambda action=action: action(str(folder), 3))


def test_the_limit_of_tokens_is_that_of_positions_where_a_tokenizer_states_none(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        RobertaModel(config).save_pretrained(tmp_path)
    tokenizer = tiny_encoder_tokenizer()
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path)
    loaded = models.classifier(str(tmp_path), 3)
    assert loaded.max_tokens == 10  # positions 0 and 1 are those of padding
    ids = torch.full((1, 10), 70)
    assert logits(loaded, SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))).isfinite().all()
