"""Loads a classifier by its model's name: an encoder, a causal language model or an image model, and a new head.

The head's first values are uniform in ±1/√H by a key that depends on nothing but the word "head", with bias 0. So all
runs with the same number of features and classes begin with the same head, whatever their seed. A causal model's head
has no bias, because transformers' has none. The head is the last of the model's parameters: ``head.weight`` and
``head.bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedferret.core.errors import UserError, nearest
from fedferret.core.imports import quick_imports
from fedferret.core.keys import Key
from fedferret.models.catalogue import IMAGE_MODELS, PACKAGED, TINY_ENCODER
from fedferret.models.classifiers import POOLINGS, Classifier, ImageClassifier, TextClassifier
from fedferret.models.devices import resolve_device
from fedferret.models.drawing import draw_relu_network, draw_uniform
from fedferret.models.huggingface import attends_backwards, folder_config, one_line, read_encoder, require_reader
from fedferret.models.images import MODELS
from fedferret.models.loading import configuration, prepare
from fedferret.models.packaged import describe, ensure
from fedferret.models.positions import position_limit
from fedferret.models.small import small_model, small_tokenizer
from fedferret.models.tiny import tiny_encoder, tiny_encoder_tokenizer, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_UNLIMITED = 10**9  # tokenizers without a limit state more


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier with its tokenizer.

    Attributes:
        name: of the model, as the user gave it.
        model: the classifier, fp32 and in evaluation mode.
        tokenizer: pads on the right; None where the model reads images.
        folder: where the model was read from, if from a local folder.
        pooling: "cls", "mean" or "last"; None where the model reads images.
    """

    name: str
    model: Classifier
    tokenizer: PreTrainedTokenizerBase | None
    folder: Path | None
    pooling: str | None

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a text that the model can read; None where there is no limit, or no text."""
        if not isinstance(self.model, TextClassifier):
            return None
        encoder: Any = self.model.encoder
        limits = [getattr(self.tokenizer, "model_max_length", None), position_limit(encoder)]
        return min((limit for limit in limits if limit is not None and limit < _UNLIMITED), default=None)


def check_classifier(name: str, pooling: str | None, images: bool) -> None:
    """Check that a model can classify the data at hand, without reading weights or using a network.

    Args:
        name: as in a recipe.
        pooling: "cls", "mean" or "last"; None takes the model's own.
        images: whether the data are images.

    Raises:
        UserError: if there is no such model, it reads other data, or the pooling does not fit.
    """
    if name in IMAGE_MODELS:
        if not images:
            raise UserError(f'model "{name}": it reads images, and the data are texts; give a model that reads text')
        _no_pooling(name, pooling)
        return
    if images:
        raise UserError(f'model "{name}": it reads no images, and the data are images; {nearest(name, IMAGE_MODELS)}')
    config = _known_config(name)
    require_reader(name, config)
    _fitting(name, pooling, config)


def own_pooling(name: str) -> str | None:
    """The pooling that a model is loaded with unless another is asked for, without reading weights.

    Args:
        name: as in a recipe.

    Returns:
        "cls", "mean" or "last"; None where the model reads images, or is on the hub, which is not asked.

    Raises:
        UserError: there is no such model.
    """
    local = name.startswith(PACKAGED) or name in ("tiny", "small", TINY_ENCODER)
    if name in IMAGE_MODELS or not (local or folder_config(name)):
        return None
    config = _known_config(name)
    require_reader(name, config)
    return _fitting(name, None, config)


def _known_config(name: str) -> Mapping[str, Any]:
    """A text model's configuration as far as it is known without a network."""
    if name.startswith(PACKAGED):
        return describe(name).config
    if name in ("tiny", "small", TINY_ENCODER):
        return {"model_type": "bert" if name == TINY_ENCODER else "llama"}
    return folder_config(name) or {"model_type": "bert"}  # on the hub: only the pooling's name can be checked


