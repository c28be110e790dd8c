"""Loads any model and its tokenizer by name, ready for tuning.

Every source gives the same: fp32 weights, or bf16 where asked for, on the device; evaluation mode, so that dropout is
off (it would draw from the global generator) while gradients still flow; a tokenizer that has a padding token and pads
on the right. Tied weights are one parameter.

The padding token may be the end token (SmolLM2, GPT-2): labels must be masked by length, never by token id.
For the same reason the embedding's ``padding_idx`` is cleared: torch gives that token's row no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.imports import quick_imports
from fedferret.core.keys import Key
from fedferret.core.pooling import within
from fedferret.models.catalogue import IMAGE_MODELS, PACKAGED, TINY_ENCODER
from fedferret.models.devices import resolve_device
from fedferret.models.folders import build_folder
from fedferret.models.huggingface import (
    Dtype,
    Requirement,
    check_source,
    folder_has_chat_template,
    one_line,
    read_config,
    read_model,
    require_causal,
)
from fedferret.models.packaged import describe, ensure, is_cached
from fedferret.models.quiet import quiet_transformers
from fedferret.models.small import DONOR, small_config, small_model, small_tokenizer
from fedferret.models.tiny import tiny_config, tiny_encoder_config, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer."""

    name: str  # as the user gave it
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None  # where the model was read from, if from a local folder


def check(name: str, *, device: str = "cpu") -> None:
    """Check a model's name and a device, without reading weights or using a network.

    Args:
        name: as in a recipe.
        device: "cpu", "cuda", "cuda:<number>", "mps" or "auto".

    Raises:
        UserError: if the model or the device cannot work.
    """
    resolve_device(device)
    if name in (TINY_ENCODER, *IMAGE_MODELS):
        raise UserError(f'model "{name}": it classifies and models no language; give a causal language model')
    if name.startswith(PACKAGED):
        require_causal(name, describe(name).config)
    elif name not in ("tiny", "small"):
        check_source(name)


def is_local(name: str) -> bool:
    """Look whether a model can be loaded without a network.

    Args:
        name: as in a recipe.

    Returns:
        Whether it is made here, in the cache, or in a folder. Of a model on the hub only ``config.json`` is looked for.
    """
    made_here = ("tiny", TINY_ENCODER, *(model for model in IMAGE_MODELS if not model.startswith(PACKAGED)))
    if name in made_here or Path(name).expanduser().is_dir():
        return True
    if name == "small" or name.startswith(PACKAGED):
        return is_cached(DONOR if name == "small" else name)
    with quick_imports():
        from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return True


def has_chat_template(name: str) -> bool:
    """Look for a model's chat template, without a network.

    Args:
        name: as in a recipe.

    Returns:
        Whether there is one; True for a model on the hub, which is not asked.
    """
    if name.startswith(PACKAGED):
        return describe(name).has_chat_template
    folder = Path(name).expanduser()
    return folder_has_chat_template(folder) if folder.is_dir() else True


def load(
    name: str, *, device: str = "cpu", log: Callable[[str], None] = lambda line: None, dtype: Dtype = "fp32"
) -> LanguageModel:
    """Load a causal language model and its tokenizer. No global generator advances.

    Args:
        name: as in a recipe; see :func:`catalogue`.
        device: "cpu", "cuda", "cuda:<number>", "mps" or "auto".
        log: is called with a line before each step that takes seconds (download, conversion).
        dtype: of the weights; bf16 takes the nearest values where the checkpoint has others.

    Returns:
        The model, in ``dtype`` on the device and in evaluation mode, with its tokenizer, which pads on the right.

    Raises:
        UserError: for an unknown name, a model that is not causal, an unreachable hub, an absent device.
        RunError: if a packaged model's digest differs from the pinned one.
    """
    check(name)
    target = resolve_device(device)
    folder: Path | None = None
    model: PreTrainedModel
    if name == "tiny":
        model, tokenizer = tiny_model(Key.of(0, "tiny")), tiny_tokenizer()
    elif name == "small":
        model, tokenizer = small_model(Key.of(0, "small")), small_tokenizer(log)
    elif name.startswith(PACKAGED):
        folder = ensure(name, log)
        model, tokenizer = read_model(str(folder), dtype)
    else:
        model, tokenizer = read_model(name, dtype)
        _check_tied(name, model)
        local = Path(name).expanduser()
        folder = local if local.exists() else None
    prepare(name, model, tokenizer)
    if dtype == "bf16":  # those that were made here; buffers stay: rotations of positions need fp32
        hold_in_bf16(model)
    on_device: PreTrainedModel = nn.Module.to(model, target)
    on_device.eval()  # type: ignore[no-untyped-call]
    return LanguageModel(name, on_device, tokenizer, folder)


