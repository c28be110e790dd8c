"""FedPM: random weights stay as they were drawn, and clients learn which of them to keep: a bit a weight.

Isik, Pase, Gündüz, Weissman, Zorzi. "Sparse Random Networks for Communication-Efficient Federated Learning", ICLR 2023,
arXiv 2209.15328, Algorithms 1 and 2.

    weights    w = ± σ at every place of a matrix, signs drawn by the run's key, σ = √(2 / inputs); never trained
    public     θ, the probability that a weight is kept; 0.5 at first
    client j   scores s <- logit θ;  T local steps: mask m ~ Bernoulli(sigmoid(s)) drawn anew each step, the gradient
               of the loss of w m passes through the draw: ∂s = ∂(w m) w sigmoid'(s)
               send m_j ~ Bernoulli(sigmoid(s))
    server     θ <- the mean of the m_j of all rounds since the last reset                  everybody: θ

Wire: d/8 bytes up per client and round, each matrix in whole bytes; 4 d down. Masked are the matrices (and kernels);
biases and norms stay as the base has them. A public key draws the model that is scored and exported. Deviations:
docs/methods/fedpm.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedpm_messages import (
    DecodedMask,
    FedPMEntry,
    FedPMPublic,
    FedPMServer,
    Mask,
    drawn,
    packed,
)
from fedferret.algorithms.full_model import UpdateRefused, check_tensors, loaded
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Pooled, Shapes, StateBytes, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder

EDGE = 0.01  # scores begin from probabilities that are no nearer to 0 and 1: a logit would be infinite


@dataclass(frozen=True, kw_only=True)
class FedPM(Algorithm[FedPMPublic, FedPMServer, None, FedPMEntry, Mask]):
    """The mean of masks over random weights. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fedpm"
    changes_base: ClassVar[bool] = True  # the matrices are other ones: no adapter holds these
    reset_every: int = 1  # rounds that count together; the paper has more where few clients take part in a round
    training: FirstOrder = field(  # of the scores; the paper's Adam
        default_factory=lambda: FirstOrder(optimizer="adamw", learning_rate=0.1, clip=None)
    )

    def __post_init__(self) -> None:
        if self.reset_every < 1:
            raise UserError(f"reset_every={self.reset_every}: must be at least 1, the mean of the round's masks")

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """Freeze all but matrices and kernels."""
        for weight in model.parameters():
            weight.requires_grad_(weight.requires_grad and weight.ndim > 1)
        return model

    def check(self, model: nn.Module, rounds: int) -> None:
        """There must be matrices."""
        if not tree.parameters(model):
            raise UserError("fedpm: no matrix of this model is tuned; leave model.train out")

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """A bit a weight up, each tensor in whole bytes; four bytes down."""
        sizes = [math.prod(shape) for shape in shapes.values()]
        return WireCost.exact(sum(math.ceil(size / 8) for size in sizes), 4 * sum(sizes))

    def state_growth(self, model: nn.Module, shapes: Shapes, round: int, clients: int) -> StateBytes:
        """How often each weight was kept."""
        return StateBytes(server=4 * sum(math.prod(shape) for shape in shapes.values()))

    def init(self, task: Task, key: Key) -> tuple[FedPMPublic, FedPMServer]:
        """Every weight is kept with probability one half."""
        halves = {name: torch.full_like(weight, 0.5) for name, weight in tree.parameters(task.model).items()}
        return FedPMPublic(task.store(halves), key.fold("masks").value), FedPMServer({}, 0, 0)

    def client_update(
        self, task: Task, public: FedPMPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, Mask]:
        """Train the scores; send one draw of the mask."""
        values, training = self._values(public), self.training
        near = {name: each.detach().to(task.device).clamp(EDGE, 1 - EDGE) for name, each in public.weights.items()}
        scores = {name: nn.Parameter(torch.logit(each)) for name, each in near.items()}
        optimizer, total, taken = training.optimizer_over(list(scores.values())), training.total_steps(len(data)), 0

        def masked(step: int) -> dict[str, Tensor]:
            draws = {n: drawn(s.detach().sigmoid(), key.fold("mask", step, n)) for n, s in scores.items()}
            return {name: values[name].to(task.device) * draw.to(task.device) for name, draw in draws.items()}

        @torch.no_grad()
        def adjust(parameters: Mapping[str, nn.Parameter]) -> None:
            nonlocal taken
            for name, weight in parameters.items():
                kept = scores[name].sigmoid()
                if weight.grad is not None:
                    scores[name].grad = weight.grad * values[name].to(weight.device) * kept * (1 - kept)
                weight.grad = None  # the weights themselves take no step
            if training.clip is not None:
                torch.nn.utils.clip_grad_norm_(scores.values(), training.clip)
            for group in optimizer.param_groups:
                group["lr"] = training.rate(task, taken, total)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            taken += 1
            tree.copy_(parameters, masked(taken))

        plain = replace(training, optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=None)
        with loaded(task, masked(0)):
            trained = plain.train(task, data, key.fold("train"), adjust=adjust)
        for name, score in scores.items():
            if not score.isfinite().all():
                raise UpdateRefused(f"the scores of {name} hold NaN or infinity: lower the learning rate")
        sent = {name: packed(drawn(s.detach().sigmoid(), key.fold("sent", name))) for name, s in scores.items()}
        return ClientReply(Mask(sent), None, trained.metrics)

    def accept(self, task: Task, public: FedPMPublic, payload: Any) -> None:
        """Refuse masks of other tensors."""
        if not isinstance(payload, Mask):
            raise ValueError(f"a {type(payload).__name__} came where a Mask was expected")
        check_tensors(_flat(public, 1), payload.bits, torch.uint8)

    def accept_sum(self, task: Task, public: FedPMPublic, sum: Any) -> None:
        """Refuse a sum of other names or lengths."""
        if not isinstance(sum, DecodedMask):
            raise ValueError(f"a sum of type {type(sum).__name__} came where a DecodedMask was expected")
        check_tensors(_flat(public, 8), sum.ones, None)

    def server_update(
        self, task: Task, public: FedPMPublic, server: FedPMServer, pooled: Pooled[DecodedMask], key: Key
    ) -> tuple[FedPMServer, FedPMEntry]:
        """The share of masks in which a weight was kept."""
        count, begins = len(pooled.weights), server.rounds % self.reset_every == 0
        masks = count if begins else server.masks + count
        kept = {}
        for name, weight in public.weights.items():
            mean = pooled.only.ones[name][: weight.numel()].view(weight.shape).clamp(0, 1)
            kept[name] = mean if begins else (server.masks * server.ones[name].cpu() + count * mean) / masks
        return FedPMServer(kept, masks, server.rounds + 1), FedPMEntry(dict(kept))

    def apply(self, task: Task, public: FedPMPublic, entry: FedPMEntry) -> None:
        """The new probabilities."""
        tree.copy_(public.weights, entry.probabilities)

    @contextmanager
    def model(self, task: Task, public: FedPMPublic, client: None = None) -> Iterator[nn.Module]:
        """One draw of the model, with the same random numbers in every round."""
        values, key = self._values(public), Key(public.key).fold("model")
        draws = {name: values[name] * drawn(kept.cpu(), key.fold(name)) for name, kept in public.weights.items()}
        with loaded(task, draws) as model:
            yield model

    @staticmethod
    def _values(public: FedPMPublic) -> Mapping[str, Tensor]:
        return _signed(Key(public.key), tuple((name, tuple(each.shape)) for name, each in public.weights.items()))


def _flat(public: FedPMPublic, per_byte: int) -> dict[str, Tensor]:
    """Tensors of the lengths that masks have, in units of which each byte holds so many."""
    sizes = {name: math.ceil(weight.numel() / 8) * per_byte for name, weight in public.weights.items()}
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}


@lru_cache(maxsize=1)  # all clients of a run have the same
def _signed(key: Key, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Mapping[str, Tensor]:
    """The frozen weights: ± √(2 / inputs) each, by name."""
    values = {}
    for name, shape in shapes:
        signs = (key.fold("signs", name).bits(math.prod(shape)) < 0).float().mul_(2).sub_(1)
        values[name] = signs.view(shape) * math.sqrt(2 / math.prod(shape[1:]))
    return values
