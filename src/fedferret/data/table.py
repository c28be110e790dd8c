"""Rows with named columns to federated data: shared by local files and the hub.

A row is a prompt (with an optional input) and a response, or a list of chat messages. Every assistant message that
follows another message becomes one example. Rows are held out and partitioned whole, so no training prompt contains
a message of a held-out conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedferret.core.errors import UserError, nearest
from fedferret.data.examples import ROLES, Example, FederatedData, Turn, check_fraction, instruction_example
from fedferret.data.partition import Partition, named_clients

if TYPE_CHECKING:
    from fedferret.core.keys import Key

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Record:
    examples: tuple[Example, ...]
    client: str | None
    category: str | None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of the columns.

    The columns of inputs, messages, categories and choices may be missing under their default names.
    """

    prompt_column: str = "instruction"
    input_column: str = "input"
    response_column: str = "response"
    messages_column: str = "messages"  # a list of {"role", "content"}; used where it exists
    category_column: str = "category"
    choices_column: str = "choices"  # a list of texts that includes the response, for the metric "choice"

    def examples(self, rows: Sequence[Row], source: str) -> tuple[Example, ...]:
        """The examples of all rows, in order.

        Args:
            rows: with the columns of the settings.
            source: names the rows in errors.
        Raises:
            UserError: for a missing column or a faulty row, with the row's number.
        """
        return _examples(self._records(rows, source, None))

    def _records(self, rows: Sequence[Row], source: str, client_column: str | None) -> list[_Record]:
        if not rows:
            raise UserError(f"{source} holds no rows: give data with at least one example")
        columns = set(rows[0])
        chat = self.messages_column in columns
        optional = ("input_column", "messages_column", "category_column", "choices_column")
        required = [name for name in optional if getattr(self, name) != getattr(Columns, name)]
        required += [] if chat else ["prompt_column", "response_column"]
        for name in [*required, *([] if client_column is None else ["client_column"])]:
            given = getattr(self, name)
            if given not in columns:
                hint = nearest(given, columns)
                there = "" if hint.startswith("allowed") else f" (columns: {', '.join(sorted(columns))})"
                raise UserError(f'{source} has no column "{given}" (data.{name}): {hint}{there}')
        return [
            self._record(row, chat, client_column, f"{source}, row {number}")
            for number, row in enumerate(rows, start=1)
        ]

    def _record(self, row: Row, chat: bool, client_column: str | None, where: str) -> _Record:
        category = row.get(self.category_column)
        metadata = {} if category is None else {"category": str(category)}
        client = None if client_column is None else _text(row, client_column, where)
        metadata |= {} if client is None else {"client": client}
        examples = self._chat(row, metadata, where) if chat else (self._pair(row, metadata, where),)
        return _Record(examples, client, metadata.get("category"))

    def _pair(self, row: Row, metadata: Mapping[str, Any], where: str) -> Example:
        instruction = _text(row, self.prompt_column, where)
        response = _text(row, self.response_column, where)
        extra = row.get(self.input_column)
        choices = row.get(self.choices_column)
        if choices is not None:
            metadata = {**metadata, "choices": _choices(choices, response, where)}
        return instruction_example(instruction, "" if extra is None else str(extra), response, metadata)

    def _chat(self, row: Row, metadata: dict[str, str], where: str) -> tuple[Example, ...]:
        messages = row.get(self.messages_column)
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise UserError(f'{where}: "{self.messages_column}" is not a list of {{"role", "content"}} messages')
        turns = tuple(_turn(message, where) for message in messages)
        examples = tuple(
            Example(turns[: index + 1], metadata) for index, turn in enumerate(turns) if index and turn.role == ROLES[2]
        )
        if not examples:
            raise UserError(f"{where}: no assistant message follows another message, so nothing can be trained on")
        return examples


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
        records = self._records(rows, source, self.client_column)
        held_out: dict[str, tuple[Example, ...]] = {}
        in_categories = self._in_categories(records, source)
        training = [record for record in records if record.category not in self.held_out_categories]
        if held_out_rows is not None:
            held_out["rows"] = _examples(self._records(held_out_rows, f"{source} (held out)", self.client_column))
        elif self.held_out_fraction > 0:
            chosen = _choose_held_out(training, self.held_out_fraction, key.fold("held out"))
            held_out["rows"] = _examples([training[index] for index in sorted(chosen)])
            training = [record for index, record in enumerate(training) if index not in chosen]
        if in_categories:
            held_out["categories"] = _examples(in_categories)
        clients = self._by_client(training, key.fold("partition"))
        return FederatedData(clients=clients, held_out=held_out, source=source, notice=notice)

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


def _text(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if value is None or not str(value).strip():
        raise UserError(f'{where}: column "{column}" is empty; fill it or remove the row')
    return str(value)


def _choices(value: object, response: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or response not in map(str, value):
        raise UserError(f"{where}: the choices {value!r:.60} are not a list of texts that includes the response")
    return tuple(map(str, value))


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
        raise UserError(f'{where}: a message has no "role" and "content": {message!r:.60}')
    if message.get("role") not in ROLES:
        raise UserError(f"{where}: role {message.get('role')!r} of a message is not one of {', '.join(ROLES)}")
    return Turn(message["role"], message["content"])


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
