"""Activation checkpointing: a layer's activations are dropped, and computed again in the backward pass.

Each of transformers' checkpointing layers is called through torch's ``checkpoint``. Transformers' own switch acts in
training mode alone, where attention and residual dropout would draw from the global generator; here the model stays in
evaluation mode. The bits are those of training without it, also where a frozen base has an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fedferret.core.errors import UserError


@contextmanager
def recomputed(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Within this context, ``model`` recomputes activations in the backward pass; dropout is off.

    Args:
        model: put in evaluation mode, where it stays.
        enabled: False keeps the activations.

    Returns:
        A context manager; after it the model keeps activations.
    """
    model.eval()  # dropout off
    layers = _layers(model) if enabled else []
    for layer in layers:
        layer.forward = partial(_forward, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is back


def check_recomputing(model: nn.Module, name: str) -> None:
    """Refuse a model with activations that cannot be recomputed.

    Args:
        model: on any device, the meta device included.
        name: the model's, for the error.

    Raises:
        UserError: the architecture has no layer that transformers can checkpoint.
    """
    if not _layers(model):
        raise UserError(
            f'training.checkpoint_activations=true: transformers cannot recompute the layers of the model "{name}"; '
            f"set it to false, and lower batch_size where memory is short"
        )


def _layers(model: nn.Module) -> list[Any]:
    """The outermost checkpointing layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():  # a layer comes before those inside it
        if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
            found.append(module)
            inside |= {id(each) for each in module.modules()}
    return found


def _forward(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return checkpoint(partial(forward, **options), *arguments, use_reentrant=False, preserve_rng_state=False)
