"""What every source returns: the examples of each client and of each held-out set."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fedferret.core.errors import UserError
from fedferret.core.text import LONGEST, printable

if TYPE_CHECKING:
    from fedferret.core.keys import Key

T = TypeVar("T")

ROLES = ("system", "user", "assistant", "tool")  # "developer" is read as "system"
OWNERS = ("client", "person", "task", "category")  # metadata that names an example's owner, the first that is there


@dataclass(frozen=True, slots=True)
class TurnExtra:
    """What few turns have; most have none, and hold no room for it."""

    tool_calls: tuple[Mapping[str, Any], ...] = ()  # {"id", "type", "function": {"name", "arguments"}}, plain values
    name: str | None = None  # of who speaks, or of the tool that answers
    tool_call_id: str | None = None  # the call that a turn of a tool answers
    trained: bool = True  # False: of weight 0, context for later turns and never a target


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation; ``role`` is one of ``ROLES``."""

    role: str
    content: str
    extra: TurnExtra | None = None

    @property
    def tool_calls(self) -> tuple[Mapping[str, Any], ...]:
        """The calls of tools that this turn makes."""
        return self.extra.tool_calls if self.extra else ()

    @property
    def name(self) -> str | None:
        """Of who speaks, or of the tool that answers."""
        return self.extra.name if self.extra else None

    @property
    def trained(self) -> bool:
        """Whether its tokens may be targets; False for a turn of weight 0."""
        return self.extra.trained if self.extra else True


@dataclass(frozen=True, slots=True)
class Image:
    """One picture; ``shape`` is (channels, height, width).

    Raises:
        UserError: the number of pixels is not the shape's.
    """

    pixels: bytes  # uint8, channels x height x width
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or math.prod(self.shape) != len(self.pixels):
            channels, height, width = self.shape
            raise UserError(
                f"an image of {channels} x {height} x {width} has {len(self.pixels):,} bytes: "
                f"give channels x height x width bytes"
            )


