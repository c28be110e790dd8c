"""What one client's training changes of the toy model, as one vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedferret.core import tree
from fedferret.core.keys import Key
from toys import TRAINING, toy_task


def flat(tensors: Any) -> Tensor:
    """All of a tree's numbers in a row."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


def trained(data: Any, key: Key) -> Tensor:
    """What one client's training changes, w - w_j."""
    task = toy_task(1)
    before = tree.clone(tree.parameters(task.model))
    TRAINING.train(task, data, key.fold("train"))
    return torch.cat([delta.view(-1) for _, delta in tree.difference(before, tree.parameters(task.model))])
