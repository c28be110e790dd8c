"""Which modules of a model take LoRA: all that can, those that a setting names, and those that it means by default.

    default    a Llama's seven linear maps where an architecture has all of them
               else what the peft library has for the architecture, where the model has all of it
               else every linear module but the output head

Experts that one tensor of three dimensions holds are no linear modules, and take none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedferret.core.errors import UserError
from fedferret.core.imports import quick_imports
from fedferret.models.classifiers import Classifier, inner_transformer

ALL_LINEAR = "all-linear"
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the linear maps of a block
_BYPASSED = ("x_proj", "dt_proj", "out_proj")  # a state-space layer reads these weights past their modules


def linear_modules(model: nn.Module) -> list[str]:
    """Which modules can take LoRA.

    An output head that shares its weights with the embedding cannot: what is added to the one is not to the other. A
    classifier's head stays dense. What an architecture reads past its module cannot: LoRA would have no effect. Nor can
    a router or a grouped map, which an architecture derives from a linear module.

    Args:
        model: a transformers model without an adapter, on any device, the meta device included.

    Returns:
        The full names of the linear modules and GPT-2's ``Conv1D``, in the model's order.
    """
    from transformers.pytorch_utils import Conv1D

    kept = {id(model.head.weight)} if isinstance(model, Classifier) else set()  # it stays dense
    kept |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if hasattr(module, "A_log") and hasattr(module, "D"):
            kept |= {id(getattr(module, name).weight) for name in _BYPASSED if hasattr(module, name)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in kept and _is_a_linear_map(module)
    ]


def default_modules(model: nn.Module) -> str | tuple[str, ...]:
    """The modules that LoRA tunes where no setting names any.

    Args:
        model: as in ``linear_modules``.

    Returns:
        The ends of the modules' names, or a pattern, each of which the model has; or ``ALL_LINEAR``.
    """
    with quick_imports():
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    names = linear_modules(model)
    config: Any = getattr(inner_transformer(model)[1], "config", None)
    for found in (LLAMA, KNOWN.get(getattr(config, "model_type", ""), ())):
        if found and not selected(names, found if isinstance(found, str) else tuple(found))[1]:
            return found if isinstance(found, str) else tuple(found)
    return ALL_LINEAR


def chosen_modules(model: nn.Module, modules: str | Sequence[str] | None) -> list[str]:
    """The modules that a setting means.

    Args:
        model: as in ``linear_modules``.
        modules: ends of names, one pattern for a whole name, ``ALL_LINEAR``, or None for the default.

    Returns:
        Full names, in the model's order.

    Raises:
        UserError: the model has no linear module of such a name, or the pattern is none.
    """
    names = linear_modules(model)
    if not names:
        raise UserError("this model has no linear module that LoRA could be added to: choose another method")
    given = default_modules(model) if modules is None else modules
    if given == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = [name for name in names if model.get_submodule(name) is not head]
        missing = [] if chosen else [ALL_LINEAR]
    else:
        chosen, missing = selected(names, given)
    if missing:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        where = f'algorithm.modules="{missing[0]}"'
        if given == ALL_LINEAR:
            raise UserError(f"{where}: this model has no linear module but its output head; name it: {known}")
        raise UserError(
            f"{where}: no linear module is called so; this model has {known}; give some of these, set "
            f'modules = "{ALL_LINEAR}", or leave modules out'
        )
    return chosen


@contextmanager
def read_as_given(model: nn.Module) -> Iterator[None]:
    """Let peft take the names of modules as they are.

    Where peft knows a model's configuration, it reads the names of some mixtures of experts as those of an older
    layout, and adapts other modules than those named.

    Args:
        model: of transformers.

    Returns:
        A context in which the model has no ``config``.
    """
    config = model.__dict__.pop("config", None)
    try:
        yield
    finally:
        if config is not None:
            model.config = config


def selected(names: Sequence[str], modules: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Find the modules that a setting names.

    Args:
        names: full names of the modules that can be meant.
        modules: ends of names, or one pattern for a whole name.

    Returns:
        Those of ``names`` that ``modules`` means, in order, and what of ``modules`` means none of them.

    Raises:
        UserError: the pattern is no regular expression.
    """
    if isinstance(modules, str):
        try:
            chosen = {name for name in names if re.fullmatch(modules, name)}
        except re.error as error:
            raise UserError(f'algorithm.modules="{modules}": not a regular expression ({error})') from None
        missing = [] if chosen else [modules]
    else:
        ends = {end: {name for name in names if name == end or name.endswith(f".{end}")} for end in modules}
        chosen = set().union(*ends.values())
        missing = [end for end, found in ends.items() if not found] if chosen else list(modules) or ["[]"]
    return [name for name in names if name in chosen], missing


def _is_a_linear_map(module: Any) -> bool:
    """Whether a module of an architecture's own kind maps vectors to vectors: routers give choices beside."""
    if not type(module).__module__.startswith("transformers.models."):
        return True
    try:
        with torch.no_grad():
            output = module(torch.zeros(1, module.in_features, device=module.weight.device, dtype=module.weight.dtype))
    except (RuntimeError, TypeError, ValueError, IndexError):  # it reads other shapes
        return False
    return isinstance(output, Tensor) and output.shape == (1, module.out_features)
