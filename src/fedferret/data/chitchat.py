"""Real people's conversations: the ``chitchat-dataset`` package (BYU Chit-Chat Challenge). Client = person.

1. Keep the conversations in which two people speak (4,018 of 7,168). Consecutive lines of one person are joined by
   newlines to one message, so speakers alternate.
2. Draw the held-out people among those with enough messages. Training uses no conversation with a held-out person.
3. Draw the held-out conversations among the remaining conversations.
4. A person's examples are the person's messages, each given all earlier messages of the conversation (the person's as
   "assistant", the partner's as "user"). An opening message has no earlier message and is context only.
5. Clients are the people who still have ``min_messages`` examples, or ``num_clients`` of them.

Held-out sets: "conversations" (the clients' messages in the conversations of step 3) and "people" (the messages of the
people of step 2). Training contains no held-out message, as target or as context. The file is read without importing
the package.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from fedferret.core.collection import no_collection
from fedferret.core.errors import UserError
from fedferret.data.examples import Example, FederatedData, Turn, at_most, check_at_least, check_fraction

if TYPE_CHECKING:
    from fedferret.core.keys import Key

T = TypeVar("T")

NOTICE = "chitchat-dataset, (c) 2019 Perception, Control and Cognition Lab, Brigham Young University; MIT licence."


@dataclass(frozen=True)
class _Conversation:
    id: str
    messages: tuple[tuple[str, str], ...]  # (person, text); speakers alternate

    @property
    def people(self) -> set[str]:
        return {person for person, _ in self.messages}

    def examples(self, person: str) -> Iterable[Example]:
        turns = tuple(Turn("assistant" if sender == person else "user", text) for sender, text in self.messages)
        metadata = {"person": person, "conversation": self.id}
        for index, turn in enumerate(turns):
            if index and turn.role == "assistant":
                yield Example(turns[: index + 1], metadata)


@dataclass(frozen=True)
class Chitchat:
    """Settings of the source "chitchat"; the defaults give about 350 people with 100,000 examples."""

    client: Literal["person", "everybody"] = "person"  # everybody: one client, that is, centralised training
    min_messages: int = 30  # people with fewer training examples are left out
    max_messages: int | None = None  # training examples per person, drawn by the key; None: all
    num_clients: int | None = None  # drawn by the key; None: all
    held_out_conversations: float = 0.1  # share of the conversations
    held_out_people: float = 0.05  # share of the people with enough messages
    max_held_out: int | None = 256  # examples per held-out set; None: all

    def __post_init__(self) -> None:
        check_fraction("held_out_conversations", self.held_out_conversations)
        check_fraction("held_out_people", self.held_out_people)
        for name in ("min_messages", "max_messages", "num_clients", "max_held_out"):
            check_at_least(name, getattr(self, name), 1)

    @no_collection()
    def load(self, key: Key) -> FederatedData:
        """Read the conversations and split them; about two seconds.

        Raises:
            UserError: if the package is missing, or fewer people than needed have ``min_messages`` training examples.
        """
        conversations = _read()
        candidates = _people(conversations, self.min_messages)
        unseen_people = set(_draw(candidates, self.held_out_people, key.fold("held-out people")))
        remaining = [each for each in conversations if not each.people & unseen_people]
        unseen = _draw(remaining, self.held_out_conversations, key.fold("held-out conversations"))
        unseen_ids = {each.id for each in unseen}
        training = [each for each in remaining if each.id not in unseen_ids]

        clients = _people(training, self.min_messages)
        if not clients:
            raise UserError(f"data.min_messages is {self.min_messages}: nobody has as many messages; ask for fewer")
        if self.num_clients is not None:
            if self.num_clients > len(clients):
                raise UserError(
                    f"data.num_clients is {self.num_clients} but {len(clients)} people have {self.min_messages} "
                    f"training messages: ask for fewer clients or lower data.min_messages"
                )
            clients = key.fold("clients").sample(clients, self.num_clients)
        held_out = {
            "conversations": _examples(unseen, set(clients)),
            "people": _examples([each for each in conversations if each.people & unseen_people], unseen_people),
        }
        examples_of = {
            person: at_most(examples, self.max_messages, key.fold("messages", person))
            for person, examples in _by_person(training, clients).items()
        }
        return FederatedData(
            clients=examples_of
            if self.client == "person"
            else {"everybody": tuple(chain.from_iterable(examples_of.values()))},
            held_out={
                name: at_most(examples, self.max_held_out, key.fold("examples", name))
                for name, examples in held_out.items()
                if examples
            },
            source="chitchat",
            notice=NOTICE,
        )


def _read() -> list[_Conversation]:
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise UserError('data source "chitchat" needs a package: pip install chitchat-dataset==0.9.0')
    path = Path(spec.submodule_search_locations[0]) / "dataset.json"
    with path.open(encoding="utf-8") as file:
        raw: Mapping[str, Mapping[str, Sequence[Sequence[Mapping[str, str]]]]] = json.load(file)
    conversations = []
    for identity in sorted(raw):
        lines = [line for message in raw[identity]["messages"] for line in message if line["text"].strip()]
        messages = tuple(
            # eight hexadecimal digits distinguish all 1,315 people
            (sender[:8], "\n".join(line["text"].strip() for line in group))
            for sender, group in groupby(lines, key=lambda line: line["sender"])
        )
        if len({person for person, _ in messages}) == 2:
            conversations.append(_Conversation(identity, messages))
    return conversations


def _people(conversations: Sequence[_Conversation], min_messages: int) -> list[str]:
    """People with at least ``min_messages`` examples (messages that do not open a conversation), sorted."""
    counts = Counter(person for each in conversations for person, _ in each.messages[1:])
    return sorted(person for person, count in counts.items() if count >= min_messages)


def _draw(population: Sequence[T], share: float, key: Key) -> list[T]:
    return key.sample(population, round(len(population) * share))


def _by_person(conversations: Sequence[_Conversation], people: Sequence[str]) -> dict[str, list[Example]]:
    """The examples of each person, in the order of ``people``."""
    examples: dict[str, list[Example]] = {person: [] for person in people}
    for each in conversations:
        for person in sorted(each.people & examples.keys()):
            examples[person].extend(each.examples(person))
    return examples


def _examples(conversations: Sequence[_Conversation], people: set[str]) -> list[Example]:
    return [example for examples in _by_person(conversations, sorted(people)).values() for example in examples]
