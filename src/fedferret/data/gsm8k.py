"""GSM8K: grade-school mathematics with step-by-step solutions, 7,473 training and 1,319 test problems.

Cobbe et al. "Training Verifiers to Solve Math Word Problems", 2021, arXiv 2110.14168.

As in the Ferret paper: three clients with equal shares of the shuffled training problems; the official test set is held
out ("rows"). A response is the solution as published, with annotations such as <<3+4=7>>, and ends with "#### 7".
``metadata["answer"]`` is the final number without commas, for exact match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError
from fedferret.data.examples import Example, FederatedData, check_at_least
from fedferret.data.partition import Partition
from fedferret.data.published import data_settings_in_errors, hub_rows, limit_held_out, local_rows
from fedferret.data.rows import Row
from fedferret.data.table import Table

if TYPE_CHECKING:
    from fedferret.core.keys import Key

NOTICE = "GSM8K, (c) 2021 OpenAI; MIT licence."

_COLUMNS = ("question", "answer")
_HOW_TO_GET = (
    "get train.jsonl and test.jsonl from https://github.com/openai/grade-school-math (grade_school_math/data) "
    "and set data.path to their folder"
)


@dataclass(frozen=True)
class GSM8K:
    """Settings of the source "gsm8k"; the defaults are the paper's."""

    path: str | None = None  # a folder with train.jsonl and test.jsonl; None: from the hub
    name: str = "openai/gsm8k"  # on the hub
    revision: str | None = None  # a commit on the hub makes the run repeatable
    clients: int = 3
    max_held_out: int | None = None  # examples held out, drawn by the key; None: the whole test set

    def __post_init__(self) -> None:
        check_at_least("max_held_out", self.max_held_out, 1)
        with data_settings_in_errors():
            self._partition()

    def load(self, key: Key) -> FederatedData:
        """Read both sets and partition the training set.

        Raises:
            UserError: if the data cannot be read, or there are more clients than training problems.
        """
        table = Table(prompt_column="question", response_column="answer", partition=self._partition())
        with data_settings_in_errors():
            data = table.federate(self._rows("train"), self._rows("test"), key, source="gsm8k", notice=NOTICE)
        data = replace(
            data,
            clients={client: _with_answers(examples) for client, examples in data.clients.items()},
            held_out={name: _with_answers(examples) for name, examples in data.held_out.items()},
        )
        return limit_held_out(data, self.max_held_out, key.fold("held out"))

    def _rows(self, split: str) -> list[Row]:
        if self.path is not None:
            return local_rows(Path(self.path) / f"{split}.jsonl", _COLUMNS, _HOW_TO_GET)
        return hub_rows(self.name, split, _COLUMNS, _HOW_TO_GET, subset="main", revision=self.revision)

    def _partition(self) -> Partition:
        return Partition("iid", self.clients)


def _with_answers(examples: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(
        replace(example, metadata={**example.metadata, "answer": final_answer(example.response)})
        for example in examples
    )


def final_answer(solution: str) -> str:
    """The number after the last "####", without commas.

    Raises:
        UserError: if nothing follows a "####".

    >>> final_answer("2 x 600 = <<2*600=1200>>1200\\n#### 1,200")
    '1200'
    """
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise UserError(f'a GSM8K solution has no "#### answer" at its end: "…{solution[-40:]}"; {_HOW_TO_GET}')
    return answer.strip().replace(",", "")
