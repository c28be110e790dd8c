"""Rows with named columns to federated data: shared by local files and the hub.

``data/shapes.py`` recognises what a row is: messages, a prompt and a response, or a text. Rows are held out and
partitioned whole, so no training prompt contains a message of a held-out conversation.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import UserError, nearest
from fedferret.data.examples import Example, FederatedData, check_at_least, check_fraction
from fedferret.data.faulty_rows import FaultyRow, FaultyRows, records, text_in, text_of
from fedferret.data.messages import shown
from fedferret.data.partition import Partition, client_names
from fedferret.data.rows import Row
from fedferret.data.shapes import Shape, require, shape_of, unused
from fedferret.data.stored import StoredRecords

if TYPE_CHECKING:
    from fedferret.core.keys import Key

_LOOKED_AT = 100  # rows: their columns say the shape


@dataclass(frozen=True)
class _Record:
    examples: tuple[Example, ...]
    client: str | None
    category: str | None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of the columns.

    Under their default names columns may be missing: the shape of the rows says which are read.
    """

    prompt_column: str = "instruction"
    input_column: str = "input"
    response_column: str = "response"
    messages_column: str = "messages"  # a list of {"role", "content"}
    text_column: str | None = None  # texts to train on whole; None: "text", where the rows have no other shape
    category_column: str = "category"
    choices_column: str | None = "choices"  # a list of texts that includes the response, for the metric "choice"
    faulty_rows: FaultyRows = "refuse"  # "skip": rows without text and the like are left out and counted

    def examples(
        self, rows: Sequence[Row], source: str, log: Callable[[str], None] = lambda line: None
    ) -> Sequence[Example]:
        """The examples of all rows, in order.

        Args:
            rows: with the columns of the settings, or of a known shape.
            source: names the rows in errors.
            log: called with lines on how the rows were read.
        Raises:
            UserError: for a missing column or a faulty row, with the row's number.
        """
        read, notes = self._records(rows, source, None)
        for note in notes:
            log(note)
        return read.examples(range(len(read)))

    def _records(
        self, rows: Sequence[Row], source: str, client_column: str | None
    ) -> tuple[StoredRecords, tuple[str, ...]]:
        """A record of each row, and lines for the user on how the rows were read."""
        if not rows:
            raise UserError(f"{source} holds no rows: give data with at least one example")
        first = list(islice(rows, _LOOKED_AT))
        columns = set().union(*first)
        asked = {
            name: getattr(self, f"{name}_column")
            for name in ("messages", "text", "prompt", "input", "response")
            if getattr(self, f"{name}_column") != getattr(Columns, f"{name}_column")
        }
        shape = shape_of(columns, asked, source)
        others = {name: getattr(self, name) for name in ("category_column", "choices_column")}
        for name, column in others.items():
            if column not in (None, getattr(Columns, name)):
                require(column, columns, name, source)
        if client_column is not None:
            require(client_column, columns, "client_column", source)
        read, counted = records(rows, partial(self._record, shape, client_column), source, self.faulty_rows)
        left = unused(first, columns, {*shape.used, *filter(None, (*others.values(), client_column))})
        return read, (f"read as: {shape.described}", *left, *counted)

    def _record(self, shape: Shape, client_column: str | None, row: Row, where: str) -> _Record:
        category = self._category(row, where)
        metadata: dict[str, Any] = {} if category is None else {"category": category}
        client = None if client_column is None else text_of(row, client_column, where, numbers=True)
        metadata |= {} if client is None else {"client": client}
        examples = shape.examples(row, metadata, where)
        choices = None if self.choices_column is None else row.get(self.choices_column)
        if choices is not None and len(examples) == 1:
            read = _choices(choices, examples[0].response, where)
            examples = (replace(examples[0], metadata={**examples[0].metadata, "choices": read}),)
        return _Record(examples, client, metadata.get("category"))

    def _category(self, row: Row, where: str) -> str | None:
        """The row's category; None where the column was not asked for and holds something else."""
        value = row.get(self.category_column)
        try:
            return None if value is None else text_in(value, f'{where}: column "{self.category_column}"', numbers=True)
        except FaultyRow:
            if self.category_column == Columns.category_column:
                return None
            raise


