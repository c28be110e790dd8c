"""SSF: FedAvg of a scale γ and a shift β of the outputs of a frozen model's linear modules and norms.

Lian, Zhou, Feng, Wang. "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022,
arXiv 2210.08823, equation 4; merged by equation 6. The paper is not federated; the federated form is ours.

    model:     y = γ ⊙ f(x) + β after each linear module and norm f, frozen; γ = 1 and β = 0 at first
    client j:  T local steps on all γ and β, with a fresh optimiser
    server:    the mean of the γ and the mean of the β, weighted by examples
    export:    W <- diag(γ) W, b <- γ b + β; norms likewise

Merged weights are affine in (γ, β), so the mean of merged models is the merged mean, as it is not with LoRA. With
``shift = "pushed"`` it is not: the bias γ' (b + W β) + β' of what reads a norm is bilinear in γ' and β.

Wire: 4 d bytes up per client and round, 4 d down, with d = Σ outputs (2 where β is trained, else 1) over the modules.

Deviations: the paper's code draws γ and β (``initial = "normal"``). The paper tunes vision models, their convolutions
too, and no code that merges was released. Here a shift is trained only where the architecture has a place for it. There
is no warm-up, no average of the weights over steps, and no dropped path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from fedferret.algorithms.partly_private import PartlyPrivate
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.local.first_order import FirstOrder
from fedferret.models import adapters


def _training() -> FirstOrder:
    """The paper's optimiser, and the lowest of its rates (1e-3 to 1e-2): the best of three on BBC News."""
    return FirstOrder(optimizer="adamw", learning_rate=1e-3, clip=None)


@dataclass(frozen=True, kw_only=True)
class SSF(PartlyPrivate):
    """The weighted mean of scales and shifts."""

    name: ClassVar[str] = "ssf"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"initial": "normal", "shift": "all", "training": {"batch_size": 32, "learning_rate": 1e-3}},
    }
    initial: adapters.Initial = "identity"  # the run begins with the base; "normal" is what the paper's code draws
    shift: adapters.Shift = "auto"  # wherever it can be exported; "none" halves the bytes
    modules: str | tuple[str, ...] | None = None  # all linear modules of the blocks and all norms, as in the paper
    private_norms: bool = False  # True: the norms' γ and β stay at the client, as in FedBN; the paper has one model
    training: FirstOrder = field(default_factory=_training)

    def shares(self, names: Iterable[str]) -> list[str]:
        """All, or all but those of norms."""
        return [name for name in names if not (self.private_norms and f".{adapters.NORM}" in name)]

    def check(self, model: nn.Module, rounds: int) -> None:
        """Norms that are to be private must be there."""
        super().check(model, rounds)
        names = list(tree.parameters(model))
        if self.private_norms and self.shares(names) == names:
            raise UserError(
                "private_norms=true: no norm is tuned in this model; leave it out, or name norms in modules"
            )

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """The model with scales and shifts."""
        return adapters.ScaleShift(initial=self.initial, shift=self.shift, modules=self.modules).attach(model, key)

    def release(self, model: nn.Module) -> nn.Module:
        """The scales and shifts merged into weights and biases."""
        return adapters.released(model)
