"""Top-1 codes: exact sizes, known errors, no bias, the same bits for every thread count."""

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
from fedferret.bases.top_one import GROUP_SIZES, TopOneCode, encode_top_one
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from unit.test_quantise import LENGTHS, heavy_tailed, relative_error

KEY = Key.of(4, "pick")
# g/m² - 1, with m the mean of the maximum of g half-normal values, by numerical integration
EXPECTED_ERROR = {8: 1.5154, 128: 15.0098, 2048: 154.757, 32768: 1778.53}
BITS = {8: 4, 128: 8, 2048: 12, 32768: 16}


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_code_of_a_group_is_an_index_and_a_sign(group_size: int, length: int) -> None:
    packed = encode_top_one(heavy_tailed(length), group_size, KEY)
    groups, bits = math.ceil(length / group_size), BITS[group_size]
    assert packed.codes.dtype == torch.uint8 and packed.codes.shape == (math.ceil(groups * bits / 8),)
    assert torch.tensor(packed.scale, dtype=torch.float32).item() == packed.scale
    unpacked = packed.unpack()
    assert unpacked.dtype == torch.float32 and unpacked.shape == (length,)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_code_keeps_the_maximum_of_each_group(group_size: int) -> None:
    length = max(1025, 2 * group_size + 1)
    vector = heavy_tailed(length)
    packed = encode_top_one(vector, group_size, KEY)
    once, again = Key(packed.seed), Key(packed.seed).fold("again")
    rotated, decoded = (rotate(rotate(each, once), again) for each in (vector, packed.unpack()))
    for start in range(0, length, group_size):
        exact, unpacked = rotated[start : start + group_size], decoded[start : start + group_size]
        index = int(exact.abs().argmax())
        assert int(unpacked.abs().argmax()) == index and unpacked[index] * exact[index] > 0
        rest = torch.cat((unpacked[:index], unpacked[index + 1 :]))
        assert rest.numel() == 0 or float(rest.abs().max()) < 1e-4 * float(unpacked[index].abs())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_zeros_and_single_values_come_back(group_size: int) -> None:
    for length in (0, 1, 3, 1000):
        assert torch.equal(encode_top_one(torch.zeros(length), group_size, KEY).unpack(), torch.zeros(length))
    for value in (1.0, -3.7, 1e-30, -1e30):
        assert encode_top_one(torch.tensor([value]), group_size, KEY).unpack().item() == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("length", [8192, 10_000])
def test_the_error_is_that_of_theory(group_size: int, length: int) -> None:
    length *= max(1, group_size // 128)  # at least 64 groups
    vectors = [heavy_tailed(length, number) for number in range(40 if group_size <= 128 else 2)]
    errors = [relative_error(encode_top_one(v, group_size, KEY.fold(n)).unpack(), v) for n, v in enumerate(vectors)]
    assert sum(errors) / len(errors) == pytest.approx(EXPECTED_ERROR[group_size], rel=0.04)


@pytest.mark.parametrize(("group_size", "share"), [(8, 0.801), (128, 0.637), (2048, 0.581)])
def test_equal_bytes_give_less_error_than_one_bit_per_coordinate(group_size: int, share: float) -> None:
    """The total error energy of an update with far more weights than coordinates, at 64 bytes of codes or 63."""

    bits, weights = BITS[group_size], 1 << 17 if group_size <= 128 else 1 << 20

    def error(count: int, pack: Callable[[Tensor, Key], Packed | TopOneCode]) -> float:
        total = 0.0
        for number in range(40):
            key, update = KEY.fold("bytes", number), torch.ones(weights)
            packed = pack(SignBuckets().project(update, count, key), key)
            assert packed.codes.numel() in (63, 64)
            reconstructed = torch.zeros_like(update)
            SignBuckets().expand_(reconstructed, packed.unpack(), key, 1.0)
            total += relative_error(reconstructed, update)
        return total

    one_bit = error(64 * 8, lambda values, key: pack_vector(values, 1, key))
    top_one = error(64 * 8 // bits * group_size, lambda values, key: encode_top_one(values, group_size, key))
    assert top_one / one_bit == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("length", [256, 300])
def test_the_mean_over_keys_is_the_vector(group_size: int, length: int) -> None:
    repeats = 100
    vector = heavy_tailed(length)
    results = torch.stack(
        [encode_top_one(vector, group_size, KEY.fold("mean", number)).unpack() for number in range(repeats)]
    )
    single = sum(relative_error(result, vector) for result in results) / repeats
    ratio = relative_error(results.mean(dim=0), vector) * repeats / single
    assert 0.7 < ratio < 1.5


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_component_along_the_vector_is_exact(group_size: int, length: int) -> None:
    vector = heavy_tailed(length)
    inner = float(encode_top_one(vector, group_size, KEY).unpack().double() @ vector.double())
    assert inner == pytest.approx(float(vector.double() @ vector.double()), rel=2**-8)  # the scale's eight bits


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_unpacking_has_the_same_bits_for_every_thread_count(group_size: int) -> None:
    packed = encode_top_one(heavy_tailed(150_000), group_size, KEY)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = packed.unpack()
        torch.set_num_threads(3)
        assert torch.equal(packed.unpack(), expected)
    finally:
        torch.set_num_threads(before)


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="group_size cannot be 16: allowed are 8, 128, 2048, 32768"):
        encode_top_one(torch.ones(4), 16, KEY)
    with pytest.raises(UserError, match="NaN or infinity"):
        encode_top_one(torch.tensor([1.0, math.nan]), 8, KEY)
    good = encode_top_one(torch.ones(300), 128, KEY)
    for bad in (replace(good, codes=good.codes[:2]), replace(good, group=64), replace(good, length=-1)):
        with pytest.raises(UserError, match="bytes are not the top-1 of"):
            bad.unpack()
    assert isinstance(good, TopOneCode)
