"""Dolly-15K: some 15,000 instructions with responses in 8 categories, written by Databricks' employees.

Conover et al. "Free Dolly: Introducing the World's First Truly Open Instruction-Tuned LLM", 2023.

As in the Ferret paper and its code: the last category of the alphabet, "summarization", is held out whole. The rows of
the other categories are partitioned among 200 clients, each category by shares drawn from Dirichlet(0.5), with at least
10 rows per client. A client that holds an average share gets no further category. Held-out set: "categories".

Deviations: the code draws shares until every client has 10 rows; the partition here raises an error after 11 draws. The
code's prompt is Alpaca's except for one sentence, which reads "Write a response for the task request."
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.data.examples import FederatedData, check_at_least
from fedferret.data.partition import Partition
from fedferret.data.published import data_settings_in_errors, hub_rows, limit_held_out, local_rows
from fedferret.data.table import Table

if TYPE_CHECKING:
    from fedferret.core.keys import Key

NOTICE = "databricks-dolly-15k, (c) 2023 Databricks, Inc.; CC BY-SA 3.0."

_COLUMNS = ("instruction", "response", "category")
_HOW_TO_GET = (
    "get databricks-dolly-15k.jsonl from https://huggingface.co/datasets/databricks/databricks-dolly-15k "
    "and set data.path to it"
)


@dataclass(frozen=True)
class Dolly:
    """Settings of the source "dolly"; the defaults are the paper's."""

    path: str | None = None  # databricks-dolly-15k.jsonl; None: from the hub
    name: str = "databricks/databricks-dolly-15k"  # on the hub
    revision: str | None = None  # a commit on the hub makes the run repeatable
    clients: int = 200
    alpha: float = 0.5  # of the Dirichlet distribution: a smaller alpha gives fewer categories per client
    min_examples: int = 10  # per client; as in the published code
    held_out_category: str | None = None  # None: the last in the alphabet
    max_held_out: int | None = None  # examples held out, drawn by the key; None: all, as in the paper

    def __post_init__(self) -> None:
        check_at_least("max_held_out", self.max_held_out, 1)
        with data_settings_in_errors():
            self._partition()

    def load(self, key: Key) -> FederatedData:
        """Read the rows, hold out a category and partition the other rows.

        Raises:
            UserError: if the data cannot be read, the category is unknown, or no draw gives every client enough rows.
        """
        if self.path is not None:
            rows = local_rows(Path(self.path), _COLUMNS, _HOW_TO_GET)
        else:
            rows = hub_rows(self.name, "train", _COLUMNS, _HOW_TO_GET, revision=self.revision)
        table = Table(
            input_column="context",
            held_out_fraction=0,
            held_out_categories=(self.held_out_category or max(str(row["category"]) for row in rows),),
            partition=self._partition(),
        )
        with data_settings_in_errors():
            data = table.federate(rows, None, key, source="dolly", notice=NOTICE)
        return limit_held_out(data, self.max_held_out, key.fold("held out"))

    def _partition(self) -> Partition:
        return Partition("dirichlet", self.clients, self.alpha, balanced=True, min_examples=self.min_examples)
