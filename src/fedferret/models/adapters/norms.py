"""Which norms of a model hold a weight that scales what they give, and how the weight enters.

    weight        y = w n(x) + b          LayerNorm, RMSNorm of Llama, Qwen, ...
    1 + weight    y = (1 + w) n(x) + b    RMSNorm of Gemma, LayerNorm1P of Nemotron

The class does not say which of the two a norm is, so a copy of the norm is asked: it is called with chosen weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def norm_modules(model: nn.Module) -> dict[str, float]:
    """The norms that can be scaled through their weight.

    Left out are norms without a weight, norms of whole batches or groups of channels, norms that read a gate, and those
    of a state-space layer, which fused kernels read past their modules.

    Args:
        model: without an adapter, on any device, the meta device included.

    Returns:
        What is added to the weight, 0 or 1, by the norm's full name, in the model's order.
    """
    bypassed = {
        id(child)
        for module in model.modules()
        if hasattr(module, "A_log") and hasattr(module, "D")
        for child in module.children()
    }
    found = {
        name: weight_offset(module)
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and id(module) not in bypassed
    }
    return {name: offset for name, offset in found.items() if offset is not None}


def weight_offset(norm: nn.Module) -> float | None:
    """Ask a norm how its weight enters.

    Args:
        norm: any module; it is not changed.

    Returns:
        0 where the output is in proportion to the weight, 1 where to 1 + weight; None where it is neither, the module
        holds anything but a weight and a bias, or the bias is not added last.
    """
    own = {name for name, _ in norm.named_parameters() if not name.startswith("ssf_")}
    if "weight" not in own or own - {"weight", "bias"} or any(True for _ in norm.buffers()):
        return None
    try:
        with torch.device("cpu"):  # a caller may be making modules on the meta device
            return _offset(norm)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # it reads other shapes, or more inputs
        return None


@torch.no_grad()
def _offset(norm: nn.Module) -> float | None:
    asked: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    shape, size = asked.weight.shape, asked.weight.numel()
    x = torch.linspace(-1, 2, 6 * size).sin().view(2, 3, *shape)
    ramp, bias = torch.linspace(1, 3, size).view(shape), torch.zeros(())

    def output(weight: Tensor) -> Tensor:
        asked.weight.copy_(weight)
        if getattr(asked, "bias", None) is not None:
            asked.bias.copy_(bias)
        found: Tensor = asked.forward(x)
        if found.shape != x.shape:
            raise ValueError("no norm over the last dimensions")
        return found

    plain = output(torch.ones(()))
    for offset in (0.0, 1.0):
        if torch.allclose(output(ramp), (offset + ramp) / (offset + 1) * plain, rtol=1e-4, atol=1e-5):
            break
    else:
        return None
    bias = ramp
    shifted = plain + ramp if getattr(asked, "bias", None) is not None else plain
    return offset if torch.allclose(output(torch.ones(())), shifted, rtol=1e-4, atol=1e-5) else None
