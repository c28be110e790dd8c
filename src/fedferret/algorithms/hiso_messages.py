"""What HiSo's nodes remember and send; the algorithm is in ``hiso.py``."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.messages import message, state
from fedferret.core.tree import Tree


@state
class HiSoPublic:
    """All weights, the diagonal H, and what draws the directions."""

    weights: Tree
    curvature: Tree  # fp32, of the weights' names and shapes
    seed: int


@message
class Gradients(Payload["Gradients"]):
    """Projected gradients on the round's directions, (T P,), fp32: all directions of a step, step after step."""

    gradients: Annotated[Tensor, Form(rank=1)]  # under a mask int64


@message
class HiSoEntry:
    """The clients' mean."""

    gradients: Annotated[Tensor, Form(torch.float32, rank=1)]
