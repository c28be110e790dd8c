"""The server's optimiser: the mean update of the clients taken for a gradient. A setting of methods that average.

    average    Δ                                                       FedAvg
    momentum   m <- β m + Δ                         the step is m      FedAvgM
    adagrad    v <- v + Δ²                          the step of the three: m <- β₁ m + (1 - β₁) Δ,
    adam       v <- β₂ v + (1 - β₂) Δ²                                  α m / (√v + τ)
    yogi       v <- v - (1 - β₂) Δ² sign(v - Δ²)

m = 0 and v = τ² before the first round, and there is no bias correction. Everybody: w <- w - η step, η the method's
``server_learning_rate``. The step is the entry in place of Δ, so nothing else crosses the wire; m and v are the
server's own. Every weight is a coordinate by itself: one that a round does not move keeps its m and v.

FedAvgM: Hsu, Qi, Brown. "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
2019, arXiv 1909.06335. The others: Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. "Adaptive Federated
Optimization", ICLR 2021, arXiv 2003.00295, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedferret.core.errors import UserError
from fedferret.core.messages import state

_READ: Mapping[str, Mapping[str, float]] = {  # what each optimiser reads, with its value where none is given
    "average": {},
    "momentum": {"beta_1": 0.9},
    "adagrad": {"learning_rate": 0.1, "beta_1": 0.0, "tau": 1e-3},
    "adam": {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3},
    "yogi": {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3},
}


@state
class Moments:
    """The server's memory of mean updates, by the weights' names, fp32."""

    first: dict[str, Tensor]  # m
    second: dict[str, Tensor]  # v; empty with momentum


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """What the server makes of the mean update. A setting that the named optimiser does not read is refused."""

    name: Literal["average", "momentum", "adagrad", "adam", "yogi"] = "average"  # FedAvg's
    learning_rate: float | None = None  # α; 0.01, of adagrad 0.1; ours, to be tuned
    beta_1: float | None = None  # β or β₁; 0.9, of adagrad 0, as in the papers
    beta_2: float | None = None  # β₂; 0.99, the paper's
    tau: float | None = None  # τ; 0.001, with which the paper's tasks all learn

    def __post_init__(self) -> None:
        read = _READ[self.name]
        for setting in ("learning_rate", "beta_1", "beta_2", "tau"):
            value = getattr(self, setting)
            if value is None:
                object.__setattr__(self, setting, read.get(setting))
            elif setting not in read:
                instead = "set server_learning_rate" if setting == "learning_rate" else "leave it out"
                raise UserError(f'{setting}={value}: name="{self.name}" does not read it; {instead}')
        for setting in ("learning_rate", "tau"):
            value = getattr(self, setting)
            if value is not None and not value >= 1e-15:  # its square is still a number of fp32
                raise UserError(f"{setting}={value}: must be at least 1e-15")
        for setting in ("beta_1", "beta_2"):
            value = getattr(self, setting)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{setting}={value}: must lie in [0, 1), or nothing new would count")

    @property
    def moments(self) -> int:
        """How many values the server keeps of each weight that a round updates."""
        return {"average": 0, "momentum": 1}.get(self.name, 2)

    def refuse(self, reason: str) -> None:
        """Refuse anything but the average, for a method with another server.

        Args:
            reason: what the method's server does.

        Raises:
            UserError: another optimiser than "average" is set.
        """
        if self.name != "average":
            raise UserError(f'server_optimizer.name="{self.name}": {reason}; leave server_optimizer out')

    def step(self, before: Moments | None, update: dict[str, Tensor]) -> tuple[Moments | None, dict[str, Tensor]]:
        """One round of the optimiser.

        Args:
            before: the memory after the round before; None before the first. Not changed.
            update: Δ, by name, fp32; not changed.

        Returns:
            The memory after the round, None with "average", and what the weights go down along.

        Raises:
            ValueError: a tensor has another shape than the memory of that name.
        """
        if self.name == "average":
            return None, update
        known = before or Moments({}, {})
        first, second, steps = dict(known.first), dict(known.second), dict[str, Tensor]()
        for name, delta in update.items():
            m = self._remembered(known.first, name, delta, 0.0)
            assert self.beta_1 is not None
            if self.name == "momentum":
                first[name] = steps[name] = torch.add(delta, m, alpha=self.beta_1)
                continue
            assert self.learning_rate is not None and self.tau is not None
            first[name] = self.beta_1 * m + (1 - self.beta_1) * delta
            second[name] = self._second(self._remembered(known.second, name, delta, self.tau**2), delta.square())
            steps[name] = self.learning_rate * first[name] / (second[name].sqrt() + self.tau)
        return Moments(first, second), steps

    def _second(self, v: Tensor, squares: Tensor) -> Tensor:
        if self.name == "adagrad":
            return v + squares
        assert self.beta_2 is not None
        if self.name == "adam":
            return self.beta_2 * v + (1 - self.beta_2) * squares
        return v - (1 - self.beta_2) * squares * torch.sign(v - squares)

    @staticmethod
    def _remembered(known: Mapping[str, Tensor], name: str, delta: Tensor, initial: float) -> Tensor:
        if name not in known:
            return torch.full_like(delta, initial)
        if known[name].shape != delta.shape:
            raise ValueError(f"{name} changed its shape: the server's optimiser remembers it by coordinate")
        return known[name].to(delta.device)
