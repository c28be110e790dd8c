"""Rows partitioned among clients by flwr-datasets' partitioners, seeded by a key.

    iid            equal shares of the shuffled rows
    dirichlet      each category's rows by shares drawn from Dirichlet(alpha): small alpha, few categories per client
    pathological   exactly ``classes`` categories per client, the first of them in turn: with at least as many clients
                   as categories every row has a client
    linear, square, exponential   client i holds a share that grows as i, i squared, e to the i (IID otherwise)
    natural        a column names the client of each row; used whenever ``client_column`` is set, so it has no kind here

The sizes of iid, linear, square and exponential shares are fixed; the key draws the rows of each client. No global
generator is used.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fedferret.core.errors import UserError, nearest

if TYPE_CHECKING:
    from fedferret.core.keys import Key

T = TypeVar("T")

BY_SIZE = ("iid", "linear", "square", "exponential")
BY_CATEGORY = ("dirichlet", "pathological")


@dataclass(frozen=True)
class Partition:
    """How rows without a client are partitioned."""

    kind: str = "iid"
    clients: int = 10
    alpha: float = 0.5  # dirichlet
    balanced: bool = False  # dirichlet: a client with an average share gets no further category, as in published code
    classes: int = 2  # pathological: categories per client
    min_examples: int = 1  # per client; 0 allows clients without examples

    def __post_init__(self) -> None:
        if self.kind not in BY_SIZE + BY_CATEGORY:
            raise UserError(f'no partition is called "{self.kind}": {nearest(self.kind, BY_SIZE + BY_CATEGORY)}')
        for name, value, valid, allowed in (
            ("clients", self.clients, self.clients >= 1, "at least 1"),
            ("alpha", self.alpha, 0 < self.alpha < float("inf"), "a finite number above 0"),
            ("classes", self.classes, self.classes >= 1, "at least 1"),
            ("min_examples", self.min_examples, self.min_examples >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"partition.{name} is {value}: give {allowed}")

    def split(self, count: int, categories: Sequence[str] | None, key: Key) -> list[Sequence[int]]:
        """Assign each row to at most one client.

        Args:
            count: number of rows.
            categories: of the rows, ``count`` elements; None where rows have none.
            key: draws the shares and the rows of each client.
        Returns:
            The row indices of each client, ascending; "pathological" may leave categories unused where there are fewer
            clients than categories.
        Raises:
            UserError: for more clients than rows, missing categories, or a client with fewer than ``min_examples``.
        """
        if self.clients > count:
            raise UserError(f"partition.clients is {self.clients} but there are {count} rows: ask for fewer clients")
        if self.kind in BY_CATEGORY and categories is None:
            raise UserError(f'partition "{self.kind}" needs categories but the rows have none: set category_column')
        # flwr's partitioners by size do not shuffle, so the rows are shuffled here
        rows = key.fold("rows").order(count).numpy()
        columns: dict[str, Any] = {"row": rows}
        if self.kind in BY_CATEGORY and categories is not None:
            columns |= {"category": [categories[row] for row in rows]}
        if self.kind == "pathological" and self.classes > len(set(columns["category"])):
            raise UserError(
                f"partition.classes is {self.classes} but there are {len(set(columns['category']))} categories"
            )
        try:
            parts = self._assign(columns, self.min_examples, key)
        except ValueError as error:
            raise UserError(self._explain(error, columns, key)) from None
        self._check_sizes(parts)
        return parts

    def _assign(self, columns: dict[str, Any], min_examples: int, key: Key) -> list[Sequence[int]]:
        import datasets
        import numpy

        partitioner = self._partitioner(min_examples, key.fold("shares").words[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flwr warns of every Dirichlet draw that it repeats
            partitioner.dataset = datasets.Dataset.from_dict(columns)
            parts = (partitioner.load_partition(client).with_format("numpy") for client in range(self.clients))
            return [array("i", numpy.sort(part["row"][:]).astype("int32").tobytes()) for part in parts]

    def _partitioner(self, min_examples: int, seed: int) -> Any:
        try:
            from flwr_datasets import partitioner as flwr
        except ImportError:
            raise UserError(
                'partitioning rows needs a package: pip install "fedferret[partition]" (from a clone: '
                ".venv/bin/python -m pip install -c requirements.lock -e '.[partition]'), or name a client_column"
            ) from None

        match self.kind:
            case "dirichlet":
                return flwr.DirichletPartitioner(
                    self.clients,
                    "category",
                    float(self.alpha),
                    min_partition_size=min_examples,
                    self_balancing=self.balanced,
                    seed=seed,
                )
            case "pathological":
                return flwr.PathologicalPartitioner(
                    self.clients, "category", self.classes, class_assignment_mode="first-deterministic", seed=seed
                )
            case "linear":
                return flwr.LinearPartitioner(self.clients)
            case "square":
                return flwr.SquarePartitioner(self.clients)
            case "exponential":
                return flwr.ExponentialPartitioner(self.clients)
            case _:
                return flwr.IidPartitioner(self.clients)

    def _explain(self, error: ValueError, columns: dict[str, Any], key: Key) -> str:
        if self.kind != "dirichlet":
            reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
            return (
                f'partition "{self.kind}" cannot split these rows among {self.clients} clients: {reason}; ask for fewer'
            )
        sizes = [len(part) for part in self._assign(columns, 0, key)]
        return self._too_small(sizes.index(min(sizes)), min(sizes)) + " (11 draws failed)"

    def _check_sizes(self, parts: Sequence[Sequence[int]]) -> None:
        for client, part in enumerate(parts):
            if len(part) < self.min_examples:
                raise UserError(self._too_small(client, len(part)))

    def _too_small(self, client: int, size: int) -> str:
        holds = "no example" if size == 0 else f"{size} examples where partition.min_examples is {self.min_examples}"
        raise_alpha = "raise partition.alpha, " if self.kind == "dirichlet" else ""
        allow = "allow it with" if size == 0 else "lower"
        return (
            f"client {client} would hold {holds}: {raise_alpha}lower partition.clients or {allow} "
            f"partition.min_examples = {size}"
        )


def named_clients(rows: Sequence[T], parts: Sequence[Sequence[int]]) -> dict[str, tuple[T, ...]]:
    """The rows of each client, by name.

    Args:
        rows: of all clients.
        parts: indices of each client's rows.

    Returns:
        Rows by "client-0", "client-1" and so on, with as many digits as sort them in this order.
    """
    return {name: tuple(rows[row] for row in part) for name, part in zip(client_names(len(parts)), parts, strict=True)}


def client_names(count: int) -> list[str]:
    """Names of clients that have none.

    Args:
        count: of clients.

    Returns:
        "client-0", "client-1" and so on, with as many digits as sort them in this order.
    """
    digits = len(str(count - 1))
    return [f"client-{number:0{digits}}" for number in range(count)]
