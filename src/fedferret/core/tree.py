"""Named tensors: the weights of a model, the change of a client's training, an optimiser's memory.

A tree is a flat mapping from a parameter's name to its tensor, in the model's own order. Tied weights
appear once, under the first of their names. Functions stream over one tensor at a time, so none of them
needs a second copy of a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

Tree: TypeAlias = MutableMapping[str, Tensor]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """What training may change in a model; tied weights once.

    Args:
        model: parameters without ``requires_grad`` are left out.

    Returns:
        The parameters themselves by name, detached; writing to one changes ``model``.
    """
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def clone(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy a tree.

    Args:
        tree: tensors of any type and device, by name.

    Returns:
        Tensors of the same names, types and devices that share no memory with ``tree``.
    """
    return {name: tensor.detach().clone() for name, tensor in tree.items()}


def copy_(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Overwrite ``target``'s tensors with ``source``'s, name by name.

    Args:
        target: tensors that keep their types and devices.
        source: has at least the names of ``target``, in the same shapes.
    """
    for name, tensor in target.items():
        tensor.copy_(source[name])


def zeros_like(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Start an accumulator for a tree.

    Args:
        tree: gives names, shapes and devices.

    Returns:
        Zeros, fp32 whatever the types in ``tree``.
    """
    return {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in tree.items()}


def size(tree: Mapping[str, Tensor]) -> int:
    """Count the elements of a tree.

    Args:
        tree: tensors of any shapes, by name.

    Returns:
        d, the number of elements over all tensors.
    """
    return sum(tensor.numel() for tensor in tree.values())


def sizes(tree: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the elements of each tensor.

    Args:
        tree: tensors of any shapes, by name.

    Returns:
        Numbers of elements by name, in the tree's order.
    """
    return {name: tensor.numel() for name, tensor in tree.items()}


def shapes(tree: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor.

    Args:
        tree: tensors of any shapes, by name.

    Returns:
        Shapes by name, in the tree's order.
    """
    return {name: tuple(tensor.shape) for name, tensor in tree.items()}


def difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Subtract trees, one tensor at a time.

    Args:
        before: tensors by name, of any type and device.
        after: has at least the names of ``before``, in the same shapes.

    Yields:
        Each name with before - after, fp32, on the device of the tensor in ``after``.
    """
    for name, tensor in before.items():
        trained = after[name]
        yield name, tensor.to(trained.device).float() - trained.float()


def fingerprint(tree: Mapping[str, Tensor]) -> str:
    """Hash a tree, whatever the order of its names.

    Args:
        tree: tensors on any device, by name.

    Returns:
        SHA-256 as 64 hexadecimal digits, equal exactly when names, shapes, types and bits are equal.
    """
    return digest((name, tree[name]) for name in sorted(tree))


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash tensors in the order given, one tensor at a time.

    Args:
        tensors: pairs of name and tensor, on any device.

    Returns:
        SHA-256 over names, shapes, types and bytes, as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, value in tensors:
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer
    return digest.hexdigest()
