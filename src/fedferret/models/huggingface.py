"""Any causal language model or encoder that transformers can load, from a folder or by its name on the hub.

Each function is given what the architecture must be: causal to model language, or a reader of text to classify.
Weights are fp32 unless bf16 is asked for: Ferret's updates are far below the rounding step of half precision. Missing
weights are an error, where transformers would initialise them at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fedferret.core.errors import UserError
from fedferret.models.quiet import quiet_transformers
from fedferret.models.stored_integers import integer_weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Dtype: TypeAlias = Literal["fp32", "bf16"]
Requirement = Callable[[str, Mapping[str, Any]], None]
"""Is called with a model's name and configuration, and raises UserError unless the architecture serves."""

_SURELY_CAUSAL = "ForCausalLM"
_OTHER_INPUTS = ("vision_config", "audio_config")  # of models that read more than text
_ADAPTER = "adapter_config.json"  # peft's; transformers would attach the adapter and freeze the rest
_IN_PYTHONS_WORDS = (TypeError, AttributeError, LookupError, AssertionError)  # they tell a user nothing
_MOST_LAYERS = 1_000
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def require_causal(name: str, config: Mapping[str, Any]) -> None:
    """Check that an architecture predicts each token from the tokens before it.

    Args:
        name: of the model, for the message.
        config: the content of its ``config.json``.

    Raises:
        UserError: if it does not.
    """
    _refuse_other_inputs(name, config)
    architectures = config.get("architectures") or []
    if any(architecture.endswith(_SURELY_CAUSAL) for architecture in architectures):
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
    whole = bool(config.get("is_encoder_decoder"))  # without a name that says it is the decoder alone
    if whole or not attends_backwards(config) or (architectures and known not in architectures):
        raise UserError(
            f'model "{name}": architecture {_described(config)} is not a causal language model; '
            "give a model with an architecture named ...ForCausalLM (Llama, Qwen, Gemma, GPT-2, ...)"
        )


def require_reader(name: str, config: Mapping[str, Any]) -> None:
    """Check that an architecture reads text, and that one pass gives a hidden state for each token.

    Args:
        name: of the model, for the message.
        config: the content of its ``config.json``.

    Raises:
        UserError: if it does not.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    _refuse_other_inputs(name, config)
    kind = str(config.get("model_type"))
    encodes = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if not (encodes or attends_backwards(config)) or config.get("is_encoder_decoder"):
        raise UserError(
            f'model "{name}": architecture {_described(config)} cannot classify texts; '
            "give an encoder (BERT, RoBERTa, DistilBERT, ...) or a causal language model (Llama, GPT-2, ...)"
        )


def _refuse_other_inputs(name: str, config: Mapping[str, Any]) -> None:
    if any(config.get(part) for part in _OTHER_INPUTS):
        raise UserError(
            f'model "{name}": architecture {_described(config)} reads images or sound beside text; give a model of '
            f"text alone (Llama, Qwen, Gemma, GPT-2, ...)"
        )


def attends_backwards(config: Mapping[str, Any]) -> bool:
    """Whether each token of an architecture sees the tokens before it alone, as in causal language models.

    Args:
        config: the content of its ``config.json``.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = str(config.get("model_type"))
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # BERT's attention is bidirectional unless is_decoder is set
        return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and bool(config.get("is_decoder"))
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def check_source(name: str, require: Requirement = require_causal) -> None:
    """Check a name without a network; at most a ``config.json`` is read.

    Args:
        name: a folder, or a name on the hub.
        require: what a folder's architecture must be.
    Raises:
        UserError: if ``name`` is neither a folder with such a model nor a valid hub name.
    """
    config = folder_config(name)
    if config is not None:
        require(name, config)


