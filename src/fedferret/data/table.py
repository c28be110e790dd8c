"""Rows with named columns to federated data: shared by local files and the hub.

``data/shapes.py`` recognises what a row is: messages, a prompt and a response, or a text. Rows are held out and
partitioned whole, so no training prompt contains a message of a held-out conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import UserError, nearest
from fedferret.core.text import plain_line
from fedferret.data.examples import Example, FederatedData, check_fraction
from fedferret.data.faulty_rows import FaultyRow, records, text_in, text_of
from fedferret.data.partition import Partition, named_clients
from fedferret.data.shapes import Row as Row
from fedferret.data.shapes import Shape, require, shape_of, unused

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
    choices_column: str = "choices"  # a list of texts that includes the response, for the metric "choice"

    def examples(
        self, rows: Sequence[Row], source: str, log: Callable[[str], None] = lambda line: None
    ) -> tuple[Example, ...]:
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
        return _examples(read)

    def _records(
        self, rows: Sequence[Row], source: str, client_column: str | None
    ) -> tuple[list[_Record], tuple[str, ...]]:
        """A record of each row, and lines for the user on how the rows were read."""
        if not rows:
            raise UserError(f"{source} holds no rows: give data with at least one example")
        columns = set().union(*islice(rows, _LOOKED_AT))
        asked = {
            name: getattr(self, f"{name}_column")
            for name in ("messages", "text", "prompt", "input", "response")
            if getattr(self, f"{name}_column") != getattr(Columns, f"{name}_column")
        }
        shape = shape_of(columns, asked, source)
        others = {name: getattr(self, name) for name in ("category_column", "choices_column")}
        for name, column in others.items():
            if column != getattr(Columns, name):
                require(column, columns, name, source)
        if client_column is not None:
            require(client_column, columns, "client_column", source)
        read, counted = records(rows, partial(self._record, shape, client_column), source)
        left = unused(columns, {*shape.used, *others.values(), client_column or ""})
        return read, tuple(line for line in (f"read as: {shape.described}", left, *counted) if line)

    def _record(self, shape: Shape, client_column: str | None, row: Row, where: str) -> _Record:
        category = row.get(self.category_column)
        place = f'{where}: column "{self.category_column}"'
        metadata: dict[str, Any] = {} if category is None else {"category": text_in(category, place, numbers=True)}
        client = None if client_column is None else text_of(row, client_column, where, numbers=True)
        metadata |= {} if client is None else {"client": client}
        examples = shape.examples(row, metadata, where)
        choices = row.get(self.choices_column)
        if choices is not None and len(examples) == 1:
            read = _choices(choices, examples[0].response, where)
            examples = (replace(examples[0], metadata={**examples[0].metadata, "choices": read}),)
        return _Record(examples, client, metadata.get("category"))


@dataclass(frozen=True, kw_only=True)
class Table(Columns):
    """The settings of any data that comes as rows.

    ``client_column`` names the column with each row's client; without it, ``partition`` assigns the rows.
    """

    client_column: str | None = None
    held_out_fraction: float = 0.1  # share of the rows, never a client's last; unused where held-out rows are given
    held_out_categories: tuple[str, ...] = ()  # all rows of these become the held-out set "categories"
    partition: Partition = field(default_factory=Partition)

    def __post_init__(self) -> None:
        check_fraction("held_out_fraction", self.held_out_fraction)

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
        held_out: dict[str, tuple[Example, ...]] = {}
        in_categories = self._in_categories(found, source)
        training = [record for record in found if record.category not in self.held_out_categories]
        if held_out_rows is not None:
            other, lines = self._records(held_out_rows, f"{source} (held out)", self.client_column)
            held_out["rows"] = _examples(other)
            notes += tuple(f"held out: {line}" for line in lines if line not in notes)
        elif self.held_out_fraction > 0:
            chosen = _choose_held_out(training, self.held_out_fraction, key.fold("held out"))
            held_out["rows"] = _examples([training[index] for index in sorted(chosen)])
            training = [record for index, record in enumerate(training) if index not in chosen]
        if in_categories:
            held_out["categories"] = _examples(in_categories)
        clients = self._by_client(training, key.fold("partition"))
        return FederatedData(clients=clients, held_out=held_out, source=source, notice=notice, notes=notes)

    def _in_categories(self, records: Sequence[_Record], source: str) -> list[_Record]:
        """The records to hold out as the set "categories"."""
        known = {record.category for record in records if record.category is not None}
        for category in self.held_out_categories:
            if category not in known:
                raise UserError(f'{source} has no category "{category}" to hold out: {nearest(category, known)}')
        if known and known <= set(self.held_out_categories):
            raise UserError(f"{source}: every category is in held_out_categories, so no row is left to train on")
        return [record for record in records if record.category in self.held_out_categories]

    def _by_client(self, records: Sequence[_Record], key: Key) -> dict[str, tuple[Example, ...]]:
        if self.client_column is not None:
            grouped: dict[str, list[_Record]] = {}
            for record in records:
                grouped.setdefault(str(record.client), []).append(record)
            return {client: _examples(grouped[client]) for client in sorted(grouped)}
        categories = [record.category for record in records]
        known = [category for category in categories if category is not None]
        parts = self.partition.split(len(records), known if len(known) == len(records) else None, key)
        return {client: _examples(held) for client, held in named_clients(records, parts).items()}


def _examples(records: Sequence[_Record]) -> tuple[Example, ...]:
    return tuple(example for record in records for example in record.examples)


def _choices(value: object, response: str, where: str) -> tuple[str, ...]:
    listing = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    choices = tuple(text_in(choice, f"{where}: a choice", numbers=True) for choice in listing)
    if response not in choices:
        shown = plain_line(repr(value), 60)
        raise FaultyRow(f"{where}: the choices {shown} are not a list of texts that includes the response")
    return choices


def _choose_held_out(records: Sequence[_Record], fraction: float, key: Key) -> set[int]:
    """Indices of the rows to hold out: a share drawn over all clients, which leaves each client at least one row."""
    wanted = round(len(records) * fraction)
    left = Counter(record.client for record in records)
    chosen: set[int] = set()
    for index in key.permutation(len(records)):
        if len(chosen) < wanted and left[records[index].client] > 1:
            left[records[index].client] -= 1
            chosen.add(index)
    return chosen
