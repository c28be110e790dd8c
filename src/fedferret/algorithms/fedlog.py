"""FedLog: private bodies; sums of features by class go up, and the head of most probable parameters comes down.

Yu, Zhang, Poupart. "FedLog: Personalized Federated Classification with Less Communication and More Flexibility",
arXiv 2407.08337, TMLR 2026; the authors' code, github.com/rossyu/fedlog.

    features    f = [x, 1], x of m values of example and body          head η, C rows of m + 1: logits = η f
    round 1     client j:  χ_j[c] = Σ f over its examples of class c, with the first body, the same everywhere
    round t     client j:  T local steps of its body on cross-entropy, η fixed      then χ_j, with the new body
    server      χ = Σ χ_j       ν = the sum of χ's last column, the number of examples
                η = argmin  log Σ_c exp(‖η_c‖² / 4) - <η, χ> / ν            (``fedlog_head.py``)

Public: η. Client: its body. Server: of each class the newest row of χ; nothing adds up over rounds. Wire: 4 C (m + 1)
bytes up per client and round, 4 C (m + 1) down; a body never travels. Deviations: a client's optimiser is new every
round, the code's every epoch; η is solved to 1e-6 of stationarity; the code asks all clients in every round, and here a
class without an example in a round keeps its row of χ (``absent``); features are normalised unless ``normalise`` is
"none"; the last column counts examples, which the code sends once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fedferret.algorithms.fedlog_bodies import PrivateBodies, body_of
from fedferret.algorithms.fedlog_head import most_probable_head, random_head
from fedferret.algorithms.fedlog_messages import (
    FedLogClient,
    FedLogEntry,
    FedLogPublic,
    FedLogServer,
    FedLogSums,
    check_shape,
    check_sums,
    sums_by_class,
)
from fedferret.core import tree
from fedferret.core.algorithm import ClientReply, Pooled, Pooling, Shapes, WireCost
from fedferret.core.errors import RunError
from fedferret.core.keys import Key
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder
from fedferret.models.classifiers import HEAD
from fedferret.models.private_body import PrivateBodyClassifier, image_weights


def _adam() -> FirstOrder:
    return FirstOrder(optimizer="adamw", learning_rate=1e-3, clip=None)  # the code's for MNIST


@dataclass(frozen=True, kw_only=True)
class FedLog(PrivateBodies):
    """Private bodies under a head of most probable parameters. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fedlog"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper-code": {"features": 50, "normalise": "none", "training": {"batch_size": 10, "epochs": 5}},
    }
    absent: Literal["keep", "zero"] = "keep"  # sums of a class without an example: of its last round, or 0
    start: Literal["statistics", "random"] | None = None  # of η; none: "random" where bodies are unlike
    training: FirstOrder = field(default_factory=_adam)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is None:
            object.__setattr__(self, "start", "random" if len(set(self.bodies)) > 1 else "statistics")

    @property
    def pooling(self) -> Pooling:
        """Statistics add up."""
        return Pooling.SUM

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Four bytes for each element of η, both ways; four at the client for each weight of the largest body."""
        head, every = self.sum_values(shapes, round), sum(map(math.prod, shapes.values()))
        body = max((image_weights(name, self.features) for name in self.bodies), default=every - head)
        return WireCost.exact(4 * head, 4 * head, 4 * body)

    def sum_values(self, shapes: Shapes, round: int) -> int:
        """C (m + 1)."""
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(HEAD))

    def note(self, public: FedLogPublic) -> str | None:
        """The classes without an example."""
        absent = [str(label) for label, row in enumerate(public.head) if not row.any()]
        if not absent or len(absent) == len(public.head):
            return None
        return f"The clients' sums have no example of class {', '.join(absent)} (from 0), so its logit is 0."

    def init(self, task: Task, key: Key) -> tuple[FedLogPublic, FedLogServer]:
        """η = 0, of which a round of statistics makes no use, or normal by the run's key."""
        classes, width = body_of(task.model).head.weight.shape
        zeros = torch.zeros(classes, width + 1)
        head = random_head(classes, width + 1, key) if self.start == "random" else zeros
        return FedLogPublic(head), FedLogServer(zeros.clone())

    def client_update(
        self, task: Task, public: FedLogPublic, client: FedLogClient | None, data: Examples, key: Key
    ) -> ClientReply[FedLogClient, FedLogSums]:
        """Train the body under the fixed head, but in a first round of statistics; send the sums of its features."""
        with self.model(task, public, client) as model:
            assert model is not None and client is not None
            metrics: Mapping[str, float] = {}
            if model.private() and not (task.round == 1 and self.start == "statistics"):
                with _head_fixed(model):
                    metrics = self.training.train(task, data, key.fold("train")).metrics
            sums = sums_by_class(task, data, model.head.out_features)
            return ClientReply(sums, FedLogClient(client.body, tree.clone(model.private())), metrics)

    def accept(self, task: Task, public: FedLogPublic, payload: FedLogSums) -> None:
        """Refuse sums of another shape, and sums that no examples can have."""
        check_sums(payload, public.head, self.form)

    def accept_sum(self, task: Task, public: FedLogPublic, sum: FedLogSums) -> None:
        """Refuse a sum of another shape."""
        check_shape(sum, public.head)

    def server_update(
        self, task: Task, public: FedLogPublic, server: FedLogServer, pooled: Pooled[FedLogSums], key: Key
    ) -> tuple[FedLogServer, FedLogEntry]:
        """The most probable head, in float64, rounded once."""
        sums_CF = pooled.only.sums.cpu().float()
        if self.absent == "keep":
            sums_CF = torch.where(sums_CF[:, -1:] > 0, sums_CF, server.sums)
        count = float(sums_CF[:, -1].double().sum())
        if not count >= 1:  # a sum that a guard unmasked: no client's alone was seen
            raise RunError(f"the clients' sums count {count:g} examples: there is no head to solve for")
        return FedLogServer(sums_CF.clone()), FedLogEntry(most_probable_head(sums_CF.double() / count).float())

    def apply(self, task: Task, public: FedLogPublic, entry: FedLogEntry) -> None:
        """The entry is the head."""
        public.head = entry.head.clone()


@contextmanager
def _head_fixed(model: PrivateBodyClassifier) -> Iterator[None]:
    """Train all but the head."""
    model.head.requires_grad_(False)
    try:
        yield
    finally:
        model.head.requires_grad_(True)
