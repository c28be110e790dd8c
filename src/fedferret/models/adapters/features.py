"""Which modules' outputs a scale and a shift can tune: linear modules of the blocks, and every norm of the transformer.

Norms are those of the blocks, the final one and that of the embeddings. Left out are output heads, poolers and other
linear modules outside the blocks, what ``linear_modules`` and ``norm_modules`` leave out, experts that one tensor of
three dimensions holds, and modules that share a weight: what is merged into the one would change the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from fedferret.core.errors import UserError
from fedferret.models.adapters.modules import ALL_LINEAR, linear_modules, selected
from fedferret.models.adapters.norms import norm_modules
from fedferret.models.classifiers import inner_transformer
from fedferret.models.layers import layers_of


def chosen_features(model: nn.Module, modules: str | Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """The modules that a setting means.

    Args:
        model: without an adapter, on any device, the meta device included.
        modules: ends of names, one pattern for a whole name, ``ALL_LINEAR``, or None for all.

    Returns:
        The shape of a module's output without batch and tokens, by the module's full name, in the model's order.

    Raises:
        UserError: the model has no such module.
    """
    linear, norms = _linear(model), _norms(model)
    names = [name for name, _ in model.named_modules() if name in {*linear, *norms}]
    if not names:
        raise UserError("this model has no linear module or norm that could be scaled: choose another method")
    if modules == ALL_LINEAR:
        chosen, missing = linear, [] if linear else [ALL_LINEAR]
    else:
        chosen, missing = (names, []) if modules is None else selected(names, modules)
    if missing:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise UserError(
            f'algorithm.modules="{missing[0]}": no linear module of a block and no norm is called so; this model has '
            f'{known}; give some of these or modules = "{ALL_LINEAR}", or leave the setting out'
        )
    return {name: _shape(model.get_submodule(name)) for name in chosen}


def _linear(model: nn.Module) -> list[str]:
    """Linear modules inside the blocks, each with a weight that no other module shares."""
    shared = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    layers = layers_of(model)
    return [
        name
        for name in linear_modules(model)
        if any(name == layer or name.startswith(f"{layer}.") for layer in layers)
        and shared[id(model.get_submodule(name).weight)] == 1
    ]


def _norms(model: nn.Module) -> list[str]:
    """Norms of the transformer without what lies between it and the output."""
    prefix, inner = inner_transformer(model)
    trunk: Any = getattr(inner, "base_model", inner)
    inside = {id(module) for module in trunk.modules()}
    found = norm_modules(inner)
    return [f"{prefix}{name}" for name in found if id(inner.get_submodule(name)) in inside]


def is_linear(module: nn.Module) -> bool:
    """Tell a linear module from a norm.

    Args:
        module: of those that ``chosen_features`` names.

    Returns:
        True for a linear module or GPT-2's ``Conv1D``.
    """
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _shape(module: Any) -> tuple[int, ...]:
    """Quantised weights are packed, so a linear module is asked for its number of outputs."""
    if isinstance(module, nn.Linear):
        return (module.out_features,)
    return (module.nf,) if is_linear(module) else tuple(module.weight.shape)
