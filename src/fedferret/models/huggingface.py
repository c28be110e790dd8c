"""Any causal language model that transformers can load, from a folder or by its name on the hub.

Weights are always fp32: an update of Ferret is far below the rounding step of half precision. Weights that the
folder lacks are an error (transformers would fill them at random).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import UserError
from fedferret.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SURELY_CAUSAL = "ForCausalLM"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_source(name: str) -> None:
    """Raise :class:`UserError` if ``name`` is neither a folder with a causal model nor a name the hub could know.

    Reads at most a ``config.json``; the hub is not asked.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if not _HUB_NAME.fullmatch(name):
            raise UserError(f'model "{name}": there is no such folder, and it is no name a hub could know (OWNER/NAME)')
        return
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f'model "{name}": no config.json there; give a folder in Hugging Face\'s format')
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f'model "{name}": its config.json is not JSON ({error})') from None
    _require_causal(name, config)


def folder_has_chat_template(folder: Path) -> bool:
    """Whether a folder in Hugging Face's format holds a chat template, in any of the places that transformers looks."""
    if any(
        (folder / name).exists() for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    ):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # reading the tokenizer will say what is wrong
        return True
    return bool(isinstance(settings, dict) and settings.get("chat_template"))


def read_config(name: str) -> PretrainedConfig:
    """The configuration of the model in folder ``name`` or on the hub; :class:`UserError` unless it is causal."""
    from transformers import AutoConfig

    check_source(name)
    with _one_line(name):
        config: PretrainedConfig = AutoConfig.from_pretrained(_source(name), trust_remote_code=False)
    _require_causal(name, config.to_dict())
    return config


def read_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, fp32 on the processor, and its tokenizer, as they are stored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = read_config(name)
    with _one_line(name), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(_source(name), trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _source(name),
            config=config,
            dtype="float32",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported here, refused below
            output_loading_info=True,
        )
    model, report = loaded
    unusable = sorted(report["missing_keys"]) + sorted(key for key, *_shapes in report["mismatched_keys"])
    if unusable:
        raise UserError(
            f'model "{name}": {len(unusable)} of its weights are missing or of another shape than its config.json '
            f"says, the first {unusable[0]}; fetch or save the folder again"
        )
    return model, tokenizer


def _source(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder) if folder.exists() else name


def _require_causal(name: str, config: dict[str, Any]) -> None:
    """Refuse a configuration whose architecture does not predict the next token from those before it."""
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
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # BERT's kind looks both ways unless told otherwise
        causal = causal and bool(config.get("is_decoder"))
    if not causal:
        what = ", ".join(architectures) or f"of model type {kind}"
        raise UserError(
            f'model "{name}": architecture {what} is not a causal language model; '
            "give one whose architecture ends in ForCausalLM (Llama, Qwen, Gemma, GPT-2, ...)"
        )


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what transformers, the hub and safetensors raise for a bad source into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        where = "this folder" if Path(name).expanduser().exists() else "the Hugging Face hub (no such folder here)"
        raise UserError(f'model "{name}": could not be read from {where}: {reason[:300]}') from error
