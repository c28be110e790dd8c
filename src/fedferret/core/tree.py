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
    """The trainable parameters of ``model`` themselves (not copies), detached, tied weights once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def clone(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy with memory of its own."""
    return {name: tensor.detach().clone() for name, tensor in tree.items()}


def copy_(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Overwrite ``target``'s tensors with ``source``'s, name by name."""
    for name, tensor in target.items():
        tensor.copy_(source[name])


def zeros_like(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tree of zeros, fp32, of the same shapes."""
    return {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in tree.items()}


def size(tree: Mapping[str, Tensor]) -> int:
    """The number of elements, d."""
    return sum(tensor.numel() for tensor in tree.values())


def difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The pairs (name, before - after), one tensor at a time, in fp32."""
    for name, tensor in before.items():
        trained = after[name]
        yield name, tensor.to(trained.device).float() - trained.float()


def fingerprint(tree: Mapping[str, Tensor]) -> str:
    """SHA-256 of a tree in order of name: equal exactly when the weights are bit-equal."""
    return digest((name, tree[name]) for name in sorted(tree))


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, types and bytes, in the order given, one tensor at a time."""
    digest = hashlib.sha256()
    for name, value in tensors:
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer
    return digest.hexdigest()
