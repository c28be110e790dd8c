"""The set-up round of Fed-SB (``fed_sb.py``): the best factors of the clients' mean gradient, found without sending it.

    client j:  G_j = mean gradient of a matrix W over some of its examples    sends A_j, B_j: G_j in rank r
    server:    Σ p_j B_j A_j = U S Vᵀ, p_j the client's share of the weights      hands over B = U_r, A = V_rᵀ, S

Wire: 4 Σ r (rows + columns) bytes up over the tuned matrices; down what is handed over. No model changes. Where S has a
zero, B and A have a drawn direction, so that every value of R has a gradient.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from fedferret.algorithms.lora_stage import figures
from fedferret.bases.low_rank import LowRank, of_matrix, of_product
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Payload, Pooled, Pooling, Shapes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.fields import Form
from fedferret.core.hand_over import HandedOver
from fedferret.core.keys import Key
from fedferret.core.messages import message, state
from fedferret.core.task import Examples, Task
from fedferret.core.tree import Tree
from fedferret.local.first_order import TrainingRefused
from fedferret.models.adapters.latent import LATENT_A, LATENT_B, LATENT_R, unit_rows
from fedferret.models.adapters.modules import chosen_modules
from fedferret.models.adapters.products import sizes


@state
class SetUpPublic:
    """What the server found; empty before."""

    factors: Tree
    figures: dict[str, float]


@message
class GradientFactors(Payload["GradientFactors"]):
    """A client's gradients as factors, fp32: of every module A, then B, one after the other; names would cost more."""

    factors: Annotated[Tensor, Form(torch.float32, rank=1)]


