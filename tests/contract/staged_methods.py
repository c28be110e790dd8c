"""A method of two stages, to know that the contract carries stages: any two methods, one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fedferret.algorithms.fedavg import FedAvg
from fedferret.algorithms.fedit import FedIT
from fedferret.core.algorithm import AnyAlgorithm
from fedferret.core.hand_over import HandOver, Stage, tuned_weights
from fedferret.core.stages import Staged


@dataclass(frozen=True, kw_only=True)
class TwoStages(Staged):
    """``first`` for ``first_rounds``, then ``second`` for the rest. Wire: each stage's."""

    name: ClassVar[str] = "two-stages"
    first_rounds: int = 2
    first: AnyAlgorithm = field(default_factory=FedAvg)
    second: AnyAlgorithm = field(default_factory=FedAvg)
    hand_over: HandOver = tuned_weights

    def stages(self) -> tuple[Stage, ...]:
        return Stage(self.first, self.first_rounds, self.hand_over), Stage(self.second)


@dataclass(frozen=True, kw_only=True)
class FullThenLoRA(Staged):
    """All weights, then LoRA on top of them: a method whose fields are TOML."""

    name: ClassVar[str] = "full-then-lora"
    full_rounds: int = 2  # rounds of the first stage; 0 is FedIT alone
    full: FedAvg = field(default_factory=FedAvg)
    lora: FedIT = field(default_factory=FedIT)

    def stages(self) -> tuple[Stage, ...]:
        return Stage(self.full, self.full_rounds), Stage(self.lora)
