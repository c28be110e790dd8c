"""A federated tuner that begins from FedPFT's head: one round of mixtures, then any method.

    round 1       FedPFT: the server trains the head on draws from mixtures of the base's features
    hand-over     the head, on every node, a copy: no byte
    rounds 2 ..   the method ``then`` over the base with that head

A head that is drawn or zero gives the body useless gradients until it has learned something. With ``start_rounds = 0``
it is the method ``then``, to the bit. Not from the paper, which has one round.

Wire: round 1 FedPFT's, then the method's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from fedferret.algorithms.fedpft import FedPFT
from fedferret.algorithms.registry import method
from fedferret.core.algorithm import AnyAlgorithm
from fedferret.core.errors import UserError
from fedferret.core.hand_over import Stage
from fedferret.core.keys import Key
from fedferret.core.stages import Staged
from fedferret.core.task import Task
from fedferret.core.tree import Tree
from fedferret.settings import build, table_of


@dataclass(frozen=True, kw_only=True)
class FedPFTThen(Staged):
    """FedPFT's head, then a method that tunes on."""

    name: ClassVar[str] = "fedpft-then"
    then: str | dict[str, Any] = "fedit"  # the method of all later rounds, by name or with its settings
    start_rounds: int = 1  # FedPFT has one round; 0 leaves it out
    start: FedPFT = field(default_factory=FedPFT)  # the first round's settings

    def __post_init__(self) -> None:
        if self.start_rounds not in (0, 1):
            raise UserError(f"start_rounds={self.start_rounds}: FedPFT has one round; 1 or 0 (none)")
        if self.start.chain:
            raise UserError("start.chain=true: a chain has a round for each client; leave it out here")
        if self.start.normalise != "none":
            raise UserError(
                f'start.normalise="{self.start.normalise}": {self._tuner.name} tunes a head that reads the features as '
                f'they are; set normalise="none"'
            )
        object.__setattr__(self, "then", {"name": self._tuner.name, **table_of(self._tuner)})  # equal runs, one form

    def stages(self) -> tuple[Stage, ...]:
        """FedPFT, then the tuner."""
        return Stage(self.start, self.start_rounds, trained_head), Stage(self._tuner)

    @cached_property
    def _tuner(self) -> AnyAlgorithm:
        table = {"name": self.then} if isinstance(self.then, str) else dict(self.then)
        name = table.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f'then={self.then}: there is no name in it; name a method that tunes, such as "fedit"')
        kind = method(name)
        if issubclass(kind, Staged | FedPFT):
            raise UserError(f'then="{name}": it is no method of one stage that tunes a model; choose another')
        if not kind.has_global_model:
            raise UserError(f'then="{name}": it has no global model that could begin with the head; choose another')
        tuner: AnyAlgorithm = build(kind, table, "then")
        return tuner


def trained_head(task: Task, base: Tree, finished: AnyAlgorithm, public: Any, key: Key) -> dict[str, Tensor]:
    """Hand over the head alone: nothing else has changed.

    Args:
        task: not read.
        base: not read.
        finished: not read.
        public: FedPFT's.
        key: not read.

    Returns:
        The head's weights by their plain names.
    """
    return {name: weight.clone() for name, weight in public.weights.items()}