def folder_config(name: str) -> dict[str, Any] | None:
    """The content of a folder's ``config.json``.

    Args:
        name: a folder, or a name on the hub.
    Returns:
        None for a name on the hub, which is not asked.
    Raises:
        UserError: if ``name`` is neither a folder with a configuration nor a valid hub name.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if not _HUB_NAME.fullmatch(name):
            raise UserError(f'model "{name}": there is no such folder, and this is not a valid hub name (OWNER/NAME)')
        return None
    path = folder / "config.json"
    if (folder / _ADAPTER).is_file():
        what = "an adapter beside a base" if path.is_file() else "an adapter alone"
        raise UserError(
            f'model "{name}": {what} is in this folder; give a folder with the base alone, or with the adapter merged '
            f"into it (peft's merge_and_unload)"
        )
    if not path.is_file():
        raise UserError(f'model "{name}": no config.json there; give a folder in Hugging Face\'s format')
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'model "{name}": its config.json is not JSON ({error})') from None
    kinds = config.get("architectures") or [] if isinstance(config, dict) else None
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f'model "{name}": its config.json is no configuration; fetch or save the folder again')
    found: dict[str, Any] = config
    _refuse_what_is_not_read(name, found)
    return found


def _refuse_what_is_not_read(name: str, config: Mapping[str, Any]) -> None:
    """Refuse an architecture that is code in the folder alone, of which nothing is run, and weights that are codes.

    Raises UserError.
    """
    if config.get("quantization_config"):
        raise UserError(
            f'model "{name}": its weights are quantised already (quantization_config); give the model in full '
            f'precision, and set model.quantised = "4-bit" or "8-bit"'
        )
    if not config.get("auto_map"):
        return
    from transformers import CONFIG_MAPPING

    if str(config.get("model_type")) not in CONFIG_MAPPING:
        raise UserError(
            f'model "{name}": architecture {_described(config)} is code that comes with the model (auto_map), and no '
            f"such code is run; give a model of an architecture that transformers has"
        )


def folder_has_chat_template(folder: Path) -> bool:
    """Whether a folder in Hugging Face's format holds a chat template, in any place where transformers looks.

    True where ``tokenizer_config.json`` cannot be read.
    """
    if any(
        (folder / name).exists() for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    ):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading the tokenizer reports the cause
        return True
    return bool(isinstance(settings, dict) and settings.get("chat_template"))


def read_config(name: str, require: Requirement = require_causal) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        name: a folder, or a name on the hub.
        require: what the architecture must be.
    Raises:
        UserError: if the configuration cannot be read, or is not that of such a model.
    """
    from transformers import AutoConfig

    check_source(name, require)
    with one_line(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(_source(name), trust_remote_code=False)
    require(name, config.to_dict())
    _check_sizes(name, config)
    return config


def _check_sizes(name: str, config: PretrainedConfig) -> None:
    """Refuse a configuration without a layer, or with more than any model has, which would take hours to lay out."""
    sizes = config.get_text_config()
    for size, most in (("num_hidden_layers", _MOST_LAYERS), ("hidden_size", 2**24), ("vocab_size", 2**28)):
        value = getattr(sizes, size, None)
        if isinstance(value, int) and not 1 <= value <= most:
            raise UserError(
                f'model "{name}": {size} is {value:,} in its config.json; give 1 to {most:,}, or fetch the folder again'
            )


def read_model(name: str, dtype: Dtype = "fp32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, as stored.

    Args:
        name: a folder, or a name on the hub.
        dtype: of the weights; values that it has not are rounded to the nearest.
    Returns:
        The model, on the CPU, and its tokenizer.
    Raises:
        UserError: if either cannot be read, the model is not causal, or weights are missing or misshapen.
    """
    from transformers import AutoModelForCausalLM

    return _read(name, AutoModelForCausalLM, read_config(name), unread="", dtype=dtype)


def read_encoder(name: str, config: PretrainedConfig, pooled: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformer without an output head, and its tokenizer, as stored.

    Args:
        name: a folder, or a name on the hub.
        config: of the model, from ``read_config``.
        pooled: whether the weights of the architecture's pooler are needed.
    Returns:
        The model, fp32 on the CPU, and its tokenizer.
    Raises:
        UserError: if either cannot be read, or weights are missing or misshapen.
    """
    from transformers import AutoModel

    return _read(name, AutoModel, config, unread="" if pooled else "pooler.")


def _read(
    name: str, auto: Any, config: PretrainedConfig, unread: str, dtype: Dtype = "fp32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; weights that begin with ``unread`` may be missing."""
    import torch
    from transformers import AutoTokenizer

    # weights that may be missing are drawn by transformers
    with one_line(name), quiet_transformers(), torch.random.fork_rng(devices=[]):
        tokenizer = AutoTokenizer.from_pretrained(_source(name), trust_remote_code=False)
        loaded: Any = auto.from_pretrained(
            _source(name),
            config=config,
            dtype="float32" if dtype == "fp32" else "bfloat16",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below as an error
            output_loading_info=True,
        )
    model, report = loaded
    if getattr(model, "_hf_peft_config_loaded", False):  # of a name on the hub; a folder's adapter is found earlier
        raise UserError(f'model "{name}": it holds an adapter beside a base; give the base alone')
    missing = sorted(key for key in report["missing_keys"] if not (unread and key.startswith(unread)))
    unusable = missing + sorted(key for key, *_shapes in report["mismatched_keys"])
    if missing and all(key.startswith("pooler.") for key in unusable):
        raise UserError(
            f'model "{name}": its pooler has no weights ({unusable[0]}), so pooling "cls" cannot be used; '
            f'give pooling = "mean"'
        )
    if whole := integer_weight(_folder(name), (parameter for parameter, _ in model.named_parameters())):
        kind = "complex numbers" if "(c" in whole else "whole numbers, so codes of a quantised model"
        raise UserError(f'model "{name}": its weights {whole} are {kind}; give the model in full precision')
    numberless = {_without_numbers(key) for key in model.state_dict()}
    left = sorted(key for key in report["unexpected_keys"] if _without_numbers(key) in numberless)
    if left:
        raise UserError(
            f'model "{name}": {len(left)} of its weights are of layers that its config.json does not count, the first '
            f"is {left[0]}; fetch or save the folder again"
        )
    modules = {key.rpartition(".")[0] for key in model.state_dict()}
    unread_parts = sorted(key for key in report["unexpected_keys"] if key.rpartition(".")[0] in modules)
    if unread_parts:  # a bias or a scale, without which the module computes something else
        raise UserError(
            f'model "{name}": {len(unread_parts)} of its weights belong to modules that by its config.json have no '
            f"such part, the first is {unread_parts[0]}; fetch or save the folder again, in full precision"
        )
    if unusable:
        raise UserError(
            f'model "{name}": {len(unusable)} of its weights are missing or differ in shape from its config.json, '
            f"the first is {unusable[0]}; fetch or save the folder again"
        )
    return model, tokenizer


def _without_numbers(key: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", key)


def _pointer(folder: Path) -> str:
    """The first file of a folder that Git LFS has not fetched; "" where there is none."""
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            return path.name
    return ""


def _source(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder) if folder.exists() else name


def _folder(name: str) -> Path:
    """Where a model's files are, once it was read."""
    from transformers.utils.hub import cached_file

    found = cached_file(_source(name), "config.json", local_files_only=True)
    assert found is not None  # it raises otherwise
    return Path(found).parent


def _described(config: Mapping[str, Any]) -> str:
    """An architecture in words."""
    return ", ".join(config.get("architectures") or []) or f"of model type {config.get('model_type')}"


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turn whatever transformers, the hub, torch and safetensors raise for a bad source into a UserError of one line.

    Args:
        name: of the model, for the message.
    """
    where = "this folder" if Path(name).expanduser().exists() else "the Hugging Face hub (no such folder here)"
    try:
        yield
    except UserError:
        raise
    except UnpicklingError as error:
        raise UserError(
            f'model "{name}": could not be read from {where}: its weights are a damaged pickle, or one that holds more '
            f"than tensors, and nothing of it is run; save the model as safetensors"
        ) from error
    except Exception as error:  # none of them promises which
        reason = " ".join(str(error).split()) or type(error).__name__
        if pointer := _pointer(Path(name).expanduser()):
            reason = f"{pointer} is a pointer of Git LFS and not the file itself: fetch that with `git lfs pull`"
        elif "custom code" in reason:
            reason = "its tokenizer or architecture is code that comes with the model, and no such code is run"
        elif isinstance(error, _IN_PYTHONS_WORDS):
            reason = "a file in it is damaged, or has another form than transformers writes; fetch or save it again"
        raise UserError(f'model "{name}": could not be read from {where}: {reason[:300]}') from error