@message
class SetUpEntry:
    """B, A and R by the names that they have in the next stage, and the share of the energy that they keep."""

    factors: dict[str, Annotated[Tensor, Form(torch.float32, rank=2)]]
    figures: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FedSBSetUp(Algorithm[SetUpPublic, None, None, SetUpEntry, GradientFactors]):
    """The best factors of the mean gradient. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fed-sb-set-up"
    trains_at_clients: ClassVar[bool] = False  # gradients at the base's weights alone
    rank: int
    examples: int  # of each client, at most
    batch_size: int
    first_step: float  # R = -first_step S
    modules: str | tuple[str, ...] | None
    weighting: Weighting

    @property
    def pooling(self) -> Pooling:
        """Products of factors do not add up: every client's are kept apart."""
        return Pooling.EACH

    def prepare(self, model: nn.Module, key: Key) -> nn.Module:
        """Freeze all but the matrices, which need gradients and are not changed."""
        names = {f"{name}.weight" for name in chosen_modules(model, self.modules)}
        for name, weight in model.named_parameters():
            if name in names and not weight.is_floating_point():
                raise UserError(
                    f'{name} is quantised and has no gradient: set algorithm.initialisation="random", or leave '
                    f"model.quantised out"
                )
            weight.requires_grad_(name in names)
        return model

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """Two factors a matrix, both ways."""
        values = self.rank * sum(map(sum, shapes.values()))
        return WireCost.exact(4 * values, 4 * values)

    def handed(self, shapes: Shapes) -> int:
        """How many values are handed over.

        Args:
            shapes: of the matrices, by name.

        Returns:
            Those of A and B, and where R is not zero of R.
        """
        return self.rank * sum(map(sum, shapes.values())) + len(shapes) * self.rank**2 * bool(self.first_step)

    def init(self, task: Task, key: Key) -> tuple[SetUpPublic, None]:
        """Nothing is known."""
        return SetUpPublic({}, {}), None

    def client_update(
        self, task: Task, public: SetUpPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, GradientFactors]:
        """Factors of the mean gradient of some examples at the base's weights."""
        if not len(data):
            raise TrainingRefused("the client holds no example")
        started, sent = time.perf_counter(), list[Tensor]()
        rows = key.fold("examples").permutation(len(data))[: self.examples]
        loss, gradients = _mean_gradient(task, data.take(rows), self.batch_size)
        for module, gradient in gradients.items():
            low = of_matrix(gradient, self.rank, 1.0, "balanced", key.fold(module))
            sent += [low.a.flatten(), low.b.flatten()]
        payload = GradientFactors(torch.cat(sent))
        return ClientReply(payload, None, {"loss": loss, "seconds": time.perf_counter() - started})

    def accept(self, task: Task, public: SetUpPublic, payload: GradientFactors) -> None:
        """Refuse another number of values."""
        if not isinstance(payload, GradientFactors):
            raise ValueError(f"a {type(payload).__name__} came where GradientFactors were expected")
        length = self.rank * sum(map(sum, _shapes(task.model).values()))
        if payload.factors.dtype != torch.float32 or tuple(payload.factors.shape) != (length,):
            raise ValueError("the factors are not those of the model's matrices: another model or setting sent them")

    def server_update(
        self, task: Task, public: SetUpPublic, server: None, pooled: Pooled[GradientFactors], key: Key
    ) -> tuple[None, SetUpEntry]:
        """The best factors of the mean of the products."""
        found, handed = list[LowRank](), dict[str, Tensor]()
        shares = [weight / sum(pooled.weights) for weight in pooled.weights]
        clients = [self._factors(task.model, each.factors) for each in pooled.sums]
        for module in _shapes(task.model):
            a = torch.cat([each[module][0] for each in clients])
            b = torch.cat([share * each[module][1] for share, each in zip(shares, clients, strict=True)], dim=1)
            low = of_product(a, b, 1.0, 1.0, self.rank, "b", key.fold(module))
            lengths_r = low.b.double().norm(dim=0)  # the singular values
            drawn = unit_rows(len(low.b), self.rank, key.fold(module, "drawn")).view(len(low.b), self.rank)
            handed[module + LATENT_A] = low.a
            handed[module + LATENT_B] = torch.where(lengths_r > 0, low.b / lengths_r, drawn).float()
            if self.first_step:
                handed[module + LATENT_R] = torch.diag(-self.first_step * lengths_r).float()
            found.append(low)
        return None, SetUpEntry(handed, figures(found))

    def apply(self, task: Task, public: SetUpPublic, entry: SetUpEntry) -> None:
        """Keep what was found."""
        public.factors, public.figures = dict(entry.factors), dict(entry.figures)

    @contextmanager
    def model(self, task: Task, public: SetUpPublic, client: None = None) -> Iterator[nn.Module]:
        """The base."""
        yield task.model

    def _factors(self, model: nn.Module, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of a payload, float64, by module."""
        shapes, parts = _shapes(model), {}
        lengths = [self.rank * each for outputs, inputs in shapes.values() for each in (inputs, outputs)]
        values = iter(torch.split(flat.cpu().double(), lengths))
        for module in shapes:
            parts[module] = (next(values).view(self.rank, -1), next(values).view(-1, self.rank))
        return parts


def handed_over(task: Task, base: Tree, finished: object, public: SetUpPublic, key: Key) -> HandedOver:
    """What the set-up leaves to the next stage; see ``core/hand_over.py``."""
    return HandedOver(dict(public.factors), dict(public.figures))


def _shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the tuned matrices, by module."""
    names = [name.removesuffix(".weight") for name in tree.parameters(model)]
    return {name: sizes(model.get_submodule(name)) for name in names}


def _mean_gradient(task: Task, data: Examples, batch_size: int) -> tuple[float, Mapping[str, Tensor]]:
    """The mean loss, and its gradient by module, fp32, outputs x inputs."""
    task.model.eval()
    weights = {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}
    total, sums = 0.0, {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    done = 0
    for batch in data.batches(batch_size, None):
        count = min(batch_size, len(data) - done)
        loss = task.objective.loss(task.model, batch)
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            sums[name].add_(gradient.float(), alpha=count / len(data))
        total, done = total + float(loss.detach()) * count / len(data), done + count
    modules = {name.removesuffix(".weight"): gradient for name, gradient in sums.items()}
    return total, {
        name: gradient if isinstance(task.model.get_submodule(name), nn.Linear) else gradient.T
        for name, gradient in modules.items()
    }
