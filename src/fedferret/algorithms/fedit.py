"""FedIT: FedAvg of LoRA factors: small matrices A and B that are added to the linear maps of a frozen model.

Zhang, Vahidian, Kuo, Li, Zhang, Wang, Chen. "Towards Building the Federated GPT: Federated Instruction Tuning",
ICASSP 2024, arXiv 2305.05644, Algorithm 1. LoRA: Hu et al., ICLR 2022, arXiv 2106.09685.

    model:     y = W x + (α / r) B A x, W frozen, B = 0 at first; A of r x inputs, B of outputs x r
    client j:  T local steps on all A and B, with a fresh optimiser
    server:    the mean of the A and the mean of the B, weighted by examples

Wire: 4 d bytes up per client and round, 4 d down, with d = Σ r (inputs + outputs) over the tuned modules. DoRA adds the
outputs of each to d, and ``modules_to_save`` adds their weights.

The mean of the products B A, which clients' models stand for, is not the product of the means; ``product_gap`` measures
the difference. It is zero where all A are equal, which ``freeze_a`` sees to (Sun et al., ICLR 2024, arXiv 2403.12313).
It says nothing of DoRA's magnitudes and norms: the model is no sum of them.

Deviations: no dropout on the way into A (the paper's code has 0.05), since it draws from the global generator; updates
travel instead of factors, which gives the same mean. Adam is AdamW without weight decay.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import FedAvg
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters

Factors = Mapping[str, tuple[Tensor, Tensor]]  # by module: A of (r, inputs), B of (outputs, r)

_DEFAULTS: Mapping[str, Any] = {"rank": 8, "alpha": 16, "rslora": False, "dora": False, "modules_to_save": ()}
_ONE_BY_ONE = {"batch_size": 1, "epochs": 1}  # how Ferret's paper trains all first-order baselines


def adam() -> FirstOrder:
    """As the authors have it; the learning rate is the Ferret paper's for Natural Instructions too (3e-5 for Dolly)."""
    return FirstOrder(optimizer="adamw", learning_rate=3e-4, clip=None)


def _sgd() -> FirstOrder:
    """No learning rate is published; this one did best of some on the tiny model, and is to be tuned."""
    return FirstOrder(learning_rate=1e-1, clip=None)


@dataclass(frozen=True, kw_only=True)
class FedIT(FedAvg):
    """The weighted mean of LoRA factors."""

    name: ClassVar[str] = "fedit"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"training": _ONE_BY_ONE},
        "shepherd": {
            "rank": 16,
            "modules": ["q_proj"],
            "training": {"batch_size": 8, "accumulate": 8, "epochs": 10, "clip": 1.0},
        },
    }
    rank: int | None = None  # r; 8 is the Ferret paper's, where no adapter says another
    alpha: int | float | None = None  # α, 16: scaled by α / r, so that a change of r needs no other learning rate
    modules: str | tuple[str, ...] | None = None  # the architecture's own; of a Llama's blocks every linear map
    freeze_a: bool = False  # True halves the bytes and makes the mean exact, for factors that can say less
    rslora: bool | None = None  # scaled by α / √r: ranks of hundreds learn as fast as small ones
    dora: bool | None = None  # magnitudes of the weights' rows are trained too, and travel
    modules_to_save: tuple[str, ...] | None = None  # modules that are trained densely beside the factors, and travel
    adapter: str | None = None  # peft's folder of an adapter to go on from; the settings above are the adapter's
    training: FirstOrder = field(default_factory=adam)

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        if self.adapter is None:
            for name, default in _DEFAULTS.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)

    def check(self, model: nn.Module, rounds: int) -> None:
        """No rank above a tuned matrix's, since it says no more and weighs more; a gate of one output is no matrix."""
        super().check(model, rounds)
        for name, (a, b) in adapters.factors(model).items():
            most = min(a.shape[1], b.shape[0])
            if self.rank is not None and self.rank > most > 1:
                raise UserError(
                    f"rank={self.rank}: {name} has {b.shape[0]} x {a.shape[1]} weights, so a product of "
                    f"factors has at most rank {most}; set rank={most} or less, or leave such modules out of modules"
                )

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model with LoRA factors."""
        if self.adapter is not None:
            given = {name: getattr(self, name) for name in _DEFAULTS} | {"modules": self.modules}
            return adapters.continued(model, Path(self.adapter), given, self.freeze_a).attach(model, key)
        assert self.rank and self.alpha and self.modules_to_save is not None  # set when made
        lora = adapters.LoRA(
            rank=self.rank,
            alpha=self.alpha,
            modules=self.modules,
            freeze_a=self.freeze_a,
            rslora=bool(self.rslora),
            dora=bool(self.dora),
            modules_to_save=self.modules_to_save,
        )
        return lora.attach(model, key)

    def start_fingerprint(self, base: str) -> str:
        """The base's, and with it that of the adapter that the run goes on from."""
        if self.adapter is None:
            return base
        return hashlib.sha256(
            f"{base} {adapters.read_peft_folder(Path(self.adapter)).fingerprint()}".encode()
        ).hexdigest()

    def release(self, model: nn.Module) -> nn.Module:
        """The factors merged into the base weights."""
        return adapters.released(model)


@dataclass(frozen=True, kw_only=True)
class FedITSGD(FedIT):
    """FedIT with plain gradient steps at the clients."""

    name: ClassVar[str] = "fedit-sgd"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"training": _ONE_BY_ONE}}
    training: FirstOrder = field(default_factory=_sgd)


def product_gap(clients: Sequence[Factors], weights: Sequence[float]) -> float:
    """How far FedIT's mean is from the mean of its clients' models, relative, over all modules:

        ‖Σ p_j B_j A_j − (Σ p_j B_j) (Σ p_j A_j)‖ / ‖Σ p_j B_j A_j‖,    p_j = weight j / all weights

    Args:
        clients: the factors of each, by module; every client has the same modules.
        weights: one per client, positive, on any scale.

    Returns:
        The gap, a share of 1; 0 where all A, or all B, are equal.
    """
    shares = [weight / sum(weights) for weight in weights]
    gap = size = 0.0
    for name in clients[0]:
        a = [client[name][0].detach().double() for client in clients]
        b = [client[name][1].detach().double() for client in clients]
        products = _mean([right @ left for left, right in zip(a, b, strict=True)], shares)
        gap += float((products - _mean(b, shares) @ _mean(a, shares)).square().sum())
        size += float(products.square().sum())
    return math.sqrt(gap / size) if size else 0.0


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(0)
