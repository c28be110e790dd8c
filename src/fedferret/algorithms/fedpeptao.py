"""FedPepTAO: per-layer prefixes of which some layers are shared, and a server with momentum and control variates.

Che, Liu, Zhou, Ren, Zhou, Sheng, Dai, Dou. "Federated Learning of Large Language Models with Parameter-Efficient Prompt
Tuning and Adaptive Optimization", EMNLP 2023, arXiv 2310.15080; the official code (llm-eff/FedPepTAO, 84311d5).

    warm-up     W rounds of FedAvg of all layers' prefixes               only where the number of layers is measured
    scoring     client j: ζ_l of each layer from one batch's hidden states (local/similarity.py), without prefixes
                and where it is measured, the share of layers to keep, from the Hessian's spectrum (local/lanczos.py)
                server: the mean of both; the layers with the highest ζ are shared from now on
    training    client j: T local steps; sends Δ_j of the shared layers and K_j, keeps the prefixes of the others
                server: Σ p_j Δ_j + η_t v, with v from momentum and one control per client (fedpeptao_server.py)

Wire, with d weights in all, s of them shared, L layers: up 4 d in warm-up, 4 (L - 1) in scoring and 4 more where the
share is measured, 4 s in training; down 4 d, L, 4 s. With ``layers = 1.0`` every round is a training round and s = d.

Deviations: the page lists them, and what of the official code is not copied (docs/methods/fedpeptao.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fedferret.algorithms.fedavg import Delta, FedAvgEntry
from fedferret.algorithms.fedpeptao_choice import ChosenPrefixes
from fedferret.algorithms.fedpeptao_messages import FedPepTAOPublic, FedPepTAOServer, SharedLayers, SteppedDelta
from fedferret.algorithms.fedpeptao_server import Reply, directed
from fedferret.algorithms.partly_private import PrivateWeights
from fedferret.core.algorithm import ClientReply, Pooled, Pooling, Shapes, StateBytes
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.pooling import mean_of
from fedferret.core.task import Examples, Task


@dataclass(frozen=True, kw_only=True)
class FedPepTAO(ChosenPrefixes):
    """Prefixes of chosen layers, averaged by a server with momentum and controls. See ``Algorithm`` for arguments."""

    name: ClassVar[str] = "fedpeptao"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper-code": {
            "server_formula": "paper-code",
            "training": {"learning_rate": 4e-2, "weight_decay": 0.1, "batch_size": 8, "epochs": 2},
        }
    }
    server_rate: float = 1.25  # η in units of the local learning rate: the code's 0.05 beside 4e-2; 0: FedAvg's mean
    server_decay: float = 0.99  # of η with each of the server's steps, the code's
    server_floor: float = 0.002  # the least η, as a share of the first: the code's 1e-4 beside 0.05
    server_momentum: float = 0.9  # μ, the code's
    server_formula: Literal["plain", "paper-code"] = "plain"  # momentum of Δ; the code has it of a second difference

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.server_rate < 0:
            raise UserError(f"server_rate={self.server_rate}: must be at least 0, which is no step")
        self.server_optimizer.refuse("the method's own server has momentum (server_rate, server_momentum)")
        for name in ("server_decay", "server_floor", "server_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: must lie between 0 and 1")
        if self.server_momentum == 1:
            raise UserError("server_momentum=1.0: nothing new would count; it must be below 1")

    @property
    def pooling(self) -> Pooling:
        """Apart where the server keeps a control per client; without the server's step any mean will do."""
        return Pooling.EACH if self.server_rate else Pooling.MEAN

    def state_growth(self, model: nn.Module, shapes: Shapes, round: int, clients: int) -> StateBytes:
        """A control of each client, their mean, the momentum and the last update."""
        each = 4 * sum(math.prod(shape) for shape in shapes.values())
        return StateBytes(server=(clients + 3) * each if self.server_rate else 0)

    def init(self, task: Task, key: Key) -> tuple[FedPepTAOPublic, FedPepTAOServer]:  # type: ignore[override]
        """The server has no memory yet."""
        public, _ = super().init(task, key)
        return public, FedPepTAOServer({}, {}, {}, {}, 0)

    def client_update(  # type: ignore[override]
        self, task: Task, public: FedPepTAOPublic, client: PrivateWeights | None, data: Examples, key: Key
    ) -> ClientReply[PrivateWeights, Any]:
        """Also say how many local steps the update is of, where the server reads it."""
        reply = super().client_update(task, public, client, data, key)
        if self._scores_next(public) or self.update_type(public) is Delta:
            return reply
        return replace(reply, payload=SteppedDelta(reply.payload.delta, self.training.total_steps(len(data))))

    def update_type(self, public: FedPepTAOPublic) -> type[Delta]:
        """With local steps in training, unless the server takes no step."""
        return SteppedDelta if self.server_rate and self._trains_next(public) else Delta

    def accept(self, task: Task, public: FedPepTAOPublic, payload: Any) -> None:  # type: ignore[override]
        """Refuse also numbers of local steps that these settings do not give."""
        super().accept(task, public, payload)
        if isinstance(payload, SteppedDelta) and not self.training.may_take(payload.steps):
            raise ValueError(f"{payload.steps!s:.40} local steps came, which these settings do not give")

    def server_update(  # type: ignore[override]
        self, task: Task, public: FedPepTAOPublic, server: FedPepTAOServer, pooled: Pooled[Any], key: Key
    ) -> tuple[FedPepTAOServer, FedAvgEntry | SharedLayers]:
        """In training, the mean and the server's step on top; in other rounds as without a step."""
        mean = pooled.only if len(pooled.sums) == 1 else mean_of(pooled.sums, pooled.weights)
        _, entry = super().server_update(task, public, None, replace(pooled, sums=(mean,)), key)
        if not isinstance(mean, SteppedDelta) or isinstance(entry, SharedLayers):
            return server, entry
        total, names = sum(pooled.weights), pooled.clients or ("",) * len(pooled.sums)
        replies = [
            Reply(client, update, weight / total, self._length(task, update.steps))
            for client, update, weight in zip(names, pooled.sums, pooled.weights, strict=True)
        ]
        after, velocity = directed(server, replies, mean.delta, self.server_momentum, self.server_formula)
        if velocity is None:
            return after, entry
        rate = self.server_rate * self.training.learning_rate * max(self.server_decay**after.steps, self.server_floor)
        return after, replace(
            entry, delta={name: torch.add(value, velocity[name], alpha=rate) for name, value in mean.delta.items()}
        )

    def _length(self, task: Task, steps: int) -> float:
        """The sum of the learning rates of a client's local steps; the published code has the first rate in all."""
        if self.server_formula == "paper-code":
            return steps * self.training.learning_rate
        looked_at = min(steps, 1000) if self.training.schedule_over == "steps" else 1  # a client says how many
        return steps * fmean(self.training.rate(task, step, looked_at) for step in range(looked_at))
