"""FedAvg-FT: FedAvg, and every client is scored with the global model after a few more steps on its own examples.

The baseline of personal methods, called FedAvg + fine-tuning or FedAvg-FT there, for instance by Collins, Hassani,
Mokhtari, Shakkottai, ICML 2021, arXiv 2102.07078, §5.

    rounds           FedAvg's
    scores           the global model as FedAvg's; at client j, that of  w_j <- E steps from the newest w
                     w_j is made from the client's training examples, scored, and forgotten

Wire: FedAvg's; nothing is kept at the client. With E = 0 it is FedAvg. Deviation: E counts steps, whatever the local
training counts, and these have the first round's learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from fedferret.algorithms.fedavg import FedAvg, FedAvgPublic
from fedferret.algorithms.full_model import loaded
from fedferret.algorithms.partly_private import PrivateWeights
from fedferret.core import tree
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task


@dataclass(frozen=True, kw_only=True)
class FedAvgFT(FedAvg):
    """FedAvg, with fine-tuning at the client before the client is scored."""

    name: ClassVar[str] = "fedavg-ft"
    fine_tuning: int = 10  # E, steps; a few passes over a small client, so that scoring costs about what a round does

    def __post_init__(self) -> None:
        if self.fine_tuning < 0:
            raise UserError(f"fine_tuning={self.fine_tuning}: must not be negative; 0 is FedAvg")

    def personalise(  # type: ignore[override]  # FedAvg's clients keep nothing, and neither do these
        self, task: Task, public: FedAvgPublic, client: None, training: Callable[[], Examples], key: Key
    ) -> PrivateWeights | None:
        """The global weights after steps on the client's training examples."""
        if not self.fine_tuning:
            return None
        steps = replace(self.training, steps=self.fine_tuning, epochs=None, schedule="constant", warmup=0.0)
        with loaded(task, public.weights):
            return PrivateWeights(tree.clone(steps.train(task, training(), key).weights))

    @contextmanager
    def model(self, task: Task, public: FedAvgPublic, client: PrivateWeights | None = None) -> Iterator[nn.Module]:
        """The global model, or the model that ``personalise`` made of it."""
        with loaded(task, client.weights if client else public.weights) as model:
            yield model
