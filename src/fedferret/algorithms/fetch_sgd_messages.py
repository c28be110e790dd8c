"""What FetchSGD's nodes remember and send; the algorithm is in ``fetch_sgd.py``."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fedferret.algorithms.sparse_updates import Sparse
from fedferret.bases.quantise import Packed, pack_vector
from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.tree import Tree


@state
class FetchSGDPublic:
    """All weights, and what the sketches' signs are drawn by."""

    weights: Tree
    seed: int


@state
class FetchSGDServer:
    """Two sketches, fp32 (Σ C_r,): the momentum u, and e, which waits to be applied."""

    momentum: Annotated[Tensor, Form(torch.float32, rank=1)]
    error: Annotated[Tensor, Form(torch.float32, rank=1)]


@message
class CellsSum:
    """The cells of all rows, one row after the other, fp32 (Σ C_r,): the form that adds up."""

    cells: Annotated[Tensor, Form(rank=1)]  # under a mask int64


@message
class Sketch(Payload[CellsSum]):
    """The cells of an update's sketch."""

    values: Packed

    def decoded(self) -> CellsSum:
        """The values behind the codes."""
        return CellsSum(self.values.unpack())

    def encoded(self, sum: CellsSum, key: Key) -> Sketch:
        """Other cells in as many bits."""
        return Sketch(pack_vector(sum.cells, self.values.bits, key))


@message
class FetchSGDEntry:
    """What every node takes off its weights."""

    delta: Sparse
