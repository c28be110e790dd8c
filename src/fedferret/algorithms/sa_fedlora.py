"""SA-FedLoRA: all weights first, held near the global ones; then LoRA of a rank that falls, as heat does in annealing.

"SA-FedLoRA: Adaptive Parameter Allocation for Efficient Federated Learning with LoRA Tuning", arXiv 2405.09394v1, May
2024 (version 2 is another paper). Its full text was not at hand: the method is what abstract and summaries say, and the
constants are ours.

    rounds 1 .. T0      FedProx of all weights; the model is then frozen
    heating             FedIT of rank r_max, for H rounds
    annealing           r = round(r_min + (r_max - r_min) (1 - i/N)^exponent) in round i of N
    cooling             r_min, to the end
    where r falls       s B A -> U S Vᵀ (SVD) -> B = U_r √(S_r / s'), A = √(S_r / s') V_rᵀ,  with s = α / r, s' = α / r'

Wire: 4 P bytes up and down in rounds 1 .. T0, P all weights; then 4 Σ r (rows + columns) up with the round's r, and
down with that of the round after: at a fall the server's SVD is the entry. A classifier's head adds 4 bytes a weight.

A rank is a stage (``core/stages.py``). A client's optimiser is fresh every round, as everywhere here, so no moments are
projected. With no first stage and one rank it is FedIT to the bit; with the first stage alone FedProx.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from fedferret.algorithms.fedit import adam
from fedferret.algorithms.fedprox import FedProx
from fedferret.algorithms.lora_stage import LoRAStage, figures
from fedferret.bases.low_rank import of_product
from fedferret.core.algorithm import AnyAlgorithm, Shapes, Weighting
from fedferret.core.errors import UserError
from fedferret.core.hand_over import HandedOver, Stage
from fedferret.core.keys import Key
from fedferret.core.stages import Staged
from fedferret.core.task import Task
from fedferret.core.tree import Tree
from fedferret.local.first_order import FirstOrder
from fedferret.models.adapters import FACTOR_A, FACTOR_B


@dataclass(frozen=True, kw_only=True)
class SAFedLoRA(Staged):
    """FedProx of all weights, then FedIT of falling rank."""

    name: ClassVar[str] = "sa-fedlora"
    full_rounds: int = 1  # T0; ours: 93.6% fewer bytes than FedAvg leave T0 at most 6.4% of the rounds
    mu: float = 0.01  # of the pull in these rounds, FedProx's
    heating_rounds: int = 3  # at the highest rank; ours
    annealing_rounds: int = 4  # N; ours; the rounds that are left are at the lowest rank
    max_rank: int = 16  # r_max; ours: twice FedIT's
    min_rank: int = 4  # r_min; ours: half of FedIT's
    exponent: float = 3.0  # AdaLoRA's cubic fall; 1 is linear
    alpha: int | float = 16  # α, FedIT's; the scale α / r grows as the rank falls
    modules: str | tuple[str, ...] | None = None  # with LoRA factors, FedIT's
    server_learning_rate: float = 1.0  # of all stages, FedAvg's
    weighting: Weighting = "examples"  # of all stages, FedAvg's
    full_training: FirstOrder = field(default_factory=FirstOrder)  # of the first stage, FedAvg's
    training: FirstOrder = field(default_factory=adam)  # of LoRA, FedIT's

    def __post_init__(self) -> None:
        if self.min_rank > self.max_rank:
            raise UserError(f"min_rank={self.min_rank}, max_rank={self.max_rank}: a rank must not rise; swap the two")
        if not self.exponent > 0:
            raise UserError(f"exponent={self.exponent}: must be above 0; 1 is linear, 3 cubic")
        for name in ("full_rounds", "heating_rounds", "annealing_rounds"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must not be negative; 0 leaves these rounds out")
        self.stages()  # each refuses its settings

    def ranks(self) -> tuple[tuple[int, int | None], ...]:
        """The schedule.

        Returns:
            Pairs of a rank and its rounds, falling; None: all rounds that are left.
        """
        fall = self.max_rank - self.min_rank
        by_round = [self.max_rank] * self.heating_rounds
        for number in range(1, self.annealing_rounds + 1):
            heat = (1 - number / self.annealing_rounds) ** self.exponent
            by_round.append(self.min_rank + math.floor(fall * heat + 0.5))
        above = dict.fromkeys(rank for rank in by_round if rank > self.min_rank)
        return *((rank, by_round.count(rank)) for rank in above), (self.min_rank, None)

    def stages(self) -> tuple[Stage, ...]:
        """Full, then one stage for every rank."""
        shared: dict[str, Any] = {"server_learning_rate": self.server_learning_rate, "weighting": self.weighting}
        lora = shared | {"alpha": self.alpha, "modules": self.modules, "training": self.training}
        stages = [Stage(FedProx(mu=self.mu, training=self.full_training, **shared), self.full_rounds)]
        ranks = [(LoRAStage(rank=rank, **lora), rounds) for rank, rounds in self.ranks()]
        for (stage, rounds), (following, _) in pairwise(ranks):
            lower = LowerRank(following)
            stages.append(Stage(stage, rounds, lower, lower.num_values))
        return *stages, Stage(*ranks[-1])

    def check(self, model: nn.Module, rounds: int) -> None:
        """Every stage must be possible, and the rank must come down."""
        above = sum(given or 0 for _, given in self.ranks())
        if above and rounds <= self.full_rounds + above:
            raise UserError(
                f"full_rounds={self.full_rounds}, heating_rounds={self.heating_rounds}, annealing_rounds="
                f"{self.annealing_rounds}: rank {self.min_rank} is reached in round {self.full_rounds + above + 1} of "
                f"{rounds}; raise rounds or shorten a stage"
            )
        super().check(model, rounds)


@dataclass(frozen=True)
class LowerRank:
    """Hands over factors as the best factors of a lower rank; a head stays dense.

    Attributes:
        following: the stage that gets them.
    """

    following: LoRAStage

    def __call__(self, task: Task, base: Tree, finished: AnyAlgorithm, public: Any, key: Key) -> HandedOver:
        """See ``core/hand_over.py``; ``public`` has the factors of the stage that is ``finished``."""
        assert isinstance(finished, LoRAStage)
        handed, found, weights = dict[str, Tensor](), [], public.weights
        for name, weight in weights.items():
            if name.endswith(FACTOR_A):
                other, scales = name.removesuffix(FACTOR_A) + FACTOR_B, (finished.scale, self.following.scale)
                low = of_product(weight, weights[other], *scales, self.following.rank, "balanced", key.fold(name))
                handed |= {name: low.a, other: low.b}
                found.append(low)
            elif not name.endswith(FACTOR_B):
                handed[name] = weight.cpu().clone()
        return HandedOver(handed, {"rank": float(self.following.rank), **figures(found)})

    def num_values(self, shapes: Shapes) -> int:
        """Values of the factors and of a head, from the shapes before."""
        rank, total = self.following.rank, 0
        for name, shape in shapes.items():
            if name.endswith((FACTOR_A, FACTOR_B)):
                total += rank * shape[1 if name.endswith(FACTOR_A) else 0]
            else:
                total += math.prod(shape)
        return total
