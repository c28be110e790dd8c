"""Chitchat: training contains no held-out message, as target or as context."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.data.chitchat import Chitchat

pytest.importorskip("chitchat_dataset")

SETTINGS = Chitchat(min_messages=40, max_held_out=None)


@pytest.fixture(scope="module")
def data():
    return SETTINGS.load(Key.of(1))


def _conversations(examples):
    return {example.metadata["conversation"] for example in examples}


def _trained(data):
    return [example for examples in data.clients.values() for example in examples]


def test_held_out_conversations_and_people_are_in_no_training_prompt(data):
    trained = _conversations(_trained(data))
    people = {example.metadata["person"] for example in data.held_out["people"]}
    assert not trained & _conversations(data.held_out["conversations"])
    assert not trained & _conversations(data.held_out["people"])
    assert people and not people & set(data.clients)
    # as context too: the longest texts of held-out conversations are not in training
    seen = {turn.content for example in _trained(data) for turn in example.turns}
    for name in ("conversations", "people"):
        long = {turn.content for each in data.held_out[name] for turn in each.turns if len(turn.content) > 120}
        assert len(long) > 100 and len(long & seen) < 0.01 * len(long)  # pasted texts occur twice


def test_clients_are_people_with_enough_messages(data):
    assert list(data.clients) == sorted(data.clients)
    assert 150 < len(data.clients) < 400
    assert min(map(len, data.clients.values())) >= 40
    for person, examples in data.clients.items():
        assert {example.metadata["person"] for example in examples} == {person}


def test_the_main_held_out_set_is_about_clients(data):
    assert list(data.held_out) == ["conversations", "people"]
    assert {example.metadata["person"] for example in data.held_out["conversations"]} <= set(data.clients)


def test_speakers_alternate_and_the_last_message_is_the_persons(data):
    for example in _trained(data)[::50]:
        roles = [turn.role for turn in example.turns]
        assert len(roles) >= 2 and roles[-1] == "assistant"
        assert all(first != second for first, second in pairwise(roles))
        assert all(turn.content.strip() for turn in example.turns)


def test_a_conversation_gives_examples_to_both_speakers(data):
    by_conversation = {}
    for person, examples in data.clients.items():
        for example in examples:
            by_conversation.setdefault(example.metadata["conversation"], {})[person] = example
    first, second = next(tuple(pair.values()) for pair in by_conversation.values() if len(pair) == 2)
    length = min(len(first.turns), len(second.turns))
    assert [turn.content for turn in first.turns[:length]] == [turn.content for turn in second.turns[:length]]
    assert all(a.role != b.role for a, b in zip(first.turns[:length], second.turns[:length], strict=True))


def test_limits_are_drawn_by_the_key(data):
    few = Chitchat(min_messages=40, num_clients=5, max_messages=20, max_held_out=30)
    first, second, other = few.load(Key.of(1)), few.load(Key.of(1)), few.load(Key.of(2))
    assert first == second and first.clients.keys() != other.clients.keys()
    assert [len(examples) for examples in first.clients.values()] == [20] * 5
    assert max(map(len, first.held_out.values())) <= 30
    assert first.clients.keys() <= data.clients.keys()  # num_clients does not change who is held out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clients": 5000}, "5000"),
        ({"min_messages": 100_000}, "nobody has as many messages"),
    ],
)
def test_more_clients_or_messages_than_there_are_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Chitchat(**settings).load(Key.of(1))


@pytest.mark.parametrize("settings", [{"held_out_people": 1.5}, {"held_out_conversations": -0.1}, {"min_messages": 0}])
def test_impossible_settings_are_refused_at_once(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Chitchat(**settings)


def test_everybody_is_one_client_with_all_examples_and_the_same_held_out_sets(data):
    together = dataclasses.replace(SETTINGS, client="everybody").load(Key.of(1))
    assert list(together.clients) == ["everybody"]
    assert list(together.clients["everybody"]) == _trained(data)
    assert together.held_out == data.held_out
