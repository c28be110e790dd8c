"""The largest of every few: exact sizes, known errors, a mean that stays right, the same bits everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedferret.bases.quantise import Packed, pack_vector
from fedferret.bases.rotation import rotate
from fedferret.bases.sign_buckets import SignBuckets
from fedferret.bases.top_one import GROUPS, TopOneCode, encode_top_one
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from unit.test_quantise import LENGTHS, heavy_tailed, relative_error

KEY = Key.of(4, "pick")
# g/m² - 1, with m the mean of the largest of g half-normal numbers, by numerical integration
EXPECTED_ERROR = {8: 1.5154, 128: 15.0098}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_group_is_a_place_and_a_sign(group: int, length: int) -> None:
    picked = encode_top_one(heavy_tailed(length), group, KEY)
    groups, bits = math.ceil(length / group), {8: 4, 128: 8}[group]
    assert picked.codes.dtype == torch.uint8 and picked.codes.shape == (math.ceil(groups * bits / 8),)
    assert torch.tensor(picked.scale, dtype=torch.float32).item() == picked.scale
    unpacked = picked.unpack()
    assert unpacked.dtype == torch.float32 and unpacked.shape == (length,)


@pytest.mark.parametrize("group", GROUPS)
def test_what_travels_is_the_largest_of_each_group(group: int) -> None:
    vector = heavy_tailed(1025)
    picked = encode_top_one(vector, group, KEY)
    once, again = Key(picked.seed), Key(picked.seed).fold("again")
    rotated, sent = (rotate(rotate(each, once), again) for each in (vector, picked.unpack()))
    for start in range(0, 1025, group):
        exact, rebuilt = rotated[start : start + group], sent[start : start + group]
        place = int(exact.abs().argmax())
        assert int(rebuilt.abs().argmax()) == place and rebuilt[place] * exact[place] > 0
        rest = torch.cat((rebuilt[:place], rebuilt[place + 1 :]))
        assert rest.numel() == 0 or float(rest.abs().max()) < 1e-4 * float(rebuilt[place].abs())


@pytest.mark.parametrize("group", GROUPS)
def test_zeros_and_single_numbers_come_back(group: int) -> None:
    for length in (0, 1, 3, 1000):
        assert torch.equal(encode_top_one(torch.zeros(length), group, KEY).unpack(), torch.zeros(length))
    for value in (1.0, -3.7, 1e-30, -1e30):
        assert encode_top_one(torch.tensor([value]), group, KEY).unpack().item() == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("length", [8192, 10_000])
def test_the_error_is_the_theorys(group: int, length: int) -> None:
    vectors = [heavy_tailed(length, number) for number in range(40)]
    errors = [relative_error(encode_top_one(v, group, KEY.fold(n)).unpack(), v) for n, v in enumerate(vectors)]
    assert sum(errors) / len(errors) == pytest.approx(EXPECTED_ERROR[group], rel=0.04)


@pytest.mark.parametrize(("group", "share"), [(8, 0.801), (128, 0.637)])
def test_the_same_bytes_say_more_than_one_bit_each(group: int, share: float) -> None:
    """A change much longer than what is sent, through as many directions as 64 bytes hold: its whole error energy."""

    def error(count: int, pack: Callable[[Tensor, Key], Packed | TopOneCode]) -> float:
        total = 0.0
        for number in range(40):
            key, change = KEY.fold("bytes", number), torch.ones(1 << 17)
            packed = pack(SignBuckets().project(change, count, key), key)
            assert packed.codes.numel() == 64
            rebuilt = torch.zeros_like(change)
            SignBuckets().expand_(rebuilt, packed.unpack(), key, 1.0)
            total += relative_error(rebuilt, change)
        return total

    one_bit = error(64 * 8, lambda values, key: pack_vector(values, 1, key))
    picked = error(64 * {8: 16, 128: 128}[group], lambda values, key: encode_top_one(values, group, key))
    assert picked / one_bit == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("length", [256, 300])
def test_the_mean_over_keys_is_the_vector(group: int, length: int) -> None:
    repeats = 400
    vector = heavy_tailed(length)
    results = torch.stack(
        [encode_top_one(vector, group, KEY.fold("mean", number)).unpack() for number in range(repeats)]
    )
    single = sum(relative_error(result, vector) for result in results) / repeats
    ratio = relative_error(results.mean(dim=0), vector) * repeats / single
    assert 0.7 < ratio < 1.5


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_part_along_the_vector_is_exact(group: int, length: int) -> None:
    vector = heavy_tailed(length)
    inner = float(encode_top_one(vector, group, KEY).unpack().double() @ vector.double())
    assert inner == pytest.approx(float(vector.double() @ vector.double()), rel=1e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_unpacking_has_the_same_bits_for_every_thread_count(group: int) -> None:
    picked = encode_top_one(heavy_tailed(150_000), group, KEY)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = picked.unpack()
        torch.set_num_threads(3)
        assert torch.equal(picked.unpack(), expected)
    finally:
        torch.set_num_threads(before)


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="picked from 16: allowed are 8, 128"):
        encode_top_one(torch.ones(4), 16, KEY)
    with pytest.raises(UserError, match="NaN or infinity"):
        encode_top_one(torch.tensor([1.0, math.nan]), 8, KEY)
    good = encode_top_one(torch.ones(300), 128, KEY)
    for bad in (replace(good, codes=good.codes[:2]), replace(good, group=64), replace(good, length=-1)):
        with pytest.raises(UserError, match="bytes are not the largest of every"):
            bad.unpack()
    assert isinstance(good, TopOneCode)
