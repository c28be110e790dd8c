"""A data set of the Hugging Face hub, or a local folder in the hub's layout, loaded by ``datasets``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedferret.core.errors import UserError
from fedferret.data.examples import FederatedData
from fedferret.data.rows import Row
from fedferret.data.table import Table

if TYPE_CHECKING:
    from fedferret.core.keys import Key


@dataclass(frozen=True)
class Hub(Table):
    """Settings of the source "hub": the rows of one split.

    The rows of ``held_out_split``, where given, are the held-out set "rows".
    """

    name: str
    subset: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    revision: str | None = None  # a commit on the hub makes the run repeatable

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name.strip("/ "):
            raise UserError('data.name is empty: give a data set of the hub such as "owner/name"')

    @property
    def holds_out(self) -> bool:
        """Whether the settings hold anything out."""
        return self.held_out_split is not None or super().holds_out

    def load(self, key: Key) -> FederatedData:
        """Download the rows (or read the hub's cache), check them, hold rows out and partition the others.

        Raises:
            UserError: if the data set cannot be loaded or a row is faulty.
        """
        held_out = None if self.held_out_split is None else self._rows(self.held_out_split)
        rows = self._rows(self.split)
        notice = f"Data set {self.name} of the Hugging Face hub: its card states its licence."
        return self.federate(rows, held_out, key, source=f"{self.name}/{self.split}", notice=notice)

    def _rows(self, split: str) -> list[Row]:
        advice = 'use source "files" with a local copy'
        return rows_of_hub(self.name, split, advice, self.subset, self.revision)


def rows_of_hub(
    name: str, split: str, advice: str, subset: str | None = None, revision: str | None = None
) -> list[Row]:
    """All rows of a split.

    Args:
        name: of a data set on the hub, or of a local folder.
        split: of the data set.
        advice: what else the user can do; the end of the error message.
        subset: configuration of the data set; None: the default.
        revision: commit on the hub; None: the newest.
    Raises:
        UserError: if the split cannot be loaded.
    """
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        # the library's errors have many lines; the first gives the reason
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f'cannot load "{name}" (split "{split}") from the hub: {reason} - check the name and the network, '
            f"or {advice}"
        ) from None
    rows: list[Row] = table.to_list()
    return rows
