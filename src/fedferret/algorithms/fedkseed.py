"""FedKSeed: all weights tuned with forward passes, along directions from a pool that everybody can make from a number.

Qin, Chen, Qian, Ding, Li, Deng. "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
Cost under 18 Kilobytes", ICML 2024, arXiv 2312.06353, Algorithm 1.

    client j:  T times: a seed s of K, g = (loss(w + ε z(s)) - loss(w - ε z(s))) / 2 ε, w <- w - η g z(s)
               send the T pairs (s, g)
    server:    a(s) = Σ_j n_j Σ g of client j's steps on s / Σ_j n_j
    everybody: w <- w - η Σ_s a(s) z(s)                     pool(s) <- pool(s) + a(s)

FedKSeed-Pro draws s with the probabilities softmax(m'), m' being m scaled to [0, 1] and m(s) the mean over all steps so
far of |g|, cut at 1000; as in the published code a history begins with one zero, and all are equal before round 1.

Wire, with i = 2 bytes for a seed's number (4 if K > 32,768): (4 + i) T up per client and round; down (4 + i) M for the
M <= min(K, N T) seeds that N clients used, or 4 K, whichever is fewer. Pro sends their m too: 4 more bytes a seed down.

Deviations: g travels step by step, so Pro's history costs nothing more up; there, a client's steps count by its weight;
m travels instead of the probabilities. Weights are moved by what is new, not rebuilt from the base and the pool, which
takes up to K passes over them; a late client gets the entries it missed. The pool still says all that tuning did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedkseed_messages import DecodedWalk, FedKSeedEntry, FedKSeedPublic, FedKSeedServer, Walk
from fedferret.algorithms.full_model import loaded
from fedferret.bases.gaussian import add_directions_
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Pooled, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.zeroth_order import ZerothOrder

_SHORT = 2**15  # numbers below it take two bytes


@dataclass(frozen=True, kw_only=True)
class FedKSeed(Algorithm[FedKSeedPublic, FedKSeedServer, None, FedKSeedEntry, Walk]):
    """Zeroth-order walks along K shared directions. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fedkseed"
    pool_size: int = 4096  # K, the paper's
    sampling: Literal["uniform", "magnitude"] = "uniform"  # of seeds; by their gradients' magnitude is FedKSeed-Pro
    weighting: Weighting = "examples"
    training: ZerothOrder = field(default_factory=ZerothOrder)

    def __post_init__(self) -> None:
        if not 0 < self.pool_size < 2**31:
            raise UserError(f"pool_size={self.pool_size}: must lie between 1 and {2**31 - 1}")
        if self.training.weight_decay:
            raise UserError(
                f"training.weight_decay={self.training.weight_decay}: no sum of directions decays; set it to 0"
            )

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """(4 + i) T up; down from one seed for all steps to one for every step of the cohort."""
        number, steps = self._number.itemsize, self.training.steps
        each = 4 if self.sampling == "uniform" else 8
        up, all_seeds = (4 + number) * steps, each * self.pool_size
        most_used = min(self.pool_size, cohort * steps)
        return WireCost(up, up, min(each + number, all_seeds), min((each + number) * most_used, all_seeds))

    def sum_values(self, shapes: Shapes, round: int) -> int:
        """Three sums over the pool."""
        return 3 * self.pool_size

    def init(self, task: Task, key: Key) -> tuple[FedKSeedPublic, FedKSeedServer]:
        """The base weights, an empty pool, no history."""
        weights = task.store(tree.parameters(task.model))
        public = FedKSeedPublic(weights, self._zeros(), self._zeros(), key.fold("directions").value)
        return public, FedKSeedServer(self._zeros(), self._zeros())

    def client_update(
        self, task: Task, public: FedKSeedPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, Walk]:
        """Walk along seeds drawn from the pool; send what was found."""
        seeds = drawn(probabilities(public.magnitudes), self.training.steps, key.fold("seeds"))
        with loaded(task, public.weights):
            directions = Key(public.seed)
            gradients, metrics = self.training.walk(task, data, key.fold("train"), directions, seeds.tolist())
        walk = Walk(seeds.to(self._number), torch.tensor(gradients, dtype=torch.float32), self.pool_size)
        return ClientReply(walk, None, metrics)

    def accept(self, task: Task, public: FedKSeedPublic, payload: Walk) -> None:
        """Refuse steps of the wrong number or kind; those that are not finite are refused when they pool."""
        if not isinstance(payload, Walk):
            raise ValueError(f"a {type(payload).__name__} came where a Walk was expected")
        steps = (self.training.steps,)
        if (payload.seeds.shape, payload.gradients.shape, payload.pool_size) != (steps, steps, self.pool_size):
            raise ValueError("the walk has another length or pool: the client has other settings")
        if (payload.seeds.dtype, payload.gradients.dtype) != (self._number, torch.float32):
            raise ValueError(f"seeds of {payload.seeds.dtype} and gradients of {payload.gradients.dtype} came")
        if not 0 <= int(payload.seeds.min()) <= int(payload.seeds.max()) < self.pool_size:
            raise ValueError(f"seeds came that are not among the pool's {self.pool_size}")

    def accept_sum(self, task: Task, public: FedKSeedPublic, sum: DecodedWalk) -> None:
        """Refuse sums over another pool."""
        known = isinstance(sum, DecodedWalk)
        if not known or {part.shape for part in (sum.gradients, sum.magnitudes, sum.steps)} != {(self.pool_size,)}:
            raise ValueError(f"sums came that are not over the pool's {self.pool_size} seeds")

    def update_norm(self, task: Task, public: FedKSeedPublic, payload: Walk) -> float:
        """η √(d Σ_s a(s)²), the expectation over directions: those of different seeds are nearly orthogonal."""
        squares = float(payload.decoded().gradients.double().square().sum())
        rate = self.training.learning_rate * self.training.factor(task)
        return rate * math.sqrt(tree.size(public.weights) * squares)

    def server_update(
        self, task: Task, public: FedKSeedPublic, server: FedKSeedServer, pooled: Pooled[DecodedWalk], key: Key
    ) -> tuple[FedKSeedServer, FedKSeedEntry]:
        """The mean walk, and with Pro the new history, of the seeds that were used."""
        mean = pooled.only
        rows = [mean.gradients]
        if self.sampling == "magnitude":
            clients = len(pooled.weights)
            server = FedKSeedServer(server.magnitudes + clients * mean.magnitudes, server.steps + clients * mean.steps)
            rows.append(server.magnitudes / (1 + server.steps))  # 1: the zero that a history begins with
        values, used = torch.stack(rows), mean.steps.nonzero().squeeze(1).to(self._number)
        if len(used) * (4 * len(rows) + used.itemsize) < 4 * values.numel():
            return server, FedKSeedEntry(used, values[:, used.long()])
        return server, FedKSeedEntry(used[:0], values)

    def apply(self, task: Task, public: FedKSeedPublic, entry: FedKSeedEntry) -> None:
        """w <- w - η Σ_s a(s) z(s), in the seeds' order."""
        seeds = entry.seeds.long() if len(entry.seeds) else torch.arange(self.pool_size)
        gradients, *magnitudes = entry.values
        gradients = gradients * self.training.factor(task)  # the walks' rate, in units of η
        public.pool[seeds] += gradients
        if magnitudes:
            public.magnitudes[seeds] = magnitudes[0]
        moved = gradients.nonzero().squeeze(1)
        factors = gradients[moved] * -self.training.learning_rate
        add_directions_(public.weights, Key(public.seed), seeds[moved].tolist(), factors)

    @contextmanager
    def model(self, task: Task, public: FedKSeedPublic, client: None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model

    @property
    def _number(self) -> torch.dtype:
        return torch.int16 if self.pool_size <= _SHORT else torch.int32

    def _zeros(self) -> Tensor:
        return torch.zeros(self.pool_size)


@dataclass(frozen=True, kw_only=True)
class FedKSeedPro(FedKSeed):
    """FedKSeed that prefers the directions along which the loss changes most."""

    name: ClassVar[str] = "fedkseed-pro"
    sampling: Literal["uniform", "magnitude"] = "magnitude"  # what makes it Pro


def probabilities(magnitudes_K: Tensor) -> Tensor:
    """Softmax of the magnitudes scaled to [0, 1]; equal ones give equal probabilities.

    Args:
        magnitudes_K: of each seed's projected gradients, at least 0, any float dtype, shape (K,).

    Returns:
        fp64, shape (K,), with the sum 1.
    """
    above = magnitudes_K.double() - magnitudes_K.min()
    return torch.softmax(above / (above.max() + 1e-10), 0)  # 1e-10: the published guard against a division by zero


def drawn(probabilities_K: Tensor, count: int, key: Key) -> Tensor:
    """Draw with replacement.

    Args:
        probabilities_K: on any scale, at least 0, shape (K,).
        count: of draws.
        key: of the draws.

    Returns:
        Numbers below K, int64, shape (count,).
    """
    cumulative = probabilities_K.cumsum(0)
    found = torch.searchsorted(cumulative, key.uniform(count) * cumulative[-1], right=True)
    return found.clamp_(max=len(cumulative) - 1)  # a product may round up to the last bound
