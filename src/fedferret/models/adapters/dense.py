"""Modules that are trained densely beside an adapter, as peft's ``modules_to_save``.

They are trained in place: the plain architecture has a place for what they learn. Where two modules share a weight,
such as an output head and the embedding, both change; peft is told of both, since it would copy one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedferret.core.errors import UserError


def dense_modules(model: nn.Module, ends: Sequence[str], adapted: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that a setting means.

    Args:
        model: the plain architecture, on any device, the meta device included.
        ends: the ends of the modules' names.
        adapted: full names of modules that the adapter changes, which cannot be dense too.

    Returns:
        The modules by full name, and those that share a weight with one of them.

    Raises:
        UserError: no module with weights is called so, or one is adapted.
    """
    named = {name: module for name, module in model.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for end in ends:
        found = {name: module for name, module in named.items() if name == end or name.endswith(f".{end}")}
        if not any(True for module in found.values() for _ in module.parameters()):
            known = ", ".join(
                dict.fromkeys(name.rpartition(".")[2] for name in named if not name.split(".")[-1].isdigit())
            )
            raise UserError(
                f'algorithm.modules_to_save="{end}": no module with weights is called so; this model has {known}'
            )
        for name in adapted:
            if any(name == each or name.startswith(f"{each}.") for each in found):
                raise UserError(
                    f'algorithm.modules_to_save="{end}": {name} has LoRA factors; name it in modules or in '
                    f"modules_to_save, not in both"
                )
        chosen |= found
    shared = {id(weight) for module in chosen.values() for weight in module.parameters()}
    for name, module in named.items():
        if any(id(weight) in shared for weight in module.parameters(recurse=False)):
            chosen.setdefault(name, module)
    return chosen


def make_dense(model: nn.Module, names: Sequence[str]) -> None:
    """Let modules be trained.

    Args:
        model: changed in place.
        names: full names, of ``dense_modules``.

    Raises:
        UserError: a module's weights are no floating-point numbers.
    """
    for name in names:
        for weight in model.get_submodule(name).parameters():
            if not weight.is_floating_point():
                raise UserError(f'algorithm.modules_to_save="{name}": its weights are quantised and cannot be trained')
            weight.requires_grad_(True)


def dense_names(model: nn.Module) -> list[str]:
    """The modules that are trained densely in a model with an adapter.

    Args:
        model: with LoRA.

    Returns:
        Full names of modules that hold weights which require a gradient and are no adapter's.
    """
    return [
        name
        for name, module in model.named_modules()
        if ".lora_" not in name and any(weight.requires_grad for weight in module.parameters(recurse=False))
    ]


def outermost(names: Sequence[str]) -> list[str]:
    """Leave out modules inside others.

    Args:
        names: full names of modules.

    Returns:
        Those that lie in no other of ``names``, in order.
    """
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
