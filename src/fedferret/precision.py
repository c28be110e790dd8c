"""In how many bits a model's weights are held: ``model.dtype`` and ``model.quantised``.

    fp32        the default: a client's steps are far below the rounding step of bf16
    bf16        half the bytes, in memory and in snapshots; every rounding is at random, by a key, the same everywhere
    quantised   a frozen base in 4 or 8 bits, under an fp32 adapter

The fingerprint of a base is that of the weights in ``model.dtype``, before they are quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fedferret import models
from fedferret.config import DEFAULT_OBJECTIVE, ModelSettings, Recipe
from fedferret.core.algorithm import AnyAlgorithm
from fedferret.core.errors import UserError
from fedferret.core.stages import Staged
from fedferret.models.adapters import LoRA, adapter_of, transformer_of
from fedferret.models.adapters.dense import dense_names
from fedferret.models.devices import resolve_device
from fedferret.models.quantised import check_installed, quantise
from fedferret.objectives.interface import Loaded, ModelObjective


def check(recipe: Recipe, tuned: nn.Module) -> None:
    """Refuse a method or an objective that cannot take the bits that are asked for.

    Args:
        recipe: resolved.
        tuned: the model with the method's adapter, if it has one, on the meta device.

    Raises:
        UserError: the combination cannot work, or a library is missing.
    """
    asked, method = recipe.model, recipe.algorithm
    adapted = adapter_of(tuned) is not None
    if asked.dtype == "bf16":
        _check_objective(recipe, 'model.dtype="bf16"')
        _check_stages(method, 'model.dtype="bf16"')
        if not (adapted or method.holds_bf16):
            raise UserError(
                f'model.dtype="bf16": {method.name} changes weights by far less than bf16\'s rounding step; '
                f'set dtype="fp32", or choose ferret, fedavg or a method that tunes an adapter'
            )
    if asked.quantised is not None:
        _check_objective(recipe, f'model.quantised="{asked.quantised}"')
        _check_stages(method, f'model.quantised="{asked.quantised}"')
        if not adapted:
            raise UserError(
                f'model.quantised="{asked.quantised}": {method.name} tunes the model\'s own weights, and codes of '
                f"{asked.quantised.replace('-', ' ')}s take no small steps; leave quantised out, or choose a method "
                f"that tunes an adapter, such as fedit"
            )
        if method.changes_base:
            raise UserError(
                f'model.quantised="{asked.quantised}": {method.name} changes the weights under its adapter too, and '
                f"codes take no small steps; leave quantised out, or choose fedit"
            )
        _check_adapter(asked.quantised, tuned)
        check_installed(asked.quantised)


def load(objective: ModelObjective, settings: ModelSettings, device: str, log: Callable[[str], None]) -> Loaded:
    """Load a base in ``settings.dtype``; ``put_on_device`` quantises it, once its fingerprint is taken.

    Args:
        objective: says what kind of model it is.
        settings: which model.
        device: to compute on. A base that is to be quantised stays on the CPU until then.
        log: called with lines on slow steps.

    Raises:
        UserError: there is no such model.
    """
    if settings.dtype == "fp32" and settings.quantised is None:
        return objective.load(settings.name, device, log)
    where = "cpu" if settings.quantised else device
    return models.load(settings.name, device=where, log=log, dtype=settings.dtype)


def put_on_device(settings: ModelSettings, model: Any, device: str) -> None:
    """Quantise a base where that is asked for, and put it on its device.

    Args:
        settings: of the recipe.
        model: as ``load`` gave it; changed in place.
        device: to compute on.
    """
    if settings.quantised is not None:
        quantise(model, settings.quantised)
        nn.Module.to(model, resolve_device(device))


def _check_adapter(quantised: str, tuned: nn.Module) -> None:
    """Refuse an adapter that begins from weights which are quantised: an export finds the base before that."""
    adapter, head = adapter_of(tuned), transformer_of(tuned).get_output_embeddings()
    if not isinstance(adapter, LoRA):
        return
    if adapter.dora and adapter.start is None:
        raise UserError(
            f'model.quantised="{quantised}": DoRA\'s magnitudes begin as the norms of the weights, and those of '
            f"quantised weights are others; set algorithm.dora=false, or leave quantised out"
        )
    for name in dense_names(tuned):
        module = tuned.get_submodule(name)
        if type(module) is nn.Linear and module is not head:
            raise UserError(
                f'model.quantised="{quantised}": algorithm.modules_to_save names {name}, which is quantised; '
                f"give embeddings, norms or the output head, or leave quantised out"
            )


def _check_stages(method: AnyAlgorithm, given: str) -> None:
    if isinstance(method, Staged):
        raise UserError(
            f"{given}: {method.name} has stages, which hold weights in fp32; leave it out, or choose a method of one "
            f"stage that tunes an adapter, such as fedit"
        )


def _check_objective(recipe: Recipe, setting: str) -> None:
    if recipe.objective.name != DEFAULT_OBJECTIVE:
        raise UserError(f'{setting}: objective "{recipe.objective.name}" has fp32 weights alone; leave the setting out')
