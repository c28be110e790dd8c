"""Packing by the paper's rule, allocations with an exact sum, norms in eight bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedferret.bases.blocks import Block, allocate, decode_norms, encode_norms, pack
from fedferret.core.errors import UserError

RULES = ("norm", "norm-sqrt-dim", "norm-squared", "uniform")


def llama(layers: int, width: int, intermediate: int, vocabulary: int = 32_000) -> dict[str, int]:
    """Number of weights per tensor, in the model's order."""
    sizes = {"embed": vocabulary * width}
    for layer in range(layers):
        sizes |= {f"{layer}.{name}": width * width for name in ("q", "k", "v", "o")}
        sizes |= {f"{layer}.{name}": width * intermediate for name in ("gate", "up", "down")}
        sizes |= {f"{layer}.{name}": width for name in ("input_norm", "post_norm")}
    return sizes | {"norm": width, "head": vocabulary * width}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((24, 2048, 5504), 194), ((26, 3200, 8640), 210), ((32, 4096, 11008), 258), ((40, 5120, 13824), 322)],
)
def test_llama_models_have_the_papers_number_of_blocks(shape: tuple[int, int, int], expected: int) -> None:
    sizes = llama(*shape)
    blocks = pack(sizes)
    assert len(blocks) == expected
    assert [name for block in blocks for name in block.names] == list(sizes)
    assert sum(block.size for block in blocks) == sum(sizes.values())
    assert blocks[-2] == Block((f"{shape[0] - 1}.input_norm", f"{shape[0] - 1}.post_norm", "norm"), (shape[1],) * 3)


def test_packing_fills_to_nine_tenths_of_the_median() -> None:
    names = [block.names for block in pack({"a": 45, "b": 45, "c": 1, "d": 100, "e": 100, "f": 100, "g": 300})]
    assert names == [("a", "b"), ("c",), ("d",), ("e",), ("f",), ("g",)]
    assert pack({}) == ()
    assert pack({"only": 3}) == (Block(("only",), (3,)),)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[float], int]:
    sizes = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
    norm = st.one_of(st.just(0.0), st.floats(1e-12, 1e12), st.sampled_from([1.0, 2.0]))
    norms = draw(st.lists(norm, min_size=len(sizes), max_size=len(sizes)))
    return sizes, norms, draw(st.integers(len(sizes), sum(sizes)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(RULES))
def test_shares_are_exact_bounded_and_proportional(problem: tuple[list[int], list[float], int], rule: str) -> None:
    sizes, norms, total = problem
    counts = allocate(rule, sizes, norms, total)
    assert sum(counts) == total
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    weight = {
        "norm": norms,
        "norm-sqrt-dim": [norm * math.sqrt(size) for norm, size in zip(norms, sizes, strict=True)],
        "norm-squared": [norm**2 for norm in norms],
        "uniform": [1.0] * len(sizes),
    }[rule]
    # blocks away from both bounds get coordinates in proportion, up to one for rounding
    free = [i for i, count in enumerate(counts) if 1 < count < sizes[i] - 1 and weight[i] > 0]
    for first in free:
        for second in free:
            ratio = weight[first] / weight[second]
            assert counts[first] - 1 < ratio * (counts[second] + 1) * (1 + 1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_equal_blocks_with_equal_norms_tie_towards_the_first(rule: str) -> None:
    assert allocate(rule, [9] * 4, [2.0] * 4, 10) == (3, 3, 2, 2)


def test_allocations_of_the_rules() -> None:
    sizes, norms = [100, 400, 100], [1.0, 1.0, 2.0]
    assert allocate("norm", sizes, norms, 80) == (20, 20, 40)
    assert allocate("norm-sqrt-dim", sizes, norms, 100) == (20, 40, 40)
    assert allocate("norm-squared", sizes, norms, 60) == (10, 10, 40)
    assert allocate("uniform", sizes, norms, 90) == (30, 30, 30)


def test_what_exceeds_a_block_goes_to_the_others() -> None:
    assert allocate("norm", [3, 1000, 1000], [50.0, 1.0, 3.0], 103) == (3, 25, 75)
    assert allocate("norm", [5, 7], [1.0, 0.1], 12) == (5, 7)


def test_tiny_blocks_keep_one_coordinate() -> None:
    assert allocate("norm", [10, 1000], [1e-9, 1.0], 101) == (1, 100)


def test_norm_sqrt_dim_has_the_lowest_error_energy() -> None:
    sizes, norms, total = [2048, 100_000, 3_000_000], [0.5, 1.0, 2.0], 5000

    def energy(rule: str) -> float:
        counts = allocate(rule, sizes, norms, total)
        return sum(n**2 * (d / k - 1) for n, d, k in zip(norms, sizes, counts, strict=True))

    assert energy("norm-sqrt-dim") < energy("norm") and energy("norm-sqrt-dim") < energy("uniform")


def test_norm_squared_has_equal_error_energy_in_every_weight() -> None:
    sizes, norms, total = [2048, 100_000, 3_000_000], [0.5, 1.0, 2.0], 5000
    counts = allocate("norm-squared", sizes, norms, total)
    per_weight = [n**2 * (d / k) / d for n, d, k in zip(norms, sizes, counts, strict=True)]
    assert max(per_weight) / min(per_weight) < 1.01


def test_zero_norm_blocks_get_one_coordinate_until_the_others_are_full() -> None:
    assert allocate("norm", [10, 10, 10], [0.0, 1.0, 1.0], 19) == (1, 9, 9)
    assert allocate("norm", [10, 10, 10], [0.0, 1.0, 1.0], 25) == (5, 10, 10)
    assert allocate("norm", [10, 10], [0.0, 0.0], 8) == (4, 4)
    assert allocate("norm-sqrt-dim", [100, 400], [0.0, 0.0], 30) == (10, 20)


@pytest.mark.parametrize("total", [1, 31])
def test_a_total_out_of_range_is_refused(total: int) -> None:
    with pytest.raises(UserError, match="give 2 to 30"):
        allocate("norm", [10, 20], [1.0, 1.0], total)


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_negative_and_infinite_norms_and_nan_are_refused(norm: float) -> None:
    with pytest.raises(UserError, match="norm of block 1"):
        allocate("norm", [10, 20], [1.0, norm], 10)
    with pytest.raises(UserError, match="norm of block 1"):
        encode_norms([1.0, norm])


def test_an_unknown_rule_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match='did you mean "uniform"'):
        allocate("unifrom", [10], [1.0], 1)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.floats(2.0**-40, 2.0**23.5))
def test_the_error_of_norm_codes_is_within_the_bound(norm: float) -> None:
    (decoded,) = decode_norms(encode_norms([norm]))
    assert abs(decoded / norm - 1) <= 2**0.125 - 1 + 1e-12


def test_every_norm_code_is_a_quarter_octave_and_decodes_to_itself() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    norms = decode_norms(codes)
    assert norms[0] == 0 and norms[161] == 1 and norms[165] == 2 and norms[1] == 2.0**-40
    assert norms[1:] == pytest.approx([2 ** ((code - 161) / 4) for code in range(1, 256)], rel=1e-15)
    assert torch.equal(encode_norms(norms), codes)


def test_norms_outside_the_range_get_the_codes_of_its_ends() -> None:
    assert encode_norms([0.0, 1e-30, 5e-324, 1e30]).tolist() == [0, 1, 1, 255]
    assert encode_norms([2.0**-0.124, 2.0**0.124, 2.0**0.126]).tolist() == [161, 161, 162]
