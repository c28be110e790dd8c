"""What FedKSeed's nodes remember and send; the algorithm is in ``fedkseed.py``."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fedferret.core.algorithm import Payload
from fedferret.core.fields import Form
from fedferret.core.messages import message, state
from fedferret.core.tree import Tree

_HISTORY_CLIP = 1000.0  # the paper's bound on |g| in Pro's history


@state
class FedKSeedPublic:
    """All weights, and the pool that led to them."""

    weights: Tree
    pool: Annotated[
        Tensor, Form(torch.float32, rank=1)
    ]  # (K,): what each direction was walked in all rounds, in units of -η
    magnitudes: Annotated[Tensor, Form(torch.float32, rank=1)]  # (K,): Pro's m; zeros otherwise
    seed: int  # of the directions


@state
class FedKSeedServer:
    """Pro's history: the sums of |g| and the numbers of steps (K,), both weighted."""

    magnitudes: Annotated[Tensor, Form(torch.float32, rank=1)]
    steps: Annotated[Tensor, Form(torch.float32, rank=1)]


@message
class DecodedWalk:
    """Sums over a client's steps by seed, fp32 (K,): of g, of |g| up to the history's bound, and of 1."""

    gradients: Annotated[Tensor, Form(rank=1)]  # under a mask int64
    magnitudes: Annotated[Tensor, Form(rank=1)]
    steps: Annotated[Tensor, Form(rank=1)]


@message
class Walk(Payload[DecodedWalk]):
    """A client's T steps in order: seeds' numbers, int16 or int32 (T,), and projected gradients, fp32 (T,)."""

    seeds: Annotated[Tensor, Form((torch.int16, torch.int32), rank=1)]
    gradients: Annotated[Tensor, Form(torch.float32, rank=1)]
    pool_size: int

    def decoded(self) -> DecodedWalk:
        """The steps by seed; many walks have the same sums, so there is no way back (``encoded``)."""
        magnitudes = self.gradients.abs().clamp(max=_HISTORY_CLIP)
        by_seed = [
            torch.zeros(self.pool_size).index_add_(0, self.seeds.long(), values)
            for values in (self.gradients, magnitudes, torch.ones_like(magnitudes))
        ]
        return DecodedWalk(*by_seed)


@message
class FedKSeedEntry:
    """What is new of M seeds: their numbers in ascending order, int16 or int32 (M,), none where they are all K; fp32
    (1 or 2, M): the growth of the pool and, with Pro, m.
    """

    seeds: Annotated[Tensor, Form((torch.int16, torch.int32), rank=1)]
    values: Annotated[Tensor, Form(torch.float32, rank=2)]
