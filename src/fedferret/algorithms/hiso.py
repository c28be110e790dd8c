"""HiSo: steps along directions that every node makes from a number, stretched by a diagonal Hessian that none sends.

Li, Ying, Liu, Dong, Yang. "Converge Faster, Talk Less: Hessian-Informed Federated Zeroth-Order Optimization", ICLR
2026, arXiv 2506.02370, and the authors' code, github.com/ZidongLiu/DeComFL (estimator "adam_forward").

    round r:   directions v(t, p) = H^(-1/2) z, z Gaussian from (run, r, t, p): the same for all clients
    client j:  T times: g(t, p) = (loss(w + ε v(t, p)) - loss(w)) / ε for P directions, w <- w - η Σ_p g v / P
               send the T P scalars g
    server:    ḡ = Σ n_j g_j / Σ n_j
    everybody: w <- w - η Σ_t Σ_p ḡ(t, p) v(t, p) / P
               H <- (1 - ν) H + ν ((Σ_p ḡ(T, p) v(T, p) / P)² + ε')      the last step's, with the v of before

H is 1 before round 1. With ν = 0 it stays so, and this is DeComFL (Li, Ying, Liu, Dong, Yang, ICLR 2025, arXiv
2405.15861): FedKSeed's arithmetic on directions that all clients share and no round repeats.

Wire: 4 T P bytes up and 4 T P down; which directions they are follows from the round.

Deviations: ε' is ours; the code has none. The way back from the last perturbation and the step are one addition. A late
client gets the entries that it missed. Where the published code has a choice its default is taken: H of the last step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedferret.algorithms.full_model import loaded
from fedferret.algorithms.hiso_messages import Gradients, HiSoEntry, HiSoPublic
from fedferret.bases.gaussian import add_gaussians_
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Pooled, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.zeroth_order import ZerothOrder


@dataclass(frozen=True, kw_only=True)
class HiSo(Algorithm[HiSoPublic, None, None, HiSoEntry, Gradients]):
    """Zeroth-order steps that are short where the loss curves. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "hiso"
    directions: int = 5  # P, of a step; the published command's. Fewer make H noisier
    smoothing: float = 0.05  # ν, the published code's; 0 is DeComFL
    floor: float = 1e-8  # ε', far below the squares that make H: H falls to it only where nothing moves
    weighting: Weighting = "equal"  # the paper's
    training: ZerothOrder = field(  # the published command's, one step a round
        default_factory=lambda: ZerothOrder(
            learning_rate=1e-5, perturbation=1e-3, steps=1, batch_size=32, difference="forward"
        )
    )

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise UserError(f"directions={self.directions}: must be at least 1")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"smoothing={self.smoothing}: must lie in [0, 1); 0 is DeComFL")
        if not 1e-16 <= self.floor <= 1:  # directions are up to 1 / √floor times as long as they begin
            raise UserError(f"floor={self.floor}: must be from 1e-16 to 1, which is where the diagonal begins")
        if self.training.weight_decay:
            raise UserError(
                f"training.weight_decay={self.training.weight_decay}: no sum of directions decays; set it to 0"
            )

    @property
    def num_values(self) -> int:
        """T P, how many scalars a client sends."""
        return self.training.steps * self.directions

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Four bytes a direction, both ways."""
        return WireCost.exact(4 * self.num_values, 4 * self.num_values)

    def sum_values(self, shapes: Shapes, round: int) -> int:
        """The scalars."""
        return self.num_values

    def init(self, task: Task, key: Key) -> tuple[HiSoPublic, None]:
        """The base weights; every direction as long as any other."""
        weights = task.store(tree.parameters(task.model))
        curvature = tree.zeros_like(weights)
        for diagonal in curvature.values():
            diagonal.fill_(1.0)
        return HiSoPublic(weights, curvature, key.fold("directions").value), None

    def client_update(
        self, task: Task, public: HiSoPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, Gradients]:
        """Walk along the round's directions; send what was found."""
        move = partial(add_stretched_, public.curvature)
        with loaded(task, public.weights):
            gradients, metrics = self.training.walk(
                task, data, key.fold("train"), _drawn_by(task, public), range(self.num_values), self.directions, move
            )
        return ClientReply(Gradients(torch.tensor(gradients, dtype=torch.float32)), None, metrics)

    def accept(self, task: Task, public: HiSoPublic, payload: Gradients) -> None:
        """Refuse another number or kind of scalars; those that are not finite are refused when they pool."""
        self.accept_sum(task, public, payload)
        if payload.gradients.dtype != torch.float32:
            raise ValueError(f"gradients of {payload.gradients.dtype} came where fp32 was expected")

    def accept_sum(self, task: Task, public: HiSoPublic, sum: Gradients) -> None:
        """Refuse a sum of another length."""
        if not isinstance(sum, Gradients) or sum.gradients.shape != (self.num_values,):
            raise ValueError(f"what came is not {self.num_values} gradients: the client has other settings")

    def update_norm(self, task: Task, public: HiSoPublic, payload: Gradients) -> float:
        """η √(Σ 1/H · Σ g²) / P, the expectation over directions."""
        stretched = sum(float(diagonal.double().reciprocal().sum()) for diagonal in public.curvature.values())
        squares = float(payload.gradients.double().square().sum())
        return (
            self.training.learning_rate * self.training.factor(task) * math.sqrt(stretched * squares) / self.directions
        )

    def server_update(
        self, task: Task, public: HiSoPublic, server: None, pooled: Pooled[Gradients], key: Key
    ) -> tuple[None, HiSoEntry]:
        """The mean is the entry."""
        return None, HiSoEntry(pooled.only.gradients)

    def apply(self, task: Task, public: HiSoPublic, entry: HiSoEntry) -> None:
        """Step along all directions, then renew H from the last step's; both with the H of before."""
        directions, columns = _drawn_by(task, public), range(self.num_values)
        factors = entry.gradients * self.training.factor(task) * (-self.training.learning_rate / self.directions)
        last = slice(self.num_values - self.directions, self.num_values)
        offset = 0
        for name, weight in public.weights.items():
            diagonal = public.curvature[name]
            weight.add_(_stretched(diagonal, directions, columns, factors, offset).to(weight.device))
            if self.smoothing:
                mean = entry.gradients[last] / self.directions
                squares = _stretched(diagonal, directions, columns[last], mean, offset).square_()
                diagonal.mul_(1 - self.smoothing).add_(squares.add_(self.floor).mul_(self.smoothing))
            offset += weight.numel()

    @contextmanager
    def model(self, task: Task, public: HiSoPublic, client: None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model


def add_stretched_(
    curvature: Mapping[str, Tensor], weights: Mapping[str, Tensor], key: Key, columns: Sequence[int], factors_K: Tensor
) -> None:
    """Add the sum over k of factors_K[k] H^(-1/2) z(columns[k]) to weights, in place.

    Args:
        curvature: H, fp32, above 0, by name.
        weights: any float dtypes, by the same names; positions count on from tensor to tensor.
        key: of the directions.
        columns: K indices from 0 to 2^32 - 1.
        factors_K: rounded to fp32, shape (K,).
    """
    offset = 0
    for name, weight in weights.items():
        weight.add_(_stretched(curvature[name].to(weight.device), key, columns, factors_K, offset))
        offset += weight.numel()


def _stretched(diagonal: Tensor, key: Key, columns: Sequence[int], factors_K: Tensor, offset: int) -> Tensor:
    """One tensor's part of the sum; root and division are exactly rounded, so all nodes have the same bits."""
    return add_gaussians_(torch.zeros_like(diagonal), key, columns, factors_K, offset).div_(diagonal.sqrt())


def _drawn_by(task: Task, public: HiSoPublic) -> Key:
    """Of the round's directions."""
    return Key(public.seed).fold(task.round)