@dataclass(frozen=True, kw_only=True)
class Table(Columns):
    """The settings of any data that comes as rows.

    ``client_column`` names the column with each row's client; without it, ``partition`` assigns the rows.
    """

    client_column: str | None = None
    held_out_fraction: float = 0.1  # share of the rows, never a client's last; unused where held-out rows are given
    max_held_out: int | None = 2_000  # rows of that share, drawn by the key; the others are trained on
    held_out_categories: tuple[str, ...] = ()  # all rows of these become the held-out set "categories"
    partition: Partition = field(default_factory=Partition)

    def __post_init__(self) -> None:
        check_fraction("held_out_fraction", self.held_out_fraction)
        check_at_least("max_held_out", self.max_held_out, 1)

    @property
    def holds_out(self) -> bool:
        """Whether the settings hold anything out."""
        return self.held_out_fraction > 0 or bool(self.held_out_categories)

    def federate(
        self, rows: Sequence[Row], held_out_rows: Sequence[Row] | None, key: Key, source: str, notice: str | None = None
    ) -> FederatedData:
        """Make clients and the held-out sets "rows" and "categories" from rows.

        Args:
            rows: with the columns of the settings.
            held_out_rows: the held-out set "rows"; None: ``held_out_fraction`` of ``rows``.
            key: draws the held-out rows and the partition.
            source: names the rows in errors and the data in summaries.
            notice: licence or benchmark notice of the data.
        Raises:
            UserError: for a missing column, a faulty row, an unknown category or an impossible partition.
        """
        found, notes = self._records(rows, source, self.client_column)
        in_categories = self._in_categories(found.categories, source)
        kept = (row for row, category in enumerate(found.categories) if category not in self.held_out_categories)
        training = array("i", kept)
        held_out: dict[str, Sequence[Example]] = {}
        unseen = [found.hashes[row] for row in in_categories]
        if held_out_rows is not None:
            name = getattr(held_out_rows, "name", f"{source} (held out)")
            other, more = self._records(held_out_rows, name, self.client_column)
            held_out["rows"] = other.examples(range(len(other)))
            notes += tuple(f"held out: {line}" for line in more if line not in notes)
            unseen += other.hashes
        elif self.held_out_fraction > 0:
            chosen, more = self._choose_held_out([found.clients[row] for row in training], key.fold("held out"))
            rows_held_out = [training[index] for index in sorted(chosen)]
            held_out["rows"] = found.examples(rows_held_out)
            training = array("i", (row for index, row in enumerate(training) if index not in chosen))
            notes, unseen = (*notes, *more), [*unseen, *(found.hashes[row] for row in rows_held_out)]
        if in_categories:
            held_out["categories"] = found.examples(in_categories)
        notes = (*notes, *_trained_too((found.hashes[row] for row in training), unseen))
        clients = self._by_client(found, training, key.fold("partition"))
        return FederatedData(clients=clients, held_out=held_out, source=source, notice=notice, notes=notes)

    def _in_categories(self, categories: Sequence[str | None], source: str) -> list[int]:
        """The rows to hold out as the set "categories"."""
        known = {category for category in categories if category is not None}
        for category in self.held_out_categories:
            if category not in known:
                raise UserError(f'{source} has no category "{category}" to hold out: {nearest(category, known)}')
        if known and known <= set(self.held_out_categories):
            raise UserError(f"{source}: every category is in held_out_categories, so no row is left to train on")
        return [row for row, category in enumerate(categories) if category in self.held_out_categories]

    def _choose_held_out(self, clients: Sequence[str | None], key: Key) -> tuple[set[int], tuple[str, ...]]:
        """The rows to hold out, drawn over all clients, so that each client keeps a row; and the lines to say."""
        wanted = round(len(clients) * self.held_out_fraction)
        notes: tuple[str, ...] = ()
        if self.max_held_out is not None and wanted > self.max_held_out:
            notes = (
                f"{self.max_held_out:,} rows are held out and not {wanted:,}, because data.max_held_out is "
                f"{self.max_held_out:,}; the others are trained on.",
            )
            wanted = self.max_held_out
        left, chosen = Counter(clients), set[int]()
        for index in array("q", key.order(len(clients)).numpy().tobytes()):
            if len(chosen) == wanted:
                break
            if left[clients[index]] > 1:
                left[clients[index]] -= 1
                chosen.add(index)
        return chosen, notes

    def _by_client(self, found: StoredRecords, rows: Sequence[int], key: Key) -> dict[str, Sequence[Example]]:
        if self.client_column is not None:
            grouped: dict[str, list[int]] = {}
            for row in rows:
                grouped.setdefault(str(found.clients[row]), []).append(row)
            return {client: found.examples(grouped[client]) for client in sorted(grouped)}
        known = [category for row in rows if (category := found.categories[row]) is not None]
        parts = self.partition.split(len(rows), known if len(known) == len(rows) else None, key)
        named = zip(client_names(len(parts)), parts, strict=True)
        return {client: found.examples(rows[row] for row in part) for client, part in named}


def _trained_too(training: Iterable[int], held_out: Sequence[int]) -> tuple[str, ...]:
    """The line to say where held-out rows are trained on too, by the rows' hashes."""
    known = set(held_out)
    both = {each for each in training if each in known}
    count = sum(each in both for each in held_out)
    if not count:
        return ()
    return (f"{count:,} of {len(held_out):,} held-out rows are trained on too, and say little about rows unseen.",)


def _choices(value: object, response: str, where: str) -> tuple[str, ...]:
    listing = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    choices = tuple(text_in(choice, f"{where}: a choice", numbers=True) for choice in listing)
    if response not in choices:
        raise FaultyRow(
            f"{where}: the choices {shown(value)} are not a list of texts that includes the response; mend them, or "
            f'leave the column unread with data.choices_column = "none"'
        )
    if len(set(choices)) < len(choices):
        raise FaultyRow(f"{where}: two choices are the same text; give each once")
    return choices
