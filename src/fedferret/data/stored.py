"""Records and examples of rows, made again from the row whenever they are asked for.

A row takes a hundred bytes in its file and a thousand as Python objects. Of many rows, only what partitions them stays:
the client, the category, the number of examples, their turns' roles and a hash, some forty bytes. Of few rows, the
objects stay.
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar, overload

from fedferret.data.examples import Example

T = TypeVar("T")
N = TypeVar("N", bound=Hashable)
Order: TypeAlias = tuple[tuple[str, bool], ...]  # of an example's turns: role, and whether it calls tools

KEPT = 20_000  # rows of which the objects stay


class Record(Protocol):
    """What is read of a row."""

    @property
    def examples(self) -> tuple[Example, ...]:
        """At least one."""
        ...

    @property
    def client(self) -> str | None:
        """The name of the row's client, where a column has it."""
        ...

    @property
    def category(self) -> str | None:
        """The row's category, where a column has it."""
        ...


class Outline(NamedTuple):
    """What the examples of one row have in common: each but the last is the beginning of the last one's turns."""

    order: Order  # of the last example
    lengths: tuple[int, ...]  # turns of each example
    tools: bool  # whether tools are offered

    def orders(self) -> list[Order]:
        """Of each example."""
        return [self.order[:length] for length in self.lengths]


def outline_of(examples: Sequence[Example]) -> Outline:
    """The outline of the examples of one row.

    Args:
        examples: at least one.
    """
    last = examples[-1]
    order = tuple([(turn.role, bool(turn.tool_calls)) for turn in last.turns])
    return Outline(order, tuple([len(each.turns) for each in examples]), bool(last.metadata.get("tools")))


class Names(Sequence[N | None], Generic[N]):
    """A name or none for each row; equal names are stored once."""

    def __init__(self) -> None:
        self._numbers, self._names = array("i"), list[N | None]([None])
        self._known: dict[N | None, int] = {None: 0}

    def append(self, name: N | None) -> None:
        """Add the name of the next row."""
        number = self._known.setdefault(name, len(self._names))
        if number == len(self._names):
            self._names.append(name)
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> N | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[N | None]: ...

    def __getitem__(self, index: int | slice) -> Any:
        found = self._numbers[index]
        return self._names[found] if isinstance(found, int) else [self._names[number] for number in found]


class StoredRecords(Sequence[Any]):
    """The records of rows, in order."""

    def __init__(self, read: Callable[[int], Any], kept: bool) -> None:
        """No record yet.

        Args:
            read: makes the record of the row with a number.
            kept: whether the records stay in memory.
        """
        self._read = read
        self._kept: list[Any] | None = [] if kept else None
        self._rows, self.counts, self.hashes = array("i"), array("i"), array("q")
        self.clients, self.categories = Names[str](), Names[str]()
        self.outlines = Names[Outline]()

    def append(self, row: int, record: Any) -> None:
        """Add the record of a row.

        Args:
            row: its number.
            record: what ``read`` gives of it.
        """
        self._rows.append(row)
        self.counts.append(len(record.examples))
        self.hashes.append(hash(tuple(turn.content for turn in record.examples[-1].turns)))
        self.clients.append(record.client)
        self.categories.append(record.category)
        self.outlines.append(outline_of(record.examples))
        if self._kept is not None:
            self._kept.append(record)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self._read(self._rows[index]) if self._kept is None else self._kept[index]

    def examples(self, records: Iterable[int]) -> Sequence[Example]:
        """The examples of some records.

        Args:
            records: their numbers, in the order of the examples.
        """
        chosen = array("i", records)
        if self._kept is None:
            return StoredExamples(self, chosen)
        return tuple(chain.from_iterable(self._kept[number].examples for number in chosen))


class ExamplesByNumber(Sequence[Example]):
    """Examples that are made when they are asked for; a slice of them is a tuple."""

    @abstractmethod
    def example(self, number: int) -> Example:
        """Make an example.

        Args:
            number: from 0 to below the length.
        """

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        numbers = range(len(self))[index]
        return self.example(numbers) if isinstance(numbers, int) else tuple(map(self.example, numbers))


class StoredExamples(ExamplesByNumber):
    """Examples of many rows; one that is asked for is made of its row."""

    def __init__(self, records: StoredRecords, chosen: array[int]) -> None:
        """Choose records.

        Args:
            records: of all rows.
            chosen: numbers of the records, in the order of the examples.
        """
        self._records, self._chosen = records, chosen
        counts = [records.counts[number] for number in chosen]
        self._ends = None if all(count == 1 for count in counts) else array("q", accumulate(counts))

    def __len__(self) -> int:
        return len(self._chosen) if self._ends is None else self._ends[-1]

    def example(self, number: int) -> Example:
        """See ``ExamplesByNumber``."""
        if self._ends is None:
            example: Example = self._records[self._chosen[number]].examples[0]
            return example
        place = bisect_right(self._ends, number)
        examples: tuple[Example, ...] = self._records[self._chosen[place]].examples
        return examples[number - self._ends[place]]  # from the end of the record's examples

    def __iter__(self) -> Iterator[Example]:
        for number in self._chosen:
            yield from self._records[number].examples

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as a list's

    @property
    def outlines(self) -> Iterator[Outline]:
        """The outline of each row; none is read."""
        return (outline for row in self._chosen if (outline := self._records.outlines[row]) is not None)

    @property
    def categories(self) -> Iterator[str]:
        """The category of each example that has one; no row is read."""
        for number in self._chosen:
            category = self._records.categories[number]
            if category is not None:
                for _ in range(self._records.counts[number]):
                    yield category


def outlines_of(examples: Sequence[Example]) -> Iterator[Outline]:
    """The outlines of the rows that examples were made of, in order; no row is read.

    Args:
        examples: of any source. Those that were not made of rows have an outline each.
    """
    if isinstance(examples, StoredExamples):
        return examples.outlines
    return (outline_of((each,)) for each in examples)


def categories_of(examples: Sequence[Example]) -> Iterator[str]:
    """The category of each example that has one.

    Args:
        examples: of any source.
    """
    if isinstance(examples, StoredExamples):
        return examples.categories
    return (str(each.metadata["category"]) for each in examples if "category" in each.metadata)


def taken(examples: Sequence[Example], numbers: Iterable[int]) -> Sequence[Example]:
    """Some of the examples; of many rows, none is read.

    Args:
        examples: of any source.
        numbers: of the examples to take, in order.
    """
    if isinstance(examples, StoredExamples):
        return Chosen(examples, numbers)
    return tuple(examples[number] for number in numbers)


class Chosen(ExamplesByNumber):
    """Some of many examples, by number."""

    def __init__(self, examples: Sequence[Example], numbers: Iterable[int]) -> None:
        """Choose examples.

        Args:
            examples: of any source.
            numbers: of those that are chosen, in order.
        """
        self._examples, self._numbers = examples, array("i", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def example(self, number: int) -> Example:
        """See ``ExamplesByNumber``."""
        return self._examples[self._numbers[number]]
