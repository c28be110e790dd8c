"""FetchSGD: clients send a sketch of their update; the server keeps, in the sketch, what it has not yet applied.

Rothchild, Panda, Ullah, Ivkin, Stoica, Braverman, Gonzalez, Arora. "FetchSGD: Communication-Efficient Federated
Learning with Sketching", ICML 2020, arXiv 2007.07682, Algorithm 1.

    client j:  Δ_j = w - w_j after T local steps      send S(Δ_j), R rows of at most C cells (bases/count_sketch.py)
    server:    u <- ρ u + Σ n_j S(Δ_j) / Σ n_j        e <- e + η u
               Δ = the k largest of the estimates from e          e <- e - S(Δ)
               u <- 0 in the cells that Δ falls into              momentum factor masking, as in the published code
    everybody: w <- w - Δ

Clients keep nothing. Momentum and error feedback are the server's, two sketches. Sketches are linear: they add up under
a mask.

Wire: Σ C_r·bits/8 up, where the row lengths C_r lie just below C; k·bits/8 + P(k) down, P as in ``bases/positions.py``.

Deviations: the update of T local steps is sketched, at the clients' rate, where the paper sketches one gradient. With
T = 1 it is the gradient times that rate. Rows have coprime lengths in place of random hashes. Cells and values travel
in 16 bits unless 32 are asked for; what rounding takes off Δ stays in e.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedferret.algorithms.fetch_sgd_messages import CellsSum, FetchSGDEntry, FetchSGDPublic, FetchSGDServer, Sketch
from fedferret.algorithms.full_model import deltas, loaded
from fedferret.algorithms.sparse_updates import Sparse, step_where_given_
from fedferret.bases.count_sketch import CountSketch, row_lengths
from fedferret.bases.positions import num_bytes, pack_positions
from fedferret.bases.quantise import Packed, pack_vector
from fedferret.bases.top_k import top_k
from fedferret.core import tree
from fedferret.core.algorithm import Algorithm, ClientReply, Pooled, Shapes, StateBytes, Weighting, WireCost
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.core.norms import euclidean_norm
from fedferret.core.pooling import NotFinite
from fedferret.core.task import Examples, Task
from fedferret.local.first_order import FirstOrder


@dataclass(frozen=True, kw_only=True)
class FetchSGD(Algorithm[FetchSGDPublic, FetchSGDServer | None, None, FetchSGDEntry, Sketch]):
    """The heaviest of what the clients' sketches add up to. See ``Algorithm`` for arguments and results."""

    name: ClassVar[str] = "fetch-sgd"
    holds_bf16: ClassVar[bool] = True
    num_rows: int = 5  # R, the published code's
    num_columns: int = 500_000  # C, the published code's; C cells tell about C heavy weights from noise
    kept: int = 50_000  # k, the published code's: a tenth of C
    bits: Literal[32, 16] = 16  # of a cell up and of a value down; the paper counts 32
    momentum: float = 0.9  # ρ, the paper's
    masking: bool = True  # the published code's; without, a weight that was sent goes on for 1 / (1 - ρ) rounds
    error: Literal["subtract", "zero"] = (
        "subtract"  # what was sent, as in the paper, or all in its cells, as in its code
    )
    server_learning_rate: float = 1.0  # η, of FedAvg
    weighting: Weighting = "examples"  # FedAvg's n_j; "equal" counts every client once
    training: FirstOrder = field(default_factory=FirstOrder)

    def __post_init__(self) -> None:
        for name in ("num_columns", "kept"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum={self.momentum}: must lie in [0, 1)")
        row_lengths(self.num_rows, self.num_columns)  # refuses rows that cannot be
        if self.kept > self.num_columns:
            raise UserError(
                f"kept={self.kept:,}, num_columns={self.num_columns:,}: a row of so few cells tells no more weights "
                f"apart, and what is kept would be noise; set kept to a tenth of num_columns, or to it at most"
            )

    def check(self, model: nn.Module, rounds: int) -> None:
        """Refuse more cells in a row than the model has weights; at most as many are kept."""
        total = tree.size(tree.parameters(model))
        if self.num_columns > total:
            raise UserError(
                f"num_columns={self.num_columns:,}: the model has {total:,} weights; "
                f"set num_columns to {total:,} or less"
            )

    @property
    def num_cells(self) -> int:
        """Σ C_r, how many values a client sends."""
        return sum(row_lengths(self.num_rows, self.num_columns))

    def wire_cost(self, shapes: Shapes, cohort: int, round: int) -> WireCost:
        """All cells up; k values and positions down."""
        total = sum(math.prod(shape) for shape in shapes.values())
        down = -(-self.kept * self.bits // 8) + num_bytes(self.kept, total)
        return WireCost.exact(self.num_cells * self.bits // 8, down)

    def state_growth(self, model: nn.Module, shapes: Shapes, round: int, clients: int) -> StateBytes:
        """The server's two sketches, fp32."""
        return StateBytes(server=8 * self.num_cells)

    def sum_values(self, shapes: Shapes, round: int) -> int:
        """The cells."""
        return self.num_cells

    def init(self, task: Task, key: Key) -> tuple[FetchSGDPublic, None]:
        """The base weights, and the key of all sketches."""
        weights = task.store(tree.parameters(task.model))
        return FetchSGDPublic(weights, key.fold("sketch").value), None

    def client_update(
        self, task: Task, public: FetchSGDPublic, client: None, data: Examples, key: Key
    ) -> ClientReply[None, Sketch]:
        """Train on the client's data; send the update's sketch."""
        sketch, offset = self._sketch(public), 0
        cells = sketch.zeros(task.device)
        with loaded(task, public.weights):
            trained = self.training.train(task, data, key.fold("train"))
            for _, delta in deltas(public.weights, trained):
                sketch.add_(cells, delta.to(cells.device), offset)
                offset += delta.numel()
        sent = Sketch(pack_vector(cells.cpu(), self.bits, key.fold("rounding")))
        return ClientReply(sent, None, trained.metrics)

    def accept(self, task: Task, public: FetchSGDPublic, payload: Sketch) -> None:
        """Refuse another number of cells or bits, and cells that are not finite."""
        if not (isinstance(payload, Sketch) and isinstance(payload.values, Packed)):
            raise ValueError(f"a {type(payload).__name__} came where a Sketch was expected")
        if (payload.values.length, payload.values.bits) != (self.num_cells, self.bits):
            raise ValueError("the sketch has other rows, columns or bits: the client has other settings")
        if not torch.isfinite(payload.values.unpack()).all():
            raise NotFinite("values holds NaN or infinity")

    def accept_sum(self, task: Task, public: FetchSGDPublic, sum: CellsSum) -> None:
        """Refuse a sum of another number of cells."""
        if not isinstance(sum, CellsSum) or sum.cells.shape != (self.num_cells,):
            raise ValueError(f"a sum came that is not of the sketch's {self.num_cells} cells")

    def update_norm(self, task: Task, public: FetchSGDPublic, payload: Sketch) -> float:
        """η ‖Δ_j‖: the squared norm of each row has the mean ‖Δ_j‖² over signs; of the rows' norms the middle one."""
        rows = torch.split(payload.values.unpack(), list(self._sketch(public).lengths))
        return self.server_learning_rate * median(euclidean_norm([row]) for row in rows)

    def server_update(
        self, task: Task, public: FetchSGDPublic, server: FetchSGDServer | None, pooled: Pooled[CellsSum], key: Key
    ) -> tuple[FetchSGDServer, FetchSGDEntry]:
        """Add to momentum and error; take the heaviest weights out of the error."""
        mean = pooled.only.cells.cpu()
        momentum = mean.clone() if server is None else self.momentum * server.momentum + mean
        error = self.server_learning_rate * momentum
        if server is not None:
            error += server.error
        positions, values = self._heaviest(task, public, error)
        packed = pack_vector(values, self.bits, key.fold("rounding"))
        sent = self._sketch(public).sketched(positions, packed.unpack())
        momentum = momentum.masked_fill(sent != 0, 0.0) if self.masking else momentum
        error = error - sent if self.error == "subtract" else error.masked_fill(sent != 0, 0.0)
        delta = Sparse(pack_positions(positions, tree.size(public.weights)), packed)
        return FetchSGDServer(momentum, error), FetchSGDEntry(delta)

    def apply(self, task: Task, public: FetchSGDPublic, entry: FetchSGDEntry) -> None:
        """w <- w - Δ where Δ is given, element by element."""
        step_where_given_(public.weights, entry.delta, 1.0, task.rounding)

    @contextmanager
    def model(self, task: Task, public: FetchSGDPublic, client: None = None) -> Iterator[nn.Module]:
        """The one global model."""
        with loaded(task, public.weights) as model:
            yield model

    def _sketch(self, public: FetchSGDPublic) -> CountSketch:
        """Of the whole model; all rounds and nodes have the same."""
        return CountSketch(self.num_rows, self.num_columns, tree.size(public.weights), Key(public.seed))

    def _heaviest(self, task: Task, public: FetchSGDPublic, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and values of the k largest estimates."""
        sketch, there = self._sketch(public), cells.to(task.device)
        return top_k(lambda: sketch.estimates(there), self.kept)
