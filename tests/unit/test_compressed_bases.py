"""Sorted positions, the largest values, tensors in few bits: each against a slow reference."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedferret.bases.chunks import BITS, num_bytes, num_scales, pack_tensors
from fedferret.bases.gaps import decode_gaps, encode_gaps, least_gap_bytes
from fedferret.bases.positions import Positions, least_bytes, pack_positions
from fedferret.bases.positions import num_bytes as position_bytes
from fedferret.bases.signs import pack_signs
from fedferret.bases.top_k import top_k
from fedferret.core.errors import UserError
from fedferret.core.keys import Key
from fedferret.wire import codec

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 400).flatmap(lambda length: st.tuples(st.just(length), st.sets(st.integers(0, length - 1)))))
def test_positions_survive_the_wire_in_the_bytes_of_the_formula(given: tuple[int, set[int]]) -> None:
    length, chosen = given
    positions = torch.tensor(sorted(chosen), dtype=torch.int64)
    packed = codec.decode(codec.encode(pack_positions(positions, length)))
    assert torch.equal(packed.unpack(), positions) and packed.unpack().dtype == torch.int64
    assert least_bytes(len(chosen), length) <= packed.codes.numel() <= position_bytes(len(chosen), length)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 2**9) | st.integers(1, 2**39), max_size=60))
def test_gaps_of_any_size_survive_their_code(gaps: list[int]) -> None:
    positions = np.cumsum(np.array(gaps, np.int64)) - 1
    codes = encode_gaps(positions)
    assert np.array_equal(decode_gaps(codes, len(gaps)), positions) and len(codes) >= least_gap_bytes(len(gaps))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 90), st.integers(1, 2**12))
def test_no_bytes_decode_to_positions_that_are_none(codes: bytes, count: int, length: int) -> None:
    packed = Positions(torch.tensor(list(codes), dtype=torch.uint8), count, length)
    try:
        found = packed.unpack()
    except UserError:
        return
    assert len(found) == count and bool((found.diff() > 0).all())
    assert not count or 0 <= int(found[0]) <= int(found[-1]) < length


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 300), min_size=9, max_size=60), st.dictionaries(st.integers(0, 80), st.integers(1, 255)))
def test_a_damaged_code_of_gaps_is_refused_or_decodes_to_positions(chosen: set[int], damage: dict[int, int]) -> None:
    codes = encode_gaps(np.array(sorted(chosen), np.int64))
    for place, change in damage.items():
        codes[place % len(codes)] ^= change
    packed = Positions(torch.from_numpy(codes), len(chosen), 10_000)
    try:
        found = packed.unpack()
    except UserError:
        return
    assert len(found) == len(chosen) and bool((found.diff() > 0).all()) and int(found[0]) >= 0
    assert int(found[-1]) < 10_000


def test_a_coded_position_beyond_the_model_is_refused() -> None:
    packed = pack_positions(torch.cat((torch.arange(90), torch.tensor([9801]))), 9802)
    assert int(packed.unpack()[-1]) == 9801
    with pytest.raises(UserError, match=r"\(a position is too large\)"):
        replace(packed, length=9801).unpack()


def test_the_code_of_gaps_is_pinned_to_the_byte() -> None:
    """Nodes of two versions read each other."""
    gaps = [1, 1, 2, 300, 1, 1, 1, 5000, 1, 3] * 3
    assert bytes(encode_gaps(np.cumsum(gaps) - 1)).hex() == "01698f04da8dd42c65579358102716c489057102"


def test_a_code_of_gaps_that_lost_or_gained_a_byte_is_refused() -> None:
    positions = torch.arange(100).square()
    packed = pack_positions(positions, 10**6)
    assert packed.codes.numel() < position_bytes(100, 10**6)
    for codes in (packed.codes[:-1], packed.codes[1:], torch.cat([packed.codes, packed.codes[:1]])):
        with pytest.raises(UserError, match=r"are not 100 positions of 1,000,000 \((the code|no gap|a position)"):
            replace(packed, codes=codes).unpack()


def test_clusters_cost_less_than_the_same_number_spread_out() -> None:
    """A thousand among 10^8: sixty runs of neighbours take a quarter of the bound, uniform ones at most the bound."""
    spread = torch.from_numpy(np.unique((Key.of(4).uniform(1000) * 1e8).long().numpy()))
    runs = (torch.arange(60)[:, None] * 1_600_000 + torch.arange(17)).view(-1)[:1000]
    most = position_bytes(1000, 10**8)
    assert len(pack_positions(runs, 10**8).codes) < most / 4
    assert len(pack_positions(spread, 10**8).codes) > 0.9 * position_bytes(len(spread), 10**8)


@given(st.lists(FLOATS, max_size=40))
@settings(max_examples=100, deadline=None)
def test_signs_have_the_magnitude_of_least_error(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    packed = codec.decode(codec.encode(pack_signs(tensor)))
    assert packed.codes.numel() == -(-len(values) // 8)
    back = packed.unpack().double()
    assert torch.equal(back.abs(), torch.full_like(back, packed.scale))
    if not values:
        return
    signs, exact = torch.where(tensor > 0, 1.0, -1.0).double(), tensor.double()
    assert bool((signs * back >= 0).all())
    error = (exact - back).square().sum()
    for other in (packed.scale * 0.999, packed.scale * 1.001):
        assert error <= (exact - signs * other).square().sum() * (1 + 1e-9)


def test_signs_that_contradict_themselves_are_refused() -> None:
    packed = pack_signs(torch.tensor([1.0, -3.0, 2.0]))
    assert packed.unpack().tolist() == [2.0, -2.0, 2.0]
    for wrong in ({"length": 9}, {"length": -1}, {"scale": -1.0}, {"scale": math.nan}, {"scale": math.inf}):
        with pytest.raises(UserError, match=r"signs and a scale"):
            replace(packed, **wrong).unpack()


@pytest.mark.parametrize(
    ("count", "length"), [(1, 2**31), (3, 2**40), (1_345_150, 134_515_008), (1000, 8000), (9, 10), (1, 2), (5, 4096)]
)
def test_positions_cost_no_more_than_the_bound_of_the_code(count: int, length: int) -> None:
    """At most 2 + log2(d/k) bits each, never more than a bitmap, never less than the logarithm of the choices."""
    choices = math.lgamma(length + 1) - math.lgamma(count + 1) - math.lgamma(length - count + 1)
    found = 8 * position_bytes(count, length)
    assert choices / math.log(2) - 1 <= found <= count * (2 + math.log2(length / count)) + 16
    assert found <= length + 7


def test_the_cost_of_positions_grows_with_their_count_and_all_positions_are_free() -> None:
    costs = [position_bytes(count, 1000) for count in range(1000)]
    assert costs == sorted(costs) and costs[0] == position_bytes(1000, 1000) == 0


@pytest.mark.parametrize("count", [3, 30])  # the code and the bitmap
def test_damaged_positions_are_refused_or_decode_to_valid_positions(count: int) -> None:
    """Any decoded positions ascend and are below d."""
    places = torch.arange(0, 2 * count, 2)
    places[count // 2 :] += torch.tensor([0, 1, 3] * 10)[: count - count // 2].sort().values  # no gaps worth coding
    packed = pack_positions(places, 64)
    assert packed.codes.numel() == (8 if count == 30 else 3)
    refused = 0
    for bit in range(8 * packed.codes.numel()):
        codes = packed.codes.clone()
        codes[bit // 8] ^= 1 << bit % 8
        try:
            found = replace(packed, codes=codes).unpack()
            assert len(found) == count and bool((found.diff() > 0).all()) and 0 <= int(found[0]) <= int(found[-1]) < 64
        except UserError:
            refused += 1
    assert refused >= 8
    for wrong in ({"count": count + 1}, {"length": 640}, {"count": -1}, {"count": 65}, {"codes": packed.codes[:-1]}):
        with pytest.raises(UserError, match=r"are not .* positions of"):
            replace(packed, **wrong).unpack()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(FLOATS | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45]), max_size=9), min_size=1), st.data())
def test_top_k_is_the_head_of_a_stable_sort(rows: list[list[float]], data: st.DataObject) -> None:
    tensors = [torch.tensor(row, dtype=torch.float32) for row in rows]
    whole = torch.cat(tensors)
    count = data.draw(st.integers(0, len(whole)))
    if not count:
        return
    positions, values = top_k(lambda: iter(tensors), count)
    expected = torch.sort(whole.abs(), descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(positions, expected) and torch.equal(values, whole[expected])


def tensors_of(*sizes: int) -> list[Tensor]:
    """Heavy-tailed values: fifth powers of uniforms."""
    return [2 * Key.of(5, number).uniform(size).float().sub_(0.5).pow_(5) for number, size in enumerate(sizes)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sizes", [(), (0,), (1, 0, 7), (1024, 1025), (65_536, 3), (65_537, 70_000)])
def test_chunked_tensors_survive_the_wire_in_the_bytes_of_the_formula(sizes: tuple[int, ...], bits: int) -> None:
    tensors = tensors_of(*sizes)
    packed = pack_tensors(tensors, bits, Key.of(1))
    back = codec.decode(codec.encode(packed)).unpack()
    assert packed.codes.numel() == num_bytes(sizes, bits) and packed.scales.numel() == num_scales(sizes, bits)
    assert [len(tensor) for tensor in back] == list(sizes)
    assert all(torch.equal(left, right) for left, right in zip(back, packed.unpack(), strict=True))
    most = {8: 0.1, 4: 0.2, 2: 0.6, 1: 1.2}[bits]
    for tensor, found in zip(tensors, back, strict=True):
        if len(tensor) > 1000:
            assert float((found - tensor).norm() / tensor.norm()) < most


def test_chunks_at_8_bits_have_separate_scales_and_separate_noise() -> None:
    """A very large value coarsens the 1,024 values of its chunk and no others; equal chunks round differently."""
    values = Key.of(2).uniform(1024).float().repeat(3)
    values[0] = 1e6
    (back,) = pack_tensors([values], 8, Key.of(1)).unpack()
    first, second, third = (back - values).split(1024)
    assert float(first.abs().max()) > 0.3
    assert float(second.abs().max()) < 1.001 / 127 and not torch.equal(second, third)
    other = pack_tensors([values], 8, Key.of(2)).unpack()[0]
    assert not torch.equal(other, back)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e30, -1e30])
@pytest.mark.parametrize("bits", BITS)
def test_constant_tensors_keep_their_value(value: float, bits: int) -> None:
    (back,) = pack_tensors([torch.full((2048,), value)], bits, Key.of(1)).unpack()
    if bits == 8 or not value:
        torch.testing.assert_close(back, torch.full((2048,), value), rtol=1e-2, atol=2e-45)
    assert bool(back.isfinite().all())


def test_chunked_fields_that_contradict_each_other_are_refused() -> None:
    packed = pack_tensors(tensors_of(2000), 8, Key.of(1))
    for wrong in (
        {"sizes": (2001,)},
        {"bits": 4},
        {"bits": 7},
        {"scales": packed.scales[:1]},
        {"scales": packed.scales.double()},
        {"codes": packed.codes[1:]},
    ):
        with pytest.raises(UserError, match=r"are not .* values in \d bits"):
            replace(packed, **wrong).unpack()
