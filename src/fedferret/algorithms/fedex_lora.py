"""FedEx-LoRA: FedIT made exact: what the mean of the factors misses is added to the weights under them.

Singhal, Ponkshe, Vepakomma. "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language
Models", ACL 2025, arXiv 2410.09432, Algorithm 1.

    model:     y = W x + s B A x, s = α / r, B = 0 at first; A and B are trained, W is moved by the residual alone
    client j:  T local steps on all A and B; sends ΔA_j, ΔB_j
    server:    sends all of them on, each with its share p_j
    everybody: A, B <- their means     W <- W + s (Σ p_j B_j A_j − B A), which is s Σ p_j (ΔB_j − ΔB) (ΔA_j − ΔA)

After a round the model is the mean of the clients' models: W + s B A = Σ p_j (W + s B_j A_j), up to fp32 rounding.

Wire: 4 d bytes up per client and round, d as FedIT's; N times that down: the residual of N clients has rank N r, and is
sent as what it is made of. W is public state: a late client gets it by the log, an export merges the factors into it.

FLoRA (arXiv 2409.05976) is exact for the same bytes, and draws new factors every round; here they go on, and where the
mean is exact already (one client, A frozen) this is FedIT. Sums are element by element in one order: the same bits on
every machine. Deviations: FedIT's; shares by examples (``weighting``), the paper's are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from fedferret.algorithms.fedavg import Delta, FedAvgPublic
from fedferret.algorithms.fedit import FedIT
from fedferret.algorithms.full_model import step_
from fedferret.core import tree
from fedferret.core.algorithm import ClientReply, Pooled, Pooling, Shapes, WireCost
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from fedferret.models import adapters

_CHUNK = 2**17  # elements of a residual at a time: they stay in a core's cache while N r products are added


@state
class FedExPublic(FedAvgPublic):
    """What is tuned, and the weights under the factors by their modules' names."""

    base: Tree


@message
class FedExEntry:
    """Every client's update, in client order, and its share; shares add up to 1."""

    deltas: tuple[dict[str, Annotated[Tensor, Form(torch.float32)]], ...]
    shares: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FedExLoRA(FedIT):
    """The weighted mean of the clients' models with LoRA."""

    name: ClassVar[str] = "fedex-lora"
    changes_base: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dora:
            raise UserError("dora=true: with magnitudes a model is no sum of weights and factors; choose fedit")
        if self.server_learning_rate != 1:
            given = f"server_learning_rate={self.server_learning_rate}"
            raise UserError(f"{given}: the method is the mean of the clients' models itself; leave it out")
        self.server_optimizer.refuse("the method is the mean of the clients' models itself")

    @property
    def pooling(self) -> Pooling:
        """Kept apart: the mean of products is not in the sum of factors."""
        return Pooling.EACH

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Four bytes a weight up; every client's down, of as few as one reply."""
        up = super().wire_cost(shapes, cohort, round).up_most
        return WireCost(up, up, up, cohort * up)

    def init(self, task: Task, key: Key) -> tuple[FedExPublic, None]:
        """The first factors, and the weights under them as they are."""
        public, _ = super().init(task, key)
        return FedExPublic(public.weights, task.store(_base(task.model))), None

    def client_update(  # type: ignore[override]
        self, task: Task, public: FedExPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, Delta]:
        """FedIT's, over the weights as they are now."""
        tree.copy_(_base(task.model), public.base)
        return super().client_update(task, public, client, data, key)

    def server_update(  # type: ignore[override]
        self, task: Task, public: FedExPublic, server: None, pooled: Pooled[Delta], key: Key
    ) -> tuple[None, FedExEntry]:
        """All updates, as they came."""
        shares = tuple(weight / sum(pooled.weights) for weight in pooled.weights)
        return None, FedExEntry(tuple(each.delta for each in pooled.sums), shares)

    def apply(self, task: Task, public: FedExPublic, entry: FedExEntry) -> None:  # type: ignore[override]
        """The mean of the factors, and the residual under them."""
        mean = {name: _mean([each[name] for each in entry.deltas], entry.shares) for name in public.weights}
        for name in public.base if len(entry.deltas) > 1 and not self.freeze_a else ():  # else there is no residual
            layer: Any = task.model.get_submodule(name)
            b, a = name + adapters.FACTOR_B, name + adapters.FACTOR_A
            residual = _residual(
                [(each[b] - mean[b], each[a] - mean[a]) for each in entry.deltas],
                [layer.scaling["default"] * share for share in entry.shares],
            )
            transposed = getattr(layer, "fan_in_fan_out", False)  # GPT-2's modules hold (inputs, outputs)
            step_({name: public.base[name]}, {name: residual.T if transposed else residual}, -1.0, task.rounding)
        step_(public.weights, mean, 1.0, task.rounding)

    @contextmanager
    def model(self, task: Task, public: FedExPublic, client: None = None) -> Iterator[nn.Module]:  # type: ignore[override]
        """The one global model."""
        tree.copy_(_base(task.model), public.base)
        with super().model(task, public) as model:
            yield model


def _base(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the factors, by their modules' names; the model's own."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in adapters.factors(model)}
    return {name: module.get_base_layer().weight.detach() for name, module in modules.items()}


def _mean(deltas: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ p_j Δ_j, added in client order."""
    total = deltas[0] * shares[0]
    for delta, share in zip(deltas[1:], shares[1:], strict=True):
        total += delta * share
    return total


def _residual(factors: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float]) -> Tensor:
    """Σ s_j B_j A_j, fp32 of (outputs, inputs), one row of A after the other: no library's order of sums is in it.

    Products and sums are separate operations, each rounded as IEEE 754 says; one that does both may round once.
    """
    (b, a), *_ = factors
    total = torch.zeros(b.shape[0], a.shape[1], device=b.device)
    rows = max(1, _CHUNK // a.shape[1])
    for start in range(0, len(total), rows):
        part = total[start : start + rows]
        product = torch.empty_like(part)
        for (b, a), scale in zip(factors, scales, strict=True):
            scaled = b[start : start + rows] * scale
            for column, row in zip(scaled.unbind(1), a.unbind(0), strict=True):
                part += torch.mul(column[:, None], row, out=product)
    return total
