"""Gaussian directions: their definition in Python integers, the same bits for every split, their distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedferret.bases import native
from fedferret.bases.gaussian import COEFFICIENTS, add_directions_, add_gaussian_, add_gaussians_
from fedferret.core.keys import Key

KEY = Key.of(5, "directions")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WORD = 2**32
PINNED = "f6a020bf5765d4bfcfc7783f6a214dbe"


@pytest.fixture(params=["compiled", "fallback"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernels and the PyTorch fallback."""
    if request.param == "fallback":
        monkeypatch.setenv("FEDFERRET_NATIVE", "0")
    elif native.kernels(torch.device("cpu")) is None:
        pytest.skip("no C compiler, or FEDFERRET_NATIVE=0: only the PyTorch fallback can run")
    return str(request.param)


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD % WORD
    x ^= x >> 15
    x = x * 0x735A2D97 % WORD
    return x ^ x >> 15


def polynomial(u: np.ndarray) -> np.ndarray:
    """Horner's rule, each product and sum rounded to fp32."""
    values, square = np.full_like(u, COEFFICIENTS[-1]), u * u
    for coefficient in reversed(COEFFICIENTS[:-1]):
        values = values * square + np.float32(coefficient)
    return np.asarray(values * u)


def element(key: Key, position: int, column: int) -> float:
    low, high = key.fold("gaussian", position // WORD).words
    word = mix(mix(position % WORD ^ low) ^ mix(column ^ high))
    return float(polynomial(np.float32([(word % 2**16 - word // 2**16) / 2**16]))[0])


def direction(column: int, count: int, offset: int = 0, key: Key = KEY) -> Tensor:
    return add_gaussian_(torch.zeros(count), key, column, 1.0, offset)


@pytest.mark.parametrize("offset", [0, 1, 65_533, 2**31 - 5, 2**32 - 40, 2**32 - 10, 2**32, 5 * 2**32 - 3])
@pytest.mark.parametrize("column", [0, 4095, 2**31, 2**32 - 1])
def test_elements_follow_the_definition(path: str, offset: int, column: int) -> None:
    expected = [element(KEY, offset + position, column) for position in range(40)]
    assert direction(column, 40, offset).tolist() == expected


def test_the_definition_is_pinned(path: str) -> None:
    values = direction(3, 4, 2**32 - 2, Key(0x0123456789ABCDEF))
    assert values.numpy().tobytes().hex() == PINNED


def test_the_product_is_rounded_and_then_the_sum(path: str) -> None:
    target, factor = torch.linspace(-1, 1, 100_003), 0.1
    expected = target.numpy() + direction(7, 100_003).numpy() * np.float32(factor)
    assert torch.equal(add_gaussian_(target, KEY, 7, factor), torch.from_numpy(expected))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    before=st.integers(0, 70_000),
    length=st.integers(1, 140_000),
    after=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    columns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
)
def test_a_piece_has_the_bits_of_the_whole_compiled_and_in_the_fallback(
    before: int, length: int, after: int, dtype: torch.dtype, threads: int, columns: list[int]
) -> None:
    whole = torch.linspace(-2, 3, before + length + after).to(dtype)
    piece, fallback = whole[before : before + length].clone(), whole[before : before + length].clone()
    factors = torch.linspace(0.3, -0.2, len(columns))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        add_gaussians_(piece, KEY, columns, factors, before)
    finally:
        torch.set_num_threads(threads_before)
    add_gaussians_(whole, KEY, columns, factors)
    assert torch.equal(piece, whole[before : before + length])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFERRET_NATIVE", "0")
        assert torch.equal(add_gaussians_(fallback, KEY, columns, factors, before), piece)


@pytest.mark.parametrize("size", [1, 2, 63, 4095, 4097, 300_001])
def test_many_directions_at_once_have_the_bits_of_one_call_each(path: str, size: int) -> None:
    columns, factors = [9, 0, 9, 2**32 - 1, 77], torch.tensor([0.3, -1.7, 1e-6, 0.0, 2.5])
    at_once, one_by_one = torch.linspace(-1, 1, size), torch.linspace(-1, 1, size)
    add_gaussians_(at_once, KEY, columns, factors, 11)
    for column, factor in zip(columns, factors.tolist(), strict=True):
        add_gaussian_(one_by_one, KEY, column, factor, 11)
    assert torch.equal(at_once, one_by_one)
    assert torch.equal(add_gaussians_(at_once, KEY, [], torch.zeros(0)), one_by_one)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_other_dtypes_are_added_to_in_fp32_and_rounded_once(path: str, dtype: torch.dtype) -> None:
    target = torch.linspace(-1, 1, 70_001).to(dtype)
    columns, factors = [1, 2, 3], torch.tensor([1e-3, 2e-3, -3e-3])
    expected = add_gaussians_(target.float(), KEY, columns, factors).to(dtype)
    assert torch.equal(add_gaussians_(target, KEY, columns, factors), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_is_read_in_row_major_order(path: str, dtype: torch.dtype) -> None:
    wide = torch.zeros(300, 500, dtype=dtype)
    flat = add_gaussian_(torch.zeros(75_000, dtype=dtype), KEY, 2, 0.5, 3)
    assert torch.equal(add_gaussian_(wide[:, ::2], KEY, 2, 0.5, 3).reshape(-1), flat)
    assert int(wide[:, 1::2].count_nonzero()) == 0
    transposed = torch.zeros(250, 300, dtype=dtype).T
    assert torch.equal(add_gaussian_(transposed, KEY, 2, 0.5, 3).reshape(-1), flat)
    line = torch.zeros(150_000, dtype=dtype)[::2]
    assert torch.equal(add_gaussian_(line, KEY, 2, 0.5, 3), flat)
    assert add_gaussian_(torch.zeros(0, 4, dtype=dtype), KEY, 2, 0.5).shape == (0, 4)


def test_parameters_are_modified_in_place(path: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(600, 700))
    assert add_gaussian_(parameter, KEY, 1, 1.0) is parameter
    assert parameter.is_leaf and torch.equal(parameter.detach().view(-1), direction(1, 420_000))


def test_positions_count_on_from_tensor_to_tensor_of_a_tree(path: str) -> None:
    tree = {"b": torch.zeros(3, 5), "a": torch.zeros(70_000), "c": torch.zeros(())}
    add_directions_(tree, KEY, [4, 5], torch.tensor([1.0, 2.0]))
    whole = add_gaussians_(torch.zeros(70_016), KEY, [4, 5], torch.tensor([1.0, 2.0]))
    assert torch.equal(torch.cat([tensor.reshape(-1) for tensor in tree.values()]), whole)


def test_every_column_needs_a_factor() -> None:
    with pytest.raises(ValueError, match=r"3 columns came with factors of shape \(2,\)"):
        add_gaussians_(torch.zeros(4), KEY, [1, 2, 3], torch.ones(2))


def test_the_distribution_is_as_close_to_the_normal_as_documented() -> None:
    """Exact, not sampled: the difference j of two 16-bit integers has 65536 - |j| of the 2^32 words."""
    j = np.arange(-65_535, 65_536)
    share = (65_536 - np.abs(j)) / 2**32
    z = polynomial((j / 65_536).astype(np.float32)).astype(np.float64)
    assert np.all(np.diff(z) > 0) and np.array_equal(z, -z[::-1])
    assert abs(math.fsum(share * z**2) - 1) < 1e-7
    assert math.fsum(share * z**4) == pytest.approx(2.994, abs=1e-3)
    assert 3.8 < z.max() < 3.82
    middle = np.cumsum(share) - share / 2  # the middle of the distribution function's step at each value
    normal = np.array([NormalDist().cdf(value) for value in z[::7]])
    assert 0.0008 < np.abs(normal - middle[::7]).max() < 0.0009


def test_a_million_draws_have_the_moments_of_the_distribution() -> None:
    z = direction(0, 1 << 20).double()
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 2.994)):
        spread = float(z.pow(power).std()) / 2**10
        assert abs(float(z.pow(power).mean()) - moment) < 4 * spread


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(lambda: torch.stack([direction(k, 8192) for k in range(64)]), id="columns"),
        pytest.param(lambda: torch.stack([direction(k, 64) for k in range(8192)]).T, id="positions"),
        pytest.param(lambda: direction(0, 64 * 8192).view(64, 8192), id="stretches"),
        pytest.param(lambda: torch.stack([direction(0, 8192, WORD * n) for n in range(64)]), id="segments"),
        pytest.param(lambda: torch.stack([direction(0, 8192, key=Key.of(n)) for n in range(64)]), id="seeds"),
    ],
)
def test_rows_are_uncorrelated(rows: Callable[[], Tensor]) -> None:
    products = rows() @ rows().T / math.sqrt(8192)  # standard normal off the diagonal, were the rows independent
    scores = products[tuple(torch.triu_indices(64, 64, 1))]
    assert scores.abs().max() < 5
    assert 0.85 < scores.square().mean() < 1.15
