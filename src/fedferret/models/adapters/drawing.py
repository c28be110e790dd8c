"""An adapter's first values, drawn by a key in place of peft's, which come from the global generator.

The distributions are peft's: LoRA's A and linear layers uniform in ±1/√inputs, B zero, embeddings normal (here: sums of
twelve uniforms, with bits that depend on no mathematical library). With B zero, a model with LoRA begins as its base,
to the bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedferret.core.keys import Key


@contextmanager
def no_trace() -> Iterator[None]:
    """Afterwards the global generator is as before; no warnings on what peft calls of transformers."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def draw(model: nn.Module, key: Key) -> None:
    """Overwrite all that requires a gradient, but DoRA's magnitudes, with fp32 values drawn by ``key``.

    On the meta device none is drawn.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()  # whatever the frozen base is held in
            if parameter.requires_grad and not parameter.is_meta and ".lora_magnitude_vector." not in f"{path}.":
                values = _initial(path, module, parameter.numel(), key.fold(f"{path}.{name}"))
                parameter.copy_(values.view_as(parameter))


@torch.no_grad()
def draw_magnitudes(model: nn.Module) -> None:
    """Set DoRA's magnitudes to the norms of the base weights' rows, with B zero; summed in float64 on the CPU."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_magnitude_vector:
            magnitude: Any = layer.lora_magnitude_vector["default"].weight
            if not magnitude.is_meta:
                weight = dequantize_module_weight(layer.get_base_layer()).detach().cpu().double()
                rows = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
                magnitude.copy_(rows.square().sum(1).sqrt())


def standard_normal(count: int, key: Key) -> Tensor:
    """Values of mean 0 and variance 1.

    Args:
        count: how many.
        key: draws them.

    Returns:
        Sums of twelve uniforms, float64, shape (count,).
    """
    values = torch.full((count,), -6.0, dtype=torch.float64)
    for number in range(12):  # one after the other: the order of additions decides the bits
        values += key.fold(number).uniform(count)
    return values


def _initial(path: str, module: nn.Module, count: int, key: Key) -> Tensor:
    """``count`` first values, float64, of a parameter of ``module``."""
    if ".lora_B." in path:
        return torch.zeros(count, dtype=torch.float64)
    if isinstance(module, nn.Embedding):
        return standard_normal(count, key)
    assert isinstance(module, nn.Linear), f"{path}: no adapter of this project has such a part"
    return (2 * key.uniform(count) - 1) / math.sqrt(module.in_features)
