"""Where a plain architecture has a place for a shift of a module's output.

    own         the module has a bias
    settings    the architecture gives it one where a key of its configuration says so: Llama's attention_bias, mlp_bias
    readers     a norm's shift moves into the biases of the linear modules that read the norm: W (x + β) = W x + W β

The second is asked of the architecture: a model is made on the meta device with each key about biases reversed, and its
parameters are compared. The third holds for the architectures in the table below.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from fedferret.core.errors import UserError
from fedferret.models.classifiers import inner_transformer
from fedferret.models.quiet import quiet_transformers

_PRE_NORM = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
READERS: Mapping[str, Mapping[str, tuple[str, ...]]] = dict.fromkeys(
    ("llama", "smollm3", "granite", "qwen2", "qwen3", "gemma"), _PRE_NORM
)  # by model type: the linear modules of a block that read a norm, where nothing else reads it


@dataclass(frozen=True)
class BiasPlaces:
    """What a model's architecture can hold.

    Attributes:
        model: that has these places.
        biased: full names of the modules that have a bias.
        keys: settings of the configuration that give biases when reversed: their shapes, by the module's full name.
    """

    model: nn.Module
    biased: frozenset[str]
    keys: Mapping[str, Mapping[str, tuple[int, ...]]]

    def __contains__(self, name: str) -> bool:
        return name in self.biased or any(name in given for given in self.keys.values())

    def readers(self, norm: str) -> tuple[str, ...]:
        """The linear modules with biases that can take a norm's shift.

        Args:
            norm: the norm's full name.

        Returns:
            Full names of all that read the norm; empty where one of them can have no bias, or they are not known.
        """
        config: Any = getattr(inner_transformer(self.model)[1], "config", None)
        block, _, end = norm.rpartition(".")
        ends = READERS.get(getattr(config, "model_type", ""), {}).get(end, ())
        names = tuple(f"{block}.{reader}" for reader in ends)
        return names if all(name in self for name in names) else ()

    def check(self, shifted: Iterable[str]) -> None:
        """Refuse shifts for which an architecture has places, and its configuration forbids the combination.

        Args:
            shifted: full names of the modules with a shift.

        Raises:
            UserError: transformers would not load a model with these biases.
        """
        keys = self._needed(shifted)
        inner: Any = inner_transformer(self.model)[1]
        try:
            if keys:
                with TemporaryDirectory() as folder, quiet_transformers():
                    _reversed(inner.config, keys).save_pretrained(folder)
                    type(inner.config).from_pretrained(folder)
        except Exception as error:  # whatever an architecture's own checks raise
            raise UserError(
                f"algorithm.shift: {inner.config.model_type} cannot have biases by {', '.join(keys)} alone "
                f'({type(error).__name__}); set shift="none", or leave modules out'
            ) from None

    def add(self, shifted: Iterable[str]) -> None:
        """Give the model the biases that shifts need, all zero, and its configuration the settings.

        Args:
            shifted: as in ``check``.
        """
        keys = self._needed(shifted)
        inner: Any = inner_transformer(self.model)[1]
        for key in keys:
            setattr(inner.config, key, not getattr(inner.config, key))
            for name, shape in self.keys[key].items():
                module: Any = self.model.get_submodule(name)
                module.bias = nn.Parameter(module.weight.new_zeros(shape), requires_grad=False)

    def _needed(self, shifted: Iterable[str]) -> list[str]:
        """The keys to be reversed."""
        wanted = {each for name in shifted for each in ((name,) if name in self else self.readers(name))}
        return [key for key, given in self.keys.items() if (wanted - self.biased) & given.keys()]


def bias_places(model: nn.Module) -> BiasPlaces:
    """Ask a model's architecture for places.

    Args:
        model: with or without an adapter, on any device, the meta device included.

    Returns:
        The places; those by settings only where the architecture is transformers'.
    """
    from transformers import PreTrainedModel

    prefix, inner = inner_transformer(model)
    biased = {name for name, module in model.named_modules() if getattr(module, "bias", None) is not None}
    keys: dict[str, dict[str, tuple[int, ...]]] = {}
    if isinstance(inner, PreTrainedModel):
        modules = dict(inner.named_modules())
        for key, given in _settings(inner).items():
            if all(_can_hold(modules.get(name)) for name in given):
                keys[key] = {f"{prefix}{name}": shape for name, shape in given.items()}
    return BiasPlaces(model, frozenset(biased), keys)


def _settings(model: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Keys of a model's configuration that give biases and change nothing else when reversed: shapes by module."""
    keys = [key for key, value in model.config.to_dict().items() if isinstance(value, bool) and "bias" in key]
    plain = _shapes(model, ()) if keys else {}
    found = {}
    for key in keys:
        shapes = _shapes(model, (key,))
        given = {name: shape for name, shape in shapes.items() if name not in plain}
        kept = {name: shape for name, shape in shapes.items() if name in plain}
        if given and kept == plain and all(name.endswith(".bias") for name in given):
            found[key] = {name.removesuffix(".bias"): shape for name, shape in given.items()}
    return found


def _shapes(model: Any, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The state of a model's architecture with settings reversed."""
    with torch.device("meta"), quiet_transformers():
        return {
            name: tuple(each.shape) for name, each in type(model)(_reversed(model.config, keys)).state_dict().items()
        }


def _reversed(config: Any, keys: Iterable[str]) -> Any:
    changed = copy.deepcopy(config)
    for key in keys:
        setattr(changed, key, not getattr(changed, key))
    return changed


def _can_hold(module: nn.Module | None) -> bool:
    """Whether a bias that is given to a module is added to its output."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.LayerNorm) and module.bias is None
