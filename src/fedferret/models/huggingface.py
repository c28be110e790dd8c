"""Any causal language model that transformers can load, from a folder or by its name on the hub.

Weights are always fp32: Ferret's updates are far below the rounding step of half precision. Missing weights are an
error, where transformers would initialise them at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import UserError
from fedferret.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SURELY_CAUSAL = "ForCausalLM"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_source(name: str) -> None:
    """Check a name without a network; at most a ``config.json`` is read.

    Args:
        name: a folder, or a name on the hub.
    Raises:
        UserError: if ``name`` is neither a folder with a causal model nor a valid hub name.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if not _HUB_NAME.fullmatch(name):
            raise UserError(f'model "{name}": there is no such folder, and this is not a valid hub name (OWNER/NAME)')
        return
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f'model "{name}": no config.json there; give a folder in Hugging Face\'s format')
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'model "{name}": its config.json is not JSON ({error})') from None
    kinds = config.get("architectures") or [] if isinstance(config, dict) else None
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f'model "{name}": its config.json is no configuration; fetch or save the folder again')
    _require_causal(name, config)


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


def read_config(name: str) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        name: a folder, or a name on the hub.
    Raises:
        UserError: if the configuration cannot be read, or is not that of a causal model.
    """
    from transformers import AutoConfig

    check_source(name)
    with one_line(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(_source(name), trust_remote_code=False)
    _require_causal(name, config.to_dict())
    return config


def read_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, as stored.

    Args:
        name: a folder, or a name on the hub.
    Returns:
        The model, fp32 on the CPU, and its tokenizer.
    Raises:
        UserError: if either cannot be read, the model is not causal, or weights are missing or misshapen.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = read_config(name)
    with one_line(name), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(_source(name), trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _source(name),
            config=config,
            dtype="float32",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below as an error
            output_loading_info=True,
        )
    model, report = loaded
    unusable = sorted(report["missing_keys"]) + sorted(key for key, *_shapes in report["mismatched_keys"])
    if unusable:
        raise UserError(
            f'model "{name}": {len(unusable)} of its weights are missing or differ in shape from its config.json, '
            f"the first is {unusable[0]}; fetch or save the folder again"
        )
    return model, tokenizer


def _source(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder) if folder.exists() else name


def _require_causal(name: str, config: dict[str, Any]) -> None:
    """Raise UserError unless the architecture predicts each token from the tokens before it."""
    architectures = config.get("architectures") or []
    if any(architecture.endswith(_SURELY_CAUSAL) for architecture in architectures):
        return
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = str(config.get("model_type"))
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    causal = known is not None and (not architectures or known in architectures)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # BERT's attention is bidirectional unless is_decoder is set
        causal = causal and bool(config.get("is_decoder"))
    if not causal:
        what = ", ".join(architectures) or f"of model type {kind}"
        raise UserError(
            f'model "{name}": architecture {what} is not a causal language model; '
            "give a model with an architecture named ...ForCausalLM (Llama, Qwen, Gemma, GPT-2, ...)"
        )


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
        raise UserError(f'model "{name}": could not be read from {where}: {reason[:300]}') from error
