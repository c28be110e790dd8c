"""Keys: pure functions of words, the same on every machine, and no global generator in sight."""

from __future__ import annotations

import torch

from fedferret.core.keys import Key


def test_a_key_is_a_function_of_its_words_alone() -> None:
    assert Key.of(1, "local", 2, "ann") == Key.of(1).fold("local").fold(2).fold("ann")
    assert Key.of(1, "local", 2, "ann").value == 4174310339472283592  # on every machine, for ever


def test_neighbouring_words_make_unrelated_keys() -> None:
    words = [(1,), (2,), (1, 2), (2, 1), (12,), ("1",), (1, "2"), ("1", 2), ("12",), (1, ""), ("", 1), (-1,)]
    assert len({Key.of(0, *each).value for each in words}) == len(words)
    distances = [(Key.of(seed).value ^ Key.of(seed + 1).value).bit_count() for seed in range(200)]
    assert 30 < sum(distances) / len(distances) < 34


def test_a_shorter_stream_is_the_beginning_of_a_longer_one() -> None:
    key = Key.of(3, "stream")
    assert torch.equal(key.bits(10), key.bits(1000)[:10])
    assert torch.equal(key.uniform(10), key.uniform(1000)[:10])


def test_bits_are_fair_and_independent() -> None:
    bits = torch.stack([Key.of(seed).bits(2000) for seed in range(8)])
    ones = torch.stack([(bits >> place & 1).double().mean() for place in range(64)])
    assert (ones - 0.5).abs().max() < 0.02
    uniform = Key.of(9).uniform(20_000)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.002
    neighbours = torch.corrcoef(torch.stack([Key.of(1).uniform(20_000), Key.of(2).uniform(20_000)]))
    assert neighbours[0, 1].abs() < 0.03


def test_permutations_and_samples_are_what_they_say() -> None:
    key = Key.of(5)
    assert sorted(key.permutation(50)) == list(range(50)) != key.permutation(50)
    people = [f"p{number:02}" for number in range(30)]
    chosen = key.sample(people, 7)
    assert len(set(chosen)) == 7 and chosen == sorted(chosen)
    assert key.sample(people, 40) == people
    counts = [0] * 10
    for seed in range(500):
        for index in Key.of(seed).sample(range(10), 3):
            counts[index] += 1
    assert min(counts) > 110 and max(counts) < 190  # 150 each


def test_no_global_generator_is_read_or_moved() -> None:
    before = torch.get_rng_state()
    first = Key.of(1).bits(5)
    with torch.random.fork_rng(devices=[]):
        torch.rand(3)
        assert torch.equal(Key.of(1).bits(5), first)
    assert torch.equal(torch.get_rng_state(), before)
