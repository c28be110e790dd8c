"""Prefixes in the form of peft's prefix tuning, where peft computes the same with them.

peft puts a prefix into the cache, and numbers the tokens behind p vectors from p on. Rotary positions are relative:
keys rotated by p positions, seen from p positions further on, are the same keys. So keys are written rotated. Where
positions are learned, or a layer sees a window, peft would read another model. Each model is tried on a row of tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fedferret.core import tree
from fedferret.core.imports import quick_imports
from fedferret.core.keys import Key
from fedferret.models.adapters.attention import (
    AttentionLayer,
    attention_layers,
    prefix_layers,
    switch,
    without_prefixes,
)
from fedferret.models.adapters.drawing import no_trace, standard_normal
from fedferret.models.adapters.peft_folder import WEIGHTS

_PROBE = 12  # tokens
_ROUNDING = 1e-3  # relative, of logits behind prefixes of deviation 1; one position more changes them by far more


@dataclass(frozen=True)
class PeftPrefix:
    """What a folder of peft's prefix tuning holds.

    Attributes:
        config: ``PrefixTuningConfig``.
        values: shape (p, 2 L heads width), fp32: keys and values of layer after layer.
    """

    config: Any
    values: Tensor

    def write(self, folder: Path, base: str) -> None:
        """Fill a folder.

        Args:
            folder: exists and is empty.
            base: the base model's name.
        """
        from safetensors.torch import save_file

        self.config.base_model_name_or_path = base
        self.config.save_pretrained(folder)
        save_file({"prompt_embeddings": self.values.cpu().contiguous()}, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def peft_prefix(model: nn.Module) -> PeftPrefix | None:
    """The prefixes of a model as peft has them.

    Args:
        model: a causal model of transformers with prefixes; left as it is.

    Returns:
        What a folder holds; None where peft computes something else with it, or has no place for it.
    """
    config: Any = model.config
    with no_trace():
        layers = attention_layers(model, model)
    switch(model, True)
    shapes = {(layer.heads, width) for layer in layers for width in (layer.key_width, layer.value_width)}
    types: Any = getattr(config, "layer_types", None) or ()
    windows = bool(getattr(config, "sliding_window", None)) or "sliding_attention" in types
    if len(shapes) > 1 or windows or len(layers) != config.num_hidden_layers:
        return None
    try:
        with _loud(model), no_trace():
            if not _reads_alike(model, _converted(model, layers)):
                return None
        return _converted(model, layers)
    except Exception:  # whatever peft or an architecture raises for a cache or positions that it does not take
        return None


def _converted(model: nn.Module, layers: Sequence[AttentionLayer]) -> PeftPrefix:
    with quick_imports():
        import peft

    parts = []
    for layer, names in zip(layers, prefix_layers(model), strict=True):
        key, value = (model.get_parameter(name).detach().float() for name in names)
        parts += [_rotated(model, layer, key), value]
    heads, width, tokens = layers[0].heads, layers[0].key_width, len(parts[0])
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        num_layers=len(layers),
        num_attention_heads=heads,
        token_dim=heads * width,
        num_transformer_submodules=1,
        inference_mode=True,
    )
    return PeftPrefix(config, torch.cat(parts, dim=1))


def _rotated(model: nn.Module, layer: AttentionLayer, key: Tensor) -> Tensor:
    """Keys (p, heads * width) as they are at position p; as they are where the layer has no rotary positions."""
    rotary: Any = next((each for name, each in model.named_modules() if name.endswith("rotary_emb")), None)
    if rotary is None or not getattr(model.get_submodule(layer.name), "use_rope", True):
        return key
    tokens = len(key)
    heads = key.view(tokens, layer.heads, layer.key_width).transpose(0, 1)[None]
    cos, sin = (
        each / rotary.attention_scaling for each in rotary(heads, torch.full((1, tokens), tokens, device=key.device))
    )
    width = cos.shape[-1]
    turn = sys.modules[type(model).__module__].apply_rotary_pos_emb
    turned = turn(heads[..., :width], heads[..., :width], cos, sin)[1]
    return torch.cat((turned, heads[..., width:]), dim=-1)[0].transpose(0, 1).reshape(tokens, -1)


@contextmanager
def _loud(model: nn.Module) -> Iterator[None]:
    """Within this context prefixes have deviation 1, so that a difference is seen."""
    weights = tree.parameters(model)
    before = tree.clone(weights)
    try:
        for name, weight in weights.items():
            weight.copy_(standard_normal(weight.numel(), Key.of(0, name)).float().view_as(weight))
        yield
    finally:
        tree.copy_(weights, before)


def _reads_alike(model: Any, made: PeftPrefix) -> bool:
    """Whether peft's model of a folder has the logits of the model with prefixes."""
    import peft

    ids = torch.arange(1, _PROBE + 1, device=made.values.device)[None]
    expected = model(input_ids=ids).logits
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with TemporaryDirectory() as folder, without_prefixes(model):
        made.write(Path(folder), "")
        try:
            found = peft.PeftModel.from_pretrained(model, folder)(input_ids=ids).logits
        finally:
            for name, flag in flags.items():
                model.get_parameter(name).requires_grad_(flag)
    return bool((found - expected).norm() <= _ROUNDING * (expected - expected.mean(-1, keepdim=True)).norm())