def prepare(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a model ready for tuning, and let its tokenizer pad on the right.

    The padding token may be the end token, so its row of the embedding learns. Dropout, of layers too, is off in
    training mode as well, which recomputing activations needs: it draws from the global generator there.

    Args:
        name: of the model, for the message.
        model: changed in place.
        tokenizer: changed in place.

    Raises:
        UserError: if the tokenizer has no token to pad with, or a weight is NaN or infinite.
    """
    _check_finite(name, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise UserError(f'model "{name}": its tokenizer has no padding, end or unknown token to pad with')
    tokenizer.padding_side = "right"
    merging: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(merging, "dropout", None):  # it would make other tokens of a text each time
        merging.dropout = None
    embedding: Any = model.get_input_embeddings()
    embedding.padding_idx = None
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in attribute:
                setattr(module, attribute, 0.0)


def _check_finite(name: str, model: PreTrainedModel) -> None:
    """Refuse weights that no training can mend. Raises UserError."""
    for parameter, weight in model.named_parameters():
        if type(weight.data) is not Tensor or not weight.is_floating_point():  # held in few bits
            continue
        if not within(weight, math.inf):
            raise UserError(
                f'model "{name}": its weights {parameter} hold NaN or infinity; fetch or save the model again'
            )


def _check_tied(name: str, model: PreTrainedModel) -> None:
    """Refuse weights that the configuration ties and the checkpoint has apart: costs would be of another model."""
    known = parameter_shapes(name)
    apart = [each for each, _ in model.named_parameters() if each not in known]
    if apart:
        raise UserError(
            f'model "{name}": its {apart[0]} differs from its embedding, and its config.json ties the two; set '
            f"tie_word_embeddings to false there, or fetch the folder again"
        )


def hold_in_bf16(model: nn.Module) -> None:
    """Round all parameters to the nearest bf16 values.

    Args:
        model: changed in place; its buffers stay.
    """
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def parameter_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters, without reading weights.

    Args:
        name: as in a recipe.

    Returns:
        The shape of every parameter by name, in the model's order; tied weights once.
    """
    return {parameter: tuple(tensor.shape) for parameter, tensor in skeleton(name).named_parameters()}


def skeleton(name: str) -> nn.Module:
    """Build a model without its weights.

    Only the configuration is needed: nothing is downloaded but a hub model's ``config.json``.

    Args:
        name: as in a recipe.

    Returns:
        A transformers causal model on the meta device: modules and shapes, no values.

    Raises:
        UserError: as ``configuration`` does.
    """
    import torch

    with quick_imports():  # a model's code is imported when it is first asked for
        from transformers import AutoModelForCausalLM

        config = configuration(name, require_causal)
        with one_line(name), torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def configuration(name: str, require: Requirement) -> PretrainedConfig:
    """The configuration of a model that reads text; nothing is downloaded but a hub model's ``config.json``.

    Args:
        name: as in a recipe.
        require: what the architecture must be.

    Returns:
        The configuration, as transformers has it.

    Raises:
        UserError: for an unknown name, another architecture, an unreachable hub.
    """
    with quick_imports():
        from transformers import AutoConfig

    made: dict[str, Callable[[], PretrainedConfig]] = {
        "tiny": tiny_config,
        "small": small_config,
        TINY_ENCODER: tiny_encoder_config,
    }
    if name in made:
        config = made[name]()
        require(name, config.to_dict())
        return config
    if name.startswith(PACKAGED):
        settings = dict(describe(name).config)
        require(name, settings)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    return read_config(name, require)


def save_folder(language_model: LanguageModel, folder: Path) -> None:
    """Write weights, configuration, generation settings and tokenizer as a Hugging Face folder.

    The folder is written completely or not at all. ``transformers`` loads it, tied weights tied.

    Args:
        language_model: what to write.
        folder: absent or empty.

    Raises:
        UserError: if ``folder`` is a file, or a folder that is not empty.
    """

    def build(temporary: Path) -> None:
        with quiet_transformers():
            language_model.model.save_pretrained(temporary)
            language_model.tokenizer.save_pretrained(temporary)

    build_folder(folder, build)
