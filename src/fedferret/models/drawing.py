"""First values drawn by a key in place of the global generator, with the same bits on every machine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedferret.core.keys import Key

if TYPE_CHECKING:
    from torch import Tensor, nn


def draw_transformer(model: nn.Module, deviation: float, key: Key) -> None:
    """Draw a transformer's weights: near normal; norm weights 1, biases 0.

    Each value is a sum of twelve uniform ones. The additions are exact and in a fixed order.

    Args:
        model: on the CPU, changed in place.
        deviation: the standard deviation of a weight.
        key: of the weights.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(float(name.endswith("weight")))
                continue
            total = torch.full((parameter.numel(),), -6.0, dtype=torch.float64)
            for draw in range(12):
                total += key.fold(name, draw).uniform(parameter.numel())
            parameter.copy_((total * deviation).view_as(parameter))


def draw_uniform(parameter: Tensor, squared_bound: float, key: Key) -> None:
    """Draw a parameter's values, uniform between -√squared_bound and √squared_bound.

    Args:
        parameter: changed in place; on the meta device nothing is drawn.
        squared_bound: 6 / inputs is He's distribution for ReLU; 1 / inputs is torch's for a linear layer.
        key: of this parameter.
    """
    import torch

    if parameter.is_meta:
        return
    with torch.no_grad():
        values = (2 * key.uniform(parameter.numel()) - 1) * math.sqrt(squared_bound)
        parameter.copy_(values.view_as(parameter))


def draw_relu_network(model: nn.Module, key: Key) -> None:
    """Draw the weights of convolutions and linear layers by He's uniform distribution; biases 0.

    Args:
        model: no other kinds of parameters; on the meta device nothing is drawn.
        key: of the weights.
    """
    for name, parameter in model.named_parameters():
        inputs = math.prod(parameter.shape[1:])
        draw_uniform(parameter, 6 / inputs if parameter.ndim > 1 else 0.0, key.fold(name))
