"""One door to every model: a name in, a model and its tokenizer out, ready to be tuned.

Whatever the source, what comes out is the same kind of thing: fp32 weights on the device; evaluation mode, so that
dropout is off (it would draw from the global generator) while gradients flow as ever; a tokenizer that has a
padding token and pads on the right. Tied weights are one parameter.

The padding token may be the end token (SmolLM2, GPT-2): labels must be masked by length, never by token id.
For the same reason the embedding's ``padding_idx`` is cleared: torch would keep that token's row from learning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.models.catalogue import PACKAGED
from fedferret.models.devices import resolve_device
from fedferret.models.folders import build_folder
from fedferret.models.huggingface import check_source, folder_has_chat_template, read_config, read_model
from fedferret.models.packaged import describe, ensure
from fedferret.models.quiet import quiet_transformers
from fedferret.models.small import small_config, small_model, small_tokenizer
from fedferret.models.tiny import tiny_config, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer. ``name`` is as the user gave it; ``folder`` is where it was read from, if local."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None


def check(name: str, *, device: str = "cpu") -> None:
    """Raise :class:`UserError` for a model or device that cannot work, without reading weights or using a network."""
    resolve_device(device)
    if name.startswith(PACKAGED):
        describe(name)
    elif name not in ("tiny", "small"):
        check_source(name)


def has_chat_template(name: str) -> bool:
    """Whether the model ``name`` brings a chat template, as far as can be known without a network: if not, True."""
    if name.startswith(PACKAGED):
        return describe(name).has_chat_template
    folder = Path(name).expanduser()
    return folder_has_chat_template(folder) if folder.is_dir() else True


def load(name: str, *, device: str = "cpu", log: Callable[[str], None] = lambda line: None) -> LanguageModel:
    """The causal language model called ``name`` (see :func:`catalogue`), fp32 on ``device``.

    ``log`` hears, a line each, of steps that take seconds (download, conversion). No global generator moves.
    Raises :class:`UserError` for an unknown name, a model that is not causal, an unreachable hub, an absent device.
    """
    target = resolve_device(device)
    folder: Path | None = None
    model: PreTrainedModel
    if name == "tiny":
        model, tokenizer = tiny_model(Key.of(0, "tiny")), tiny_tokenizer()
    elif name == "small":
        model, tokenizer = small_model(Key.of(0, "small")), small_tokenizer(log)
    elif name.startswith(PACKAGED):
        folder = ensure(name, log)
        model, tokenizer = read_model(str(folder))
    else:
        model, tokenizer = read_model(name)
        local = Path(name).expanduser()
        folder = local if local.exists() else None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise UserError(f'model "{name}": its tokenizer has no padding, end or unknown token to pad with')
    tokenizer.padding_side = "right"
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None
    placed: PreTrainedModel = nn.Module.to(model, target)
    placed.eval()  # type: ignore[no-untyped-call]
    return LanguageModel(name, placed, tokenizer, folder)


def parameter_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The shape of every trainable parameter of the model ``name``, tied weights once, without reading weights."""
    return {parameter: tuple(tensor.shape) for parameter, tensor in skeleton(name).named_parameters()}


def skeleton(name: str) -> nn.Module:
    """The model ``name`` on the meta device: its modules and shapes, no weights.

    Needs the configuration alone: nothing is downloaded but a hub model's ``config.json``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: PretrainedConfig
    if name == "tiny":
        config = tiny_config()
    elif name == "small":
        config = small_config()
    elif name.startswith(PACKAGED):
        settings = dict(describe(name).config)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    else:
        config = read_config(name)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def save_folder(language_model: LanguageModel, folder: Path) -> None:
    """Write weights, configuration, generation settings and tokenizer as a Hugging Face folder, whole or not at all.

    Plain ``transformers`` loads it, tied weights tied. Raises :class:`UserError` if ``folder`` is not empty.
    """

    def build(temporary: Path) -> None:
        with quiet_transformers():
            language_model.model.save_pretrained(temporary)
            language_model.tokenizer.save_pretrained(temporary)

    build_folder(folder, build)
