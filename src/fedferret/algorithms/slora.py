"""SLoRA: sparse tuning of the matrices first; LoRA then begins from what they learned, not from zero.

Babakniya, Elkordy, Ezzeldin, Liu, Song, El-Khamy, Avestimehr. "SLoRA: Federated Parameter Efficient Fine-Tuning of
Language Models", FL@FM-NeurIPS 2023, arXiv 2308.06522.

    rounds 1 .. R1      FedAvg of ``density`` of every tuned matrix, at a seeded mask; all else frozen
    hand-over           ΔW = W - W0 -> U S Vᵀ (SVD), s = α / r
                        "b": B = U_r S_r / s, A = V_rᵀ      "balanced": B = U_r √(S_r / s), A = √(S_r / s) V_rᵀ
    rounds R1+1 ..      FedIT of A and B over W0

A classifier's head is tuned whole in both stages and kept. s B A is the best approximation of ΔW of rank r; the share
of ΔW's energy that it keeps is reported. With no first round it is FedIT, to the bit; with density 1 the first stage is
FedAvg of the matrices, and the method is the paper's Primed-LoRA. The first stage is ``sparse_fedavg.py``.

Wire: rounds 1 .. R1: 4 Σ round(density · rows · columns), each at least 1, bytes up and down; from then on 4 Σ r (rows
+ columns), which is the download of round R1 too: its entry is the factors. A head adds 4 bytes a weight both ways.

Deviations: a mask has exactly its share of ones. The paper's text was not at hand; masked are the matrices that LoRA
tunes, since ΔW elsewhere would be lost with W0. Defects of the third-party code (FederatedScope's FlexLoRA) are left
out: a mask per client, whole weights on the wire, decay off the mask, ΔW counted twice after the hand-over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from fedferret.algorithms.fedit import adam
from fedferret.algorithms.lora_stage import LoRAStage, figures
from fedferret.algorithms.sparse_fedavg import Masks, SparseFedAvg, is_dense
from fedferret.bases.low_rank import Split, of_matrix
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
class SLoRA(Staged):
    """Sparse FedAvg, then FedIT from the factors of what was learned."""

    name: ClassVar[str] = "slora"
    sparse_rounds: int = 5  # R1, the third-party code's, of at most 50
    density: float = 0.01  # of the abstract; rank 8 in matrices of 576 x 576 sends three times as much
    mask: Masks = "fixed"  # "per-round" draws another every round: in time all values are tuned
    split: Split = "b"  # the code's: A is orthonormal; "balanced" gives both factors the same norm
    rank: int = 8  # r, FedIT's
    alpha: int | float = 16  # α, FedIT's
    modules: str | tuple[str, ...] | None = None  # of both stages, FedIT's
    server_learning_rate: float = 1.0  # of both stages, FedAvg's
    weighting: Weighting = "examples"  # of both stages, FedAvg's
    sparse_training: FirstOrder = field(default_factory=adam)  # of the first stage; few weights, so as LoRA's
    training: FirstOrder = field(default_factory=adam)  # of the second, FedIT's

    def __post_init__(self) -> None:
        if self.sparse_rounds < 0:
            raise UserError(f"sparse_rounds={self.sparse_rounds}: must not be negative; 0 is FedIT")
        self.stages()  # each refuses its settings

    def stages(self) -> tuple[Stage, ...]:
        """Sparse, then low-rank."""
        shared: dict[str, Any] = {
            "modules": self.modules,
            "server_learning_rate": self.server_learning_rate,
            "weighting": self.weighting,
        }
        sparse = SparseFedAvg(density=self.density, mask=self.mask, training=self.sparse_training, **shared)
        lora = LoRAStage(rank=self.rank, alpha=self.alpha, training=self.training, **shared)
        into = IntoFactors(lora, self.split)
        return Stage(sparse, self.sparse_rounds, into, into.num_values), Stage(lora)

    def check(self, model: nn.Module, rounds: int) -> None:
        """Both stages must be possible, and the second must have a round."""
        if self.sparse_rounds >= rounds:
            raise UserError(
                f"sparse_rounds={self.sparse_rounds}: the run has {rounds} rounds, and none is left to LoRA; raise "
                f"rounds or lower sparse_rounds"
            )
        super().check(model, rounds)


@dataclass(frozen=True)
class IntoFactors:
    """Hands over what a stage added to matrices as LoRA factors over the base; a head stays dense.

    Attributes:
        following: the stage that gets the factors.
        split: which factor holds the singular values.
    """

    following: LoRAStage
    split: Split

    def __call__(self, task: Task, base: Tree, finished: AnyAlgorithm, public: Any, key: Key) -> HandedOver:
        """See ``core/hand_over.py``; ``public`` has the matrices."""
        handed, found = dict[str, Tensor](), []
        for name, weight in public.weights.items():
            if is_dense(name):
                handed[name] = weight.cpu().clone()
                continue
            module = name.removesuffix(".weight")
            update = weight.cpu().double() - base[name].cpu().double()
            if not isinstance(task.model.get_submodule(module), nn.Linear):
                update = update.T  # GPT-2's Conv1D holds its matrix transposed
            low = of_matrix(update, self.following.rank, self.following.scale, self.split, key.fold(name))
            handed |= {module + FACTOR_A: low.a, module + FACTOR_B: low.b}
            found.append(low)
        return HandedOver(handed, figures(found))

    def num_values(self, shapes: Shapes) -> int:
        """Values of the factors and of a head, from the shapes of the first stage's tensors."""
        rank, tensors = self.following.rank, shapes.items()
        return sum(math.prod(shape) if is_dense(name) else rank * sum(shape) for name, shape in tensors)