@dataclass(frozen=True, slots=True)
class Example:
    """Turns: the last is the response to train on, the others are the prompt.

    A labelled example has its class's name as the response. A labelled image has that one turn, and ``image`` in place
    of a prompt. A text for language modelling is one turn without either.

    ``metadata`` is for scorers and summaries: ``category``; ``instruction`` and ``input`` where a prompt has
    two parts; ``task`` where there are tasks; ``entry`` from reasoning-gym; ``person`` and ``conversation`` from
    chitchat; ``answer`` from gsm8k; ``client``, ``choices`` and ``tools`` where rows have such columns.
    """

    turns: tuple[Turn, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    image: Image | None = None

    @property
    def response(self) -> str:
        """The text to train on, or the class of a labelled example."""
        return self.turns[-1].content

    @property
    def prompt(self) -> str:
        """All turns but the last, joined by blank lines; empty for an image and for a text alone."""
        return "\n\n".join(turn.content for turn in self.turns[:-1])

    @property
    def owner(self) -> str | None:
        """The client, person, task or category that the metadata names; None where it names none."""
        return next((str(self.metadata[name]) for name in OWNERS if name in self.metadata), None)


@dataclass(frozen=True)
class FederatedData:
    """The examples of each client and of each held-out set; no client holds a held-out example."""

    clients: Mapping[str, Sequence[Example]]  # by client id, sorted
    held_out: Mapping[str, Sequence[Example]]  # by name; the first is the main set
    source: str
    notice: str | None = None  # the licence or benchmark notice that must accompany every copy of the data
    kept: Mapping[str, Sequence[Example]] = field(default_factory=dict)  # held out by each client: data/held_out.py
    notes: tuple[str, ...] = ()  # lines for the user on how the data were read; no part of the fingerprint

    def __post_init__(self) -> None:
        for client in self.clients:
            if printable(client) != client:
                raise UserError(
                    f"client {printable(client, 40)!r}: a name has at most {LONGEST} characters and no control "
                    f"characters; rename the client in the data"
                )

    @property
    def client_held_out(self) -> dict[str, Sequence[Example]]:
        """What each client holds out: ``kept``, or else the examples of the main held-out set that the client owns."""
        if self.kept:
            return dict(sorted(self.kept.items()))
        found: dict[str, list[Example]] = {}
        for example in next(iter(self.held_out.values()), ()):
            if example.owner in self.clients:
                found.setdefault(str(example.owner), []).append(example)
        return {client: tuple(examples) for client, examples in sorted(found.items())}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of texts, images and tools; equal if and only if all clients and held-out sets hold the same."""
        digest = hashlib.sha256()
        for part in (self.clients, self.held_out, *([self.kept] if self.kept else [])):
            digest.update(_hashed(len(part)))
            for name, examples in part.items():
                digest.update(_hashed(name, len(examples)))
                known: dict[int, tuple[Turn, bytes]] = {}  # of the example before: those of a conversation share turns
                for example in examples:
                    if len(example.turns) > 2:
                        known = {id(turn): known.get(id(turn)) or (turn, _hashed_turn(turn)) for turn in example.turns}
                        digest.update(b"".join([known[id(turn)][1] for turn in example.turns]))
                    else:
                        digest.update(b"".join(map(_hashed_turn, example.turns)))
                    metadata = example.metadata
                    paired = "instruction" in metadata or "input" in metadata
                    fields = (metadata.get("instruction", ""), metadata.get("input", ""))
                    digest.update(_hashed(*fields) if paired else _UNPAIRED)
                    if tools := example.metadata.get("tools"):
                        digest.update(_hashed("tools", json.dumps(tools, sort_keys=True)))
                    if example.image is not None:
                        digest.update(_hashed("image", *example.image.shape) + example.image.pixels)
        return digest.hexdigest()


class Source(Protocol):
    """A data source: a frozen dataclass with the source's settings as fields.

    A source that reads files of the user's may have a second method, ``files_read() -> tuple[Path, ...]``: every file
    that ``load`` reads, held-out files too, folders and patterns resolved. A run pins these files (``data/pinned.py``).
    """

    def load(self, key: Key) -> FederatedData:
        """Load and partition the data.

        Args:
            key: draws every random choice: shuffles, subsets, shares.

        Returns:
            The examples of each client, and of each held-out set by name; the first set is the main one.

        Raises:
            UserError: the settings do not fit the data, or the data cannot be read.
        """
        ...


def _hashed_turn(turn: Turn) -> bytes:
    """SHA-256 of a turn."""
    if turn.extra is None:  # the common one, spelt out for speed
        text = f"{len(turn.role)}:{turn.role}{len(turn.content)}:{turn.content}"
        return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return _hashed(turn.role, turn.content, *_words_of(turn.extra))


def _words_of(extra: TurnExtra | None) -> tuple[object, ...]:
    """What of a turn is hashed beside role and content; nothing for most turns."""
    if extra is None:
        return ()
    calls = json.dumps(list(extra.tool_calls), sort_keys=True)
    return calls, extra.name or "", extra.tool_call_id or "", extra.trained


def _hashed(*words: object) -> bytes:
    """SHA-256 of the words, each preceded by its length."""
    text = "".join([f"{len(str(word))}:{word}" for word in words])
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


_UNPAIRED = _hashed("", "")  # of an example without instruction and input


def instruction_example(instruction: str, input_text: str, response: str, metadata: Mapping[str, Any]) -> Example:
    """Make an example of an instruction, an optional input and a response.

    Args:
        instruction: first part of the prompt.
        input_text: second part of the prompt; none where it is blank.
        response: text to train on.
        metadata: of the example; "instruction" and "input" are added where there is an input.

    Returns:
        Two turns, of user and assistant; a blank line separates instruction and input.
    """
    if not input_text.strip():
        return Example((Turn("user", instruction), Turn("assistant", response)), metadata)
    turns = (Turn("user", f"{instruction}\n\n{input_text}"), Turn("assistant", response))
    return Example(turns, {**metadata, "instruction": instruction, "input": input_text})


def at_most(examples: Sequence[T], limit: int | None, key: Key) -> tuple[T, ...]:
    """Limit the number of examples.

    Args:
        examples: a sequence of any elements.
        limit: the largest number to return; None: all.
        key: draws the subset where there are more.

    Returns:
        All examples, or a subset of ``limit``; in the order of ``examples``.
    """
    return tuple(examples if limit is None or len(examples) <= limit else key.sample(examples, limit))


def listed(names: Sequence[str], most: int = 5) -> str:
    """Name things in one line.

    Args:
        names: of any number.
        most: how many to name.

    Returns:
        The first names, printable and in quotation marks, and how many more there are.
    """
    shown = ", ".join(f'"{printable(name, 40)}"' for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def check_fraction(name: str, value: float) -> None:
    """Refuse an impossible share.

    Args:
        name: of the setting, without "data.".
        value: of the setting, a share of the data.

    Raises:
        UserError: ``value`` is outside [0, 1).
    """
    if not 0 <= value < 1:
        raise UserError(f"data.{name} is {value}: give a share of the data, from 0 to below 1")


def check_at_least(name: str, value: int | None, least: int) -> None:
    """Refuse a count that is too low.

    Args:
        name: of the setting, without "data.".
        value: of the setting; None (no limit) is valid.
        least: the smallest valid value.

    Raises:
        UserError: ``value`` is below ``least``.
    """
    if value is not None and value < least:
        raise UserError(f"data.{name} is {value}: give a whole number of at least {least}")
