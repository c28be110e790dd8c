"""Laws of batches: every example once per epoch, labels exactly on the response, little padding, order by key."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedferret.core.keys import Key
from fedferret.data.batches import IGNORED, TokenisedData
from fedferret.data.templates import Tokens

# Distinct prompt and response tokens, with id 0 (the padding's id) among both.
examples = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=30)
    ),
    max_size=40,
).map(lambda pairs: [Tokens((*prompt, *response), len(prompt), False) for prompt, response in pairs])
keys = st.none() | st.integers(0, 2**64 - 1).map(Key)


def _rows(batches):
    """Every example of the batches as (ids, labels without padding)."""
    for batch in batches:
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert labels[length:].tolist() == [IGNORED] * (len(mask) - length)
            yield tuple(ids[:length].tolist()), tuple(labels[:length].tolist())


@settings(deadline=None, max_examples=50)
@given(examples, st.integers(1, 7), keys)
def test_every_example_once_with_labels_exactly_on_the_response(tokens, size, key):
    expected = Counter(
        (each.ids, (IGNORED,) * each.response_start + each.ids[each.response_start :]) for each in tokens
    )
    batches = list(TokenisedData(tokens).batches(size, key))
    assert Counter(_rows(batches)) == expected
    assert all(1 <= len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(tokens) // size)


@settings(deadline=None, max_examples=50)
@given(examples, st.integers(1, 7), keys)
def test_no_batch_is_wider_than_its_longest_example(tokens, size, key):
    for batch in TokenisedData(tokens).batches(size, key):
        assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape
        assert batch.input_ids.shape[1] == int(batch.attention_mask.sum(1).max())


def _conversation_lengths(count: int, key: Key, max_tokens: int = 256) -> list[Tokens]:
    """Lengths like those of conversations: prompts grow by message up to a limit, responses vary widely."""
    lengths = [
        (min(10 + int(first * 900), max_tokens - 80), 2 + int(60 * second**3))
        for first, second in key.uniform(2 * count).view(count, 2).tolist()
    ]
    return [Tokens((1,) * (prompt + response), prompt, False) for prompt, response in lengths]


def test_little_is_padding():
    for seed in range(5):
        data = TokenisedData(_conversation_lengths(500, Key.of(seed)))
        cells = sum(batch.input_ids.numel() for batch in data.batches(4, Key.of(seed, "epoch")))
        assert cells >= data.num_tokens
        assert (cells - data.num_tokens) / cells < 0.10


def test_the_same_key_gives_the_same_epoch_and_another_key_another():
    data = TokenisedData([Tokens((index, index), 1, False) for index in range(100)])

    def order(key):
        return [batch.input_ids[:, 0].tolist() for batch in data.batches(4, key)]

    assert order(Key.of(1)) == order(Key.of(1))
    assert order(Key.of(1)) != order(Key.of(2))
    groups = {frozenset(rows) for rows in order(Key.of(1))} & {frozenset(rows) for rows in order(Key.of(2))}
    assert not groups  # the key draws the examples of a batch, not the order of batches only


def test_evaluation_goes_longest_first():
    data = TokenisedData([Tokens((0,) * length, 1, False) for length in (3, 9, 5, 2, 9)])
    assert [batch.attention_mask.sum(1).tolist() for batch in data.batches(2, None)] == [[9, 9], [5, 3], [2]]


def test_no_global_generator_is_used():
    state = torch.get_rng_state()
    list(TokenisedData(_conversation_lengths(50, Key.of(1))).batches(4, Key.of(2)))
    assert torch.equal(state, torch.get_rng_state())


def test_counts():
    data = TokenisedData([Tokens((1, 2, 3, 4), 1, False), Tokens((5, 6), 1, True)])
    assert (len(data), data.num_tokens, data.num_response_tokens, data.num_cut) == (2, 6, 4, 1)
    assert data.lengths == [4, 2]
    assert len(TokenisedData([])) == 0 and not list(TokenisedData([]).batches(4, Key.of(1)))


def test_training_on_prompts_labels_all_but_the_first_token():
    tokens = [Tokens((5, 6, 7, 8), 3, False), Tokens((1, 2), 1, False)]
    for packed in (False, True):
        data = TokenisedData(tokens, packed, train_on_prompts=True)
        labels = torch.cat([batch.labels.flatten() for batch in data.batches(4, Key(1))]).tolist()
        assert sorted(label for label in labels if label != IGNORED) == [2, 6, 7, 8]
        assert data.num_response_tokens == 4
