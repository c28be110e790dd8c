"""The layers of a model in order, and which of them a parameter belongs to.

    transformers    the blocks: entries of the longest list of modules, by weights, that lies in no other block
    others          an image model's or a plain model's top-level modules with weights, a classifier's head left out

An adapter or a wrapper changes the names and not the number of layers. ALBERT, which repeats one block, has one layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fedferret.core.errors import UserError
from fedferret.models.classifiers import inner_transformer


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers of a model.

    Args:
        model: any causal model, encoder, classifier or plain module, with or without an adapter or a wrapper, on any
            device, the meta device included.

    Returns:
        At least one module by full name, in the order in which the model computes.

    Raises:
        UserError: the model has no module inside it that holds weights.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = [found for name, module in lists.items() if (found := _blocks(name, module, lists))]
    if blocks:
        return max(blocks, key=lambda found: sum(_weights(module) for module in found.values()))
    prefix, inner = inner_transformer(model)
    found = {f"{prefix}{name}": child for name, child in inner.named_children() if _weights(child)}
    if not found:
        raise UserError(f"a {type(inner).__name__} has no layers to choose among: choose a method that needs none")
    return found


def by_layer(names: Iterable[str], model: nn.Module) -> list[list[str]]:
    """Group names of parameters by layer.

    Args:
        names: of parameters of ``model``, or of any of its modules.
        model: as in ``layers_of``.

    Returns:
        One list per layer, in the order of ``layers_of``, and one more at the end with the names in no layer, such as a
        classifier's head; in each the order of ``names``. Lists may be empty.

    Raises:
        UserError: as ``layers_of``.
    """
    layers = [f"{name}." for name in layers_of(model)]
    groups: list[list[str]] = [[] for _ in range(len(layers) + 1)]
    for name in names:
        place = next((number for number, layer in enumerate(layers) if f"{name}.".startswith(layer)), len(layers))
        groups[place].append(name)
    return groups


def layers_named(names: Iterable[str]) -> dict[str, list[str]]:
    """The layers that names of parameters tell of, for what sees no model, such as formulas of costs.

    Args:
        names: of parameters of one model.

    Returns:
        For each layer that has any of ``names``, by the layer's full name, those names; in the order of ``names``. A
        layer ends with the first number of a name; where no name has one, it is a top-level module other than a
        classifier's head. A name in no layer is left out.
    """
    words = {name: name.split(".") for name in names}
    numbered = any(word.isdigit() for each in words.values() for word in each)
    found: dict[str, list[str]] = {}
    for name, each in words.items():
        place = next((place for place, word in enumerate(each) if word.isdigit()), None)
        if not numbered and each[0] != "head":
            place = int(each[0] == "body")
        if place is not None:
            found.setdefault(".".join(each[: place + 1]), []).append(name)
    return found


def _blocks(name: str, module: nn.ModuleList, lists: dict[str, nn.ModuleList]) -> dict[str, nn.Module]:
    """The entries of a list that lies in no entry of another; of a list of lists, the entries of all."""
    if any(name.startswith(f"{other}.") for other in lists):
        return {}
    found: dict[str, nn.Module] = {}
    for number, entry in module.named_children():
        inside = entry.named_children() if isinstance(entry, nn.ModuleList) else ()
        found |= {f"{name}.{number}.{inner}": each for inner, each in inside} or {f"{name}.{number}": entry}
    return {path: block for path, block in found.items() if _weights(block)}


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
