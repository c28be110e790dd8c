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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedferret.algorithms.full_model import Weighting, loaded, weight_of
from fedferret.bases.gaussian import add_directions_
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Examples, Payload, Pooled, Task, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.tree import Tree
from fedferret.local.zeroth_order import ZerothOrder

_HISTORY_CLIP = 1000.0  # the paper's bound on |g| in Pro's history
_SHORT = 2**15  # numbers below it take two bytes


@state
class FedKSeedPublic:
    """All weights, and the pool that led to them."""

    weights: Tree
    pool: Tensor  # (K,): what each direction was walked in all rounds, in units of -η
    magnitudes: Tensor  # (K,): Pro's m; zeros otherwise
    seed: int  # of the directions


@state
class FedKSeedServer:
    """Pro's history: the sums of |g| and the numbers of steps (K,), both weighted."""

    magnitudes: Tensor
    steps: Tensor


@message
class DecodedWalk:
    """Sums over a client's steps by seed, fp32 (K,): of g, of |g| up to the history's bound, and of 1. What adds up."""

    gradients: Tensor
    magnitudes: Tensor
    steps: Tensor


@message
class Walk(Payload):
    """A client's T steps in order: seeds' numbers, int16 or int32 (T,), and projected gradients, fp32 (T,)."""

    seeds: Tensor
    gradients: Tensor
    pool_size: int

    def decoded(self) -> DecodedWalk:  # type: ignore[override]
        """The steps by seed."""
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

    seeds: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class FedKSeed(Algorithm[FedKSeedPublic, FedKSeedServer, None, FedKSeedEntry, Walk]):
    """Zeroth-order walks along K shared directions."""

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

    def wire_cost(self, shapes: Mapping[str, tuple[int, ...]], cohort: int) -> WireCost:
        """(4 + i) T up; down the most it can be: every step of the cohort on a seed of its own."""
        number, steps = self._number.itemsize, self.training.steps
        each = 4 if self.sampling == "uniform" else 8
        most_used = min(self.pool_size, cohort * steps)
        return WireCost((4 + number) * steps, min((each + number) * most_used, each * self.pool_size))

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
        return ClientReply(walk, weight_of(data, self.weighting), None, metrics)

    def accept(self, task: Task, public: FedKSeedPublic, payload: Walk) -> None:
        """Refuse steps of the wrong number or kind; those that are not finite are refused when they pool."""
        steps = (self.training.steps,)
        if (payload.seeds.shape, payload.gradients.shape, payload.pool_size) != (steps, steps, self.pool_size):
            raise ValueError("the walk has another length or pool: the client plays with other settings")
        if (payload.seeds.dtype, payload.gradients.dtype) != (self._number, torch.float32):
            raise ValueError(f"seeds of {payload.seeds.dtype} and gradients of {payload.gradients.dtype} came")
        if not 0 <= int(payload.seeds.min()) <= int(payload.seeds.max()) < self.pool_size:
            raise ValueError(f"seeds came that are not among the pool's {self.pool_size}")

    def server_update(
        self, task: Task, public: FedKSeedPublic, server: FedKSeedServer, pooled: Pooled[Walk], key: Key
    ) -> tuple[FedKSeedServer, FedKSeedEntry]:
        """The mean walk, and with Pro the new history, of the seeds that were used."""
        mean: Any = pooled.only  # of OpenWalk: what pools is the opened form
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
    """Softmax of the magnitudes scaled to [0, 1], fp64 (K,); equal ones give equal probabilities."""
    above = magnitudes_K.double() - magnitudes_K.min()
    return torch.softmax(above / (above.max() + 1e-10), 0)  # 1e-10: the published guard against a division by zero


def drawn(probabilities_K: Tensor, count: int, key: Key) -> Tensor:
    """``count`` numbers below K with these probabilities, with replacement: int64 (count,)."""
    cumulative = probabilities_K.cumsum(0)
    found = torch.searchsorted(cumulative, key.uniform(count) * cumulative[-1], right=True)
    return found.clamp_(max=len(cumulative) - 1)  # a product may round up to the last bound
