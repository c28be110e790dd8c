"""Fed-SB: LoRA with both factors frozen and a small matrix between them, which alone is trained and averaged.

Singhal, Ponkshe, Vartak, Varshney, Vepakomma. "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and
Performance in (Private) Federated LoRA Fine-Tuning", arXiv 2502.15436. LoRA-SB: arXiv 2411.19557; LoRA-XS: 2405.17604.

    model:     y = W x + B R A x; W, B and A frozen, R of r x r
    round 1    the server gets the mean gradient in rank r, U S Vᵀ, and sends B = U_r, A = V_rᵀ (``fed_sb_set_up.py``)
    R at first 0, or -first_step diag(S): the best step of rank r along the mean gradient
    client j:  T local steps on all R, with a fresh optimiser
    server:    the mean of the R, weighted by examples: Σ p_j B R_j A = B (Σ p_j R_j) A, exactly

Wire: round 1: 4 Σ r (outputs + inputs) bytes up and down over the tuned modules, and 4 r² a module down with
``first_step``. From then on ceil(bits Σ r² / 8) up and ceil(entry_bits Σ r² / 8) down. A classifier's head is part of
what is averaged. With ``initialisation = "random"`` there is no set-up: B and A are drawn by the run's key, R = 0.

Deviations: the paper's code decomposes the *sign* of the gradient over 50 examples of all clients together, at one
place. Here no client shows its examples: gradients travel in rank r, and no sign is taken, which their mean would need
whole. R = diag(S) of the code is the first, smallest step of a warm-up; here it is a setting. LoRA-XS decomposes W,
with other last bits on every machine, so its factors would have to be sent too: left out. Bits below 32 are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from fedferret.algorithms.fed_sb_set_up import FedSBSetUp, handed_over
from fedferret.algorithms.fedavg import FedAvgPublic
from fedferret.algorithms.full_model import loaded
from fedferret.algorithms.packed_average import PackedAverage
from fedferret.bases.quantise import Bits
from fedferret.core import tree
from fedferret.core.algorithm import Weighting
from fedferret.core.errors import UserError
from fedferret.core.hand_over import Stage, all_weights
from fedferret.core.keys import Key
from fedferret.core.messages import state
from fedferret.core.stages import Staged
from fedferret.core.task import Task
from fedferret.core.tree import Tree
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters

_FROZEN = (adapters.LATENT_A, adapters.LATENT_B)


def _training() -> FirstOrder:
    """Adam, as in the paper; the length of a step, η r, is about that of its code (1e-4 at rank 200). Tune it."""
    return FirstOrder(optimizer="adamw", learning_rate=1e-3, clip=None)


@state
class LatentPublic(FedAvgPublic):
    """All R, and A and B where these were handed over and not drawn."""

    factors: Tree


@dataclass(frozen=True, kw_only=True)
class LatentAverage(PackedAverage):
    """The weighted mean of the matrices between frozen factors."""

    name: ClassVar[str] = "fed-sb-average"
    rank: int
    modules: str | tuple[str, ...] | None
    drawn: bool  # whether A and B follow from the run's key

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model with three factors."""
        return adapters.Latent(rank=self.rank, modules=self.modules).attach(model, key)

    def release(self, model: nn.Module) -> nn.Module:
        """The factors merged into the base weights."""
        return adapters.released(model)

    def init(self, task: Task, key: Key) -> tuple[LatentPublic, None]:
        """The first values, of the frozen factors too where they are no draws."""
        public, _ = super().init(task, key)
        factors = {name: weight for name, weight in all_weights(task.model).items() if name.endswith(_FROZEN)}
        return LatentPublic(public.weights, {} if self.drawn else task.store(factors)), None

    @contextmanager
    def loaded(self, task: Task, public: FedAvgPublic) -> Iterator[nn.Module]:
        """With the frozen factors: a node that joins late has drawn others."""
        assert isinstance(public, LatentPublic)
        with loaded(task, public.weights) as model:
            frozen = {name: weight for name, weight in all_weights(model).items() if name in public.factors}
            tree.copy_(frozen, public.factors)
            yield model


@dataclass(frozen=True, kw_only=True)
class FedSB(Staged):
    """The mean of small matrices between frozen factors of the first gradient."""

    name: ClassVar[str] = "fed-sb"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper-code": {
            "rank": 200,
            "set_up_examples": 50,
            "training": {"learning_rate": 1e-4, "batch_size": 1, "accumulate": 32, "epochs": 1},
        },
    }
    rank: int = 16  # r: the square of it travels for each module
    initialisation: Literal["gradient", "random"] = "gradient"  # the paper's; "random" has no set-up round
    set_up_examples: int = 50  # of each client in round 1, at most; the paper's code has as many in all
    first_step: float = 0.0  # R = -first_step S at first; 0: the model begins as its base
    modules: str | tuple[str, ...] | None = None  # FedIT's
    bits: Bits = 32  # of a value of R, up
    entry_bits: Bits = 32  # of a value of R, down
    server_learning_rate: float = 1.0  # FedAvg's
    weighting: Weighting = "examples"  # FedAvg's, of the gradients too
    training: FirstOrder = field(default_factory=_training)

    def __post_init__(self) -> None:
        for name in ("rank", "set_up_examples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.first_step <= 1000:
            raise UserError(f"first_step={self.first_step}: must be from 0, which is no step, to 1,000")
        if self.first_step and self.initialisation == "random":
            raise UserError(
                f'first_step={self.first_step}: with initialisation="random" no gradient is known; leave one out'
            )
        if self.initialisation == "random" and self.set_up_examples != FedSB.set_up_examples:
            given = f"set_up_examples={self.set_up_examples}"
            raise UserError(f'{given}: with initialisation="random" there is no set-up; leave one out')

    def stages(self) -> tuple[Stage, ...]:
        """The set-up, and then averaging; averaging alone between drawn factors."""
        drawn = self.initialisation == "random"
        set_up = FedSBSetUp(
            rank=self.rank,
            examples=self.set_up_examples,
            batch_size=self.training.batch_size,
            first_step=self.first_step,
            modules=self.modules,
            weighting=self.weighting,
        )
        average = LatentAverage(
            rank=self.rank,
            modules=self.modules,
            drawn=drawn,
            bits=self.bits,
            entry_bits=self.entry_bits,
            server_learning_rate=self.server_learning_rate,
            weighting=self.weighting,
            training=self.training,
        )
        return Stage(set_up, 0 if drawn else 1, handed_over, set_up.handed), Stage(average)

    def check(self, model: nn.Module, rounds: int) -> None:
        """A round must be left after the set-up."""
        if rounds < 2 and self.initialisation == "gradient":
            raise UserError(
                f'rounds={rounds}: initialisation="gradient" takes round 1, and none is left; give the run 2 rounds or '
                f'more, or set initialisation="random"'
            )
        super().check(model, rounds)