def classifier(
    name: str,
    num_classes: int,
    pooling: str | None = None,
    *,
    device: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
) -> LoadedClassifier:
    """Load a classifier. No global generator advances.

    Args:
        name: as in a recipe; see :func:`catalogue`.
        num_classes: C.
        pooling: "cls", "mean" or "last"; None takes "last" for a causal model, "mean" for ``packaged:minilm``, else
            "cls". Image models have none.
        device: "cpu", "cuda", "cuda:<number>", "mps" or "auto".
        log: is called with a line before each step that takes seconds (download, conversion).

    Returns:
        The classifier, fp32 on the device and in evaluation mode, with its tokenizer.

    Raises:
        UserError: for an unknown name, a model that cannot classify, an unreachable hub, an absent device.
        RunError: if a packaged model's digest differs from the pinned one.
    """
    target = resolve_device(device)
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: Path | None = None
    model: Classifier
    if name in IMAGE_MODELS:
        _no_pooling(name, pooling)
        with torch.random.fork_rng(devices=[]):  # torch initialises layers
            model = _image_classifier(name, num_classes)
        if name.startswith(PACKAGED):
            folder = ensure(name, log)
            _read_body(model, folder)
        else:
            draw_relu_network(model.body, Key.of(0, name))
    else:
        config = configuration(name, require_reader)
        pooling = _fitting(name, pooling, config.to_dict())
        encoder, tokenizer, folder = _encoder(name, config, pooling, log)
        prepare(name, encoder, tokenizer)
        with one_line(name):
            model = _text_classifier(encoder, config, num_classes, pooling)
    draw_uniform(model.head.weight, 1 / model.head.in_features, Key.of(0, "head"))
    if model.head.bias is not None:
        nn.init.zeros_(model.head.bias)
    return LoadedClassifier(name, model.to(target).eval(), tokenizer, folder, pooling)


def classifier_skeleton(name: str, num_classes: int, pooling: str | None = None) -> Classifier:
    """Build a classifier without its weights; nothing is downloaded but a hub model's ``config.json``.

    Args:
        name: as in a recipe.
        num_classes: C.
        pooling: as in :func:`classifier`.

    Returns:
        A classifier on the meta device, in evaluation mode: modules and shapes, no values.

    Raises:
        UserError: for an unknown name, a model that cannot classify, an unreachable hub.
    """
    if name in IMAGE_MODELS:
        _no_pooling(name, pooling)
        with torch.device("meta"):
            return _image_classifier(name, num_classes).eval()
    with quick_imports():
        from transformers import AutoModel

        config = configuration(name, require_reader)
        pooling = _fitting(name, pooling, config.to_dict())
        with one_line(name), torch.device("meta"):
            encoder = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
            return _text_classifier(encoder, config, num_classes, pooling).eval()


def _no_pooling(name: str, pooling: str | None) -> None:
    if pooling is not None:
        raise UserError(
            f'model "{name}": it reads images, so it has no pooling of tokens; remove pooling = "{pooling}"'
        )


def _fitting(name: str, pooling: str | None, config: Mapping[str, Any]) -> str:
    """The pooling that is used. Raises UserError for one that does not fit the architecture."""
    causal = attends_backwards(config)
    if pooling is None:
        return "last" if causal else "mean" if name == "packaged:minilm" else "cls"
    if pooling not in POOLINGS:
        raise UserError(f'pooling "{pooling}" is not known; {nearest(pooling, POOLINGS)}')
    if causal and pooling == "cls":
        raise UserError(
            f'model "{name}": in a causal model the first token sees no other, so pooling "cls" cannot be used; '
            f'give pooling = "last" or "mean"'
        )
    return pooling


def _encoder(
    name: str, config: PretrainedConfig, pooling: str, log: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Path | None]:
    """A transformer without an output head, its tokenizer, and the folder that it was read from."""
    causal: Any
    if name == TINY_ENCODER:
        return tiny_encoder(Key.of(0, name)), tiny_encoder_tokenizer(), None
    if name == "tiny":
        causal = tiny_model(Key.of(0, name))
        return causal.base_model, tiny_tokenizer(), None
    if name == "small":
        causal = small_model(Key.of(0, name))
        return causal.base_model, small_tokenizer(log), None
    local = Path(name).expanduser()
    folder = ensure(name, log) if name.startswith(PACKAGED) else local if local.exists() else None
    model, tokenizer = read_encoder(str(folder or name), config, pooled=pooling == "cls")
    return model, tokenizer, folder


def _text_classifier(encoder: nn.Module, config: PretrainedConfig, num_classes: int, pooling: str) -> TextClassifier:
    text = config.get_text_config()
    width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size  # OPT's last layer may be narrower
    with torch.random.fork_rng(devices=[]):  # torch initialises layers
        head = nn.Linear(width, num_classes, bias=not attends_backwards(config.to_dict()))
    return TextClassifier(encoder, head, pooling)


def _image_classifier(name: str, num_classes: int) -> ImageClassifier:
    made = MODELS[name]
    head = nn.Linear(made.width, num_classes)
    return ImageClassifier(made.body(), head, made.channels, made.size, made.mean, made.std)


def _read_body(model: ImageClassifier, folder: Path) -> None:
    """Read a packaged image model's weights and buffers; the head that it was trained with is left out."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    model.body.load_state_dict({name: value for name, value in stored.items() if not name.startswith("fc.")})
