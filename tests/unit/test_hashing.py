"""Shared randomness: its definition in Python integers, and statistical tests of randomness."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fedferret.bases.hashing import TILE, column_states, flip_signs, mix_, position_states, sign_masks, signed, uniforms
from fedferret.core.keys import Key

KEY = Key.of(11, "round", 3)
WORD = 2**32
PINNED_MIXES = [0, 2261973619, 2578835075]


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD % WORD
    x ^= x >> 15
    x = x * 0x735A2D97 % WORD
    return x ^ x >> 15


def sign(key: Key, position: int) -> int:
    low, high = key.words
    lane, bit, tile = position % 256, position // 256 % 32, position // 8192
    word = mix(mix((256 * tile + lane) % WORD ^ low) ^ high)
    return -1 if word >> bit & 1 else 1


def uniform(key: Key, position: int, column: int) -> float:
    low, high = key.words
    top = mix(mix(position ^ low) ^ mix(column ^ high)) >> 8
    return (2 * (top - 2**24 if top >= 2**23 else top) + 1) / 2**24


def signs(key: Key, start: int, stop: int) -> torch.Tensor:
    return flip_signs(torch.ones(stop - start), key, start)


@pytest.mark.parametrize("start", [0, 1, 8191, 8192, 2**31 - 5, 2**32 - 3, 2**36 + 12345])
def test_signs_follow_the_definition(start: int) -> None:
    positions = [start + step for step in (0, 1, 2, 255, 256, 257, 8192, 9000)]
    values = signs(KEY, start, start + 9001)
    assert [int(values[position - start]) for position in positions] == [sign(KEY, p) for p in positions]


@pytest.mark.parametrize("start", [0, 17, 2**31 - 5, 2**32 - 40])
def test_uniforms_follow_the_definition(start: int) -> None:
    values = uniforms(column_states(KEY, 60, 63), position_states(KEY, start, start + 40))
    expected = [[uniform(KEY, start + p, k) for p in range(40)] for k in (60, 61, 62)]
    assert values.tolist() == expected


def test_the_definition_is_pinned() -> None:
    key = Key(0x0123456789ABCDEF)
    assert "".join("-" if sign(key, p) < 0 else "+" for p in range(32)) == "++--+--+-++-------++-++--+-++-+-"
    assert [mix(word) for word in (0, 1, WORD - 1)] == PINNED_MIXES
    assert mix_(torch.tensor([0, 1, -1], dtype=torch.int32)).tolist() == [signed(word) for word in PINNED_MIXES]


@pytest.mark.parametrize("cut", [1, 31, 255, 256, 5000, TILE, TILE + 1, 3 * TILE - 1])
def test_signs_do_not_depend_on_the_chunk(cut: int) -> None:
    whole = sign_masks(KEY, 100, 100 + 3 * TILE)
    assert torch.equal(whole, torch.cat((sign_masks(KEY, 100, 100 + cut), sign_masks(KEY, 100 + cut, 100 + 3 * TILE))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_signs_do_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    assert torch.equal(flip_signs(torch.ones(10_000, dtype=dtype), KEY, 5), signs(KEY, 5, 10_005))


def test_signs_do_not_depend_on_the_thread_count() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(sign_masks(KEY, 3, 400_000))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_signs_and_uniforms_are_balanced() -> None:
    count = 1 << 20
    assert abs(signs(KEY, 0, count).mean()) < 4 / math.sqrt(count)
    # every bit of a word and every lane separately
    tiles = signs(KEY, 0, count).view(-1, 32, 256)
    for dims, each in (((0, 2), count / 32), ((0, 1), count / 256)):
        scores = tiles.mean(dim=dims) * math.sqrt(each)
        assert scores.abs().max() < 4.5
        assert 0.5 < scores.square().mean() < 1.7  # two-sided: too little variation is as wrong as too much
    values = uniforms(column_states(KEY, 0, 16), position_states(KEY, 0, 1 << 16)).double().view(-1)
    assert abs(values.mean()) < 4 * math.sqrt(1 / 3 / count)
    assert abs(values.square().mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / count)
    histogram = torch.histc(values.float(), bins=256, min=-1, max=1)
    chi_square = ((histogram - count / 256).square() / (count / 256)).sum()
    assert 255 - 4 * math.sqrt(510) < chi_square < 255 + 4 * math.sqrt(510)


def correlations(rows: torch.Tensor) -> torch.Tensor:
    """Scores of every pair of rows of zero mean and unit variance: standard normal for independent rows."""
    products = rows @ rows.T / math.sqrt(rows.shape[1])
    above = torch.triu_indices(len(rows), len(rows), 1)
    return products[above[0], above[1]]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(lambda: signs(KEY, 0, 64 * 8192).view(64, 8192), id="tiles"),
        pytest.param(lambda: signs(KEY, 0, 64 * 8192).view(64, 32, 256).transpose(0, 1).reshape(32, -1), id="bits"),
        pytest.param(lambda: signs(KEY, 0, 32 * 8192).view(-1, 256).T.contiguous(), id="lanes"),
        pytest.param(lambda: signs(KEY, 0, 64 * 8000).view(-1, 64).T.contiguous(), id="buckets"),
        pytest.param(lambda: torch.stack([signs(Key.of(seed), 0, 8192) for seed in range(64)]), id="seeds"),
        pytest.param(lambda: torch.stack([signs(KEY.fold("block", b), 0, 8192) for b in range(64)]), id="blocks"),
        pytest.param(
            lambda: torch.stack([signs(Key(KEY.value ^ n << 32), 0, 8192) for n in range(64)]), id="next-high-word"
        ),
        pytest.param(
            lambda: uniforms(column_states(KEY, 0, 64), position_states(KEY, 0, 8192)) * math.sqrt(3), id="columns"
        ),
        pytest.param(
            lambda: uniforms(column_states(KEY, 0, 8192), position_states(KEY, 0, 64)).T * math.sqrt(3), id="positions"
        ),
    ],
)
def test_rows_are_uncorrelated(rows: Callable[[], torch.Tensor]) -> None:
    scores = correlations(rows())
    assert scores.abs().max() < 5
    assert 0.85 < scores.square().mean() < 1.15


def test_no_tile_is_a_shifted_copy_of_another() -> None:
    tiles = signs(KEY, 0, 16 * 8192).view(16, 8192)
    spectra = torch.fft.rfft(tiles.double())
    for first in range(16):
        cross = torch.fft.irfft(spectra[first].conj() * spectra, n=8192) / math.sqrt(8192)
        cross[first, 0] = 0  # a tile is a copy of itself
        assert cross.abs().max() < 6
