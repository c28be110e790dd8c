"""An existing adapter's values, in a model with LoRA, and back under the names of peft's files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.imports import quick_imports
from fedferret.core.text import plain_line
from fedferret.models.adapters.peft_folder import PeftFolder, part_of


def check_start(model: nn.Module, linear: Sequence[str], start: PeftFolder) -> tuple[list[str], list[str]]:
    """Find an adapter's modules in a model.

    Args:
        model: the plain architecture, on any device, the meta device included.
        linear: full names of the modules that can take LoRA.
        start: the adapter.

    Returns:
        Full names of the modules with factors, in the model's order, and of those that are trained densely.

    Raises:
        UserError: the model has no such module, or another shape, or ties a weight that the adapter trains apart; or
            the adapter's settings name other modules than its weights.
    """
    _check_targets(model, linear, start)
    where = f"algorithm.adapter: {start.folder} does not fit this model"
    for name in start.modules:
        if name not in linear:
            raise UserError(f"{where}: it has LoRA factors for {name[:200]}, which is no linear module here")
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in start.shapes.items():
        module = name.split(f".{part_of(name)}")[0]
        wanted = _shape(model.get_submodule(module), part_of(name), start.rank) if part_of(name) else None
        if part_of(name) is None and name in weights:
            wanted = tuple(weights[name].shape)
        if shape != wanted:
            raise UserError(f"{where}: {name[:200]} has the shape {shape}, and here {wanted or 'there is none'}")
    trained = {id(weights[name]) for name in start.dense}
    for name, weight in weights.items():
        if id(weight) in trained and name not in start.dense:
            raise UserError(
                f"{where}: it trains a copy of {name[:200]} under another name, and this model ties the two"
            )
    dense = dict.fromkeys(name.rpartition(".")[0] for name in start.dense)
    return [name for name in linear if name in start.modules], list(dense)


@torch.no_grad()
def load_start(model: nn.Module, start: PeftFolder) -> None:
    """Write an adapter's values.

    Args:
        model: with LoRA of the adapter's shapes; on the meta device nothing is read.
        start: the adapter.

    Raises:
        UserError: the file is damaged, or weights that the model ties differ.
    """
    if next(model.parameters()).is_meta:
        return
    targets = dict(model.named_parameters(remove_duplicate=False))
    written: dict[int, Tensor] = {}
    for name, value in start.tensors().items():
        target = targets[_inside(name)]
        if id(target) in written and not torch.equal(written[id(target)], value):
            raise UserError(f"algorithm.adapter: {start.folder} trains {name} apart from a weight that this model ties")
        target.copy_(value)
        written[id(target)] = value


def saved(model: nn.Module, dense: Sequence[str]) -> dict[str, Tensor]:
    """What a folder of peft's holds of a model.

    Args:
        model: with LoRA.
        dense: full names of the modules that are trained densely, none inside another.

    Returns:
        Tensors by peft's names without its prefix; both of two that are tied.
    """
    found = {name: weight for name, weight in model.named_parameters(remove_duplicate=False)}
    tensors: dict[str, Tensor] = {_outside(name): weight for name, weight in found.items() if part_of(name)}
    for module in dense:
        tensors |= {name: weight for name, weight in found.items() if name.startswith(f"{module}.")}
    return tensors


def _check_targets(model: nn.Module, linear: Sequence[str], start: PeftFolder) -> None:
    """Refuse an adapter that tunes other modules of this model by its settings, which peft goes by, than by weights."""
    with quick_imports():
        from peft import LoraConfig
        from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    if "target_modules" not in start.targets:
        return
    where = f"algorithm.adapter: {start.folder} does not fit its settings on this model"
    try:
        config: Any = LoraConfig(**start.targets)
        config = _maybe_include_all_linear_layers(config, model)
        asked = [name for name in linear if check_target_module_exists(config, name)]
        dense = [str(name) for name in config.modules_to_save or ()]
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{where}: {plain_line(str(error))}") from None
    missing = [name for name in asked if name not in start.modules] + [
        name for name in dense if not any(name in weight.split(".") or f"{name}." in weight for weight in start.dense)
    ]
    if missing:
        raise UserError(f"{where}: it names {missing[0][:200]}, and has no weights for it")
    for name in start.modules:
        if name in linear and name not in asked:
            raise UserError(f"{where}: it has weights for {name[:200]}, which it does not name")


def _shape(module: nn.Module, part: str | None, rank: int) -> tuple[int, ...]:
    """Of a part of LoRA for a linear module, or for a ``Conv1D``, which has its weight transposed."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    outputs, inputs = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    return {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}.get(str(part), (outputs,))


def _inside(name: str) -> str:
    """The model's name of a tensor of the file."""
    part = part_of(name)
    if part is None:
        return name
    return f"{name.removesuffix('.weight')}.default.weight"


def _outside(name: str) -> str:
    """The file's name of a part of LoRA; magnitudes have no last word there."""
    shorter = name.replace(".default.weight", ".weight")
    return shorter.removesuffix(".weight") if part_of(name) == "lora_magnitude_vector" else shorter
