"""Properties of a basis: adjoint, unbiased, of known error, and the same bits for every split of the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fedferret.bases.basis import Basis
from fedferret.bases.hashing import uniforms
from fedferret.bases.registry import basis
from fedferret.bases.sign_buckets import SignBuckets
from fedferret.bases.truncated_normal import TruncatedNormal, elements, variance
from fedferret.core.errors import UserError
from fedferret.core.keys import Key

KEY = Key.of(2, "bases")
BOTH = pytest.mark.parametrize("kind", [SignBuckets, TruncatedNormal])
Kind = Callable[..., Basis]
# the compiled kernels where there is a compiler, and the PyTorch fallback everywhere
ON_EVERY_PATH = pytest.mark.parametrize("path", ["kernels", "fallback"], indirect=True)


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the bases use the compiled kernels or the fallback in this test."""
    monkeypatch.setenv("FEDFERRET_NATIVE", "1" if request.param == "kernels" else "0")


def heavy_tailed(size: int, *words: int) -> Tensor:
    """Values of mean zero and very different magnitudes, like those of updates."""
    uniform = 2 * Key.of(9, size, *words).uniform(size) - 1
    return (uniform**5).float()


def matrix(kind: Basis, size: int, num_coordinates: int, key: Key) -> Tensor:
    """V, by expanding unit vectors."""
    return torch.stack([kind.expand_(torch.zeros(size), unit, key) for unit in torch.eye(num_coordinates)], dim=1)


@BOTH
@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (7, 3), (7, 7), (1000, 1), (1001, 70), (20_011, 130)])
def test_project_is_the_adjoint_of_expand(kind: Kind, size: int, count: int) -> None:
    delta, coordinates = heavy_tailed(size), heavy_tailed(count, 1)
    left = float(kind().project(delta, count, KEY).double() @ coordinates.double())
    expanded = kind().expand_(torch.zeros(size), coordinates, KEY).double()
    right = kind().unbiased_scale(size, count) * float(delta.double() @ expanded)
    bound = kind().unbiased_scale(size, count) * float(delta.double().norm() * expanded.norm())
    assert left == pytest.approx(right, abs=1e-6 * bound)


@BOTH
def test_project_and_expand_are_products_with_one_matrix(kind: Kind) -> None:
    size, count = 301, 67
    columns = matrix(kind(), size, count, KEY).double()
    delta, coordinates = heavy_tailed(size), heavy_tailed(count, 1)
    projected = kind().unbiased_scale(size, count) * columns.T @ delta.double()
    torch.testing.assert_close(kind().project(delta, count, KEY).double(), projected, rtol=1e-5, atol=1e-5)
    start = heavy_tailed(size, 2)
    expanded = kind().expand_(start.clone(), coordinates, KEY, 0.7).double()
    torch.testing.assert_close(expanded, start.double() + 0.7 * columns @ coordinates.double(), rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize(("size", "count"), [(256, 16), (512, 32), (60, 12)])
def test_the_error_energy_is_the_formula(kind: Kind, size: int, count: int) -> None:
    # 200 keys, and enough updates per key for the average over all to be within the required 2%
    deltas = [heavy_tailed(size, number) for number in range(40 * 256 // size + 8)]
    errors = []
    for key in (KEY.fold(number) for number in range(200)):
        columns = matrix_fast(kind(), size, count, key)
        stacked = torch.stack(deltas, dim=1)
        reconstructed = kind().unbiased_scale(size, count) * columns @ (columns.T @ stacked)
        errors.append(((reconstructed - stacked).square().sum(dim=0) / stacked.square().sum(dim=0)).mean())
    measured, expected = float(torch.stack(errors).mean()), kind().error_energy(size, count)
    assert abs(measured / expected - 1) < 0.02
    assert abs(measured / (expected * 2 / 3) - 1) > 0.02 and abs(measured / (expected * 3 / 2) - 1) > 0.02


@BOTH
def test_the_public_functions_have_that_error_energy(kind: Kind) -> None:
    size, count = 1024, 48
    energies = []
    for number in range(200):
        key, delta = KEY.fold("public", number), heavy_tailed(size, number)
        error = kind().expand_(-delta, kind().project(delta, count, key), key)
        energies.append(float(error.square().sum() / delta.square().sum()))
    expected = kind().error_energy(size, count)
    assert 0.98 * expected < sum(energies) / len(energies) < 1.02 * expected


def matrix_fast(kind: Basis, size: int, count: int, key: Key) -> Tensor:
    """V, by one expansion for sign buckets, where columns do not overlap; by unit vectors otherwise."""
    if isinstance(kind, TruncatedNormal):
        return matrix(kind, size, count, key)
    signs = kind.expand_(torch.zeros(size), torch.ones(count), key)
    return torch.zeros(size, count).scatter_(1, (torch.arange(size) % count)[:, None], signs[:, None])


def test_the_error_energy_of_unequal_buckets_is_the_mean_over_directions() -> None:
    size, count = 23, 9
    # the error of a single weight does not depend on the key
    errors = [error_of(SignBuckets(), unit, count) for unit in torch.eye(size)]
    assert sum(errors) / size == pytest.approx(SignBuckets().error_energy(size, count), rel=1e-6)
    assert SignBuckets().error_energy(size, count) == pytest.approx(size / count - 1 + 5 * 4 / (size * count))
    assert min(errors) == pytest.approx(size // count - 1) and max(errors) == pytest.approx(-(-size // count) - 1)


def error_of(kind: Basis, delta: Tensor, count: int) -> float:
    error = kind.expand_(-delta, kind.project(delta, count, KEY), KEY)
    return float(error.square().sum() / delta.square().sum())


@BOTH
def test_reconstruction_is_unbiased(kind: Kind) -> None:
    size, count, repeats = 200, 20, 1000
    delta, total = heavy_tailed(size), torch.zeros(size)
    for key in (KEY.fold("mean", number) for number in range(repeats)):
        kind().expand_(total, kind().project(delta, count, key), key, 1 / repeats)
    # the error of the mean of n unbiased reconstructions is the error energy over n: no more, and no less
    ratio = float((total - delta).square().sum() / delta.square().sum()) * repeats / kind().error_energy(size, count)
    assert 0.6 < ratio < 1.5


@BOTH
def test_shrinkage_is_the_scale_with_the_lowest_error(kind: Kind) -> None:
    size, count = 512, 64
    inner = energy = 0.0
    for key in (KEY.fold("shrunk", number) for number in range(300)):
        delta = heavy_tailed(size, key.value % 1000)
        reconstructed = kind().expand_(torch.zeros(size), kind().project(delta, count, key), key)
        inner += float(reconstructed @ delta / (delta @ delta))
        energy += float(reconstructed @ reconstructed / (delta @ delta))
    assert inner / energy == pytest.approx(kind().shrinkage(size, count), rel=0.03)
    assert SignBuckets().shrinkage(size, size) == 1
    assert SignBuckets().shrinkage(size, count) == pytest.approx(count / size)


def chunks_and_threads(kind: Kind) -> Iterator[Basis]:
    """The basis with several chunk sizes under several thread counts."""
    before = torch.get_num_threads()
    try:
        for chunk in (1, 8192, 40_000, 1 << 20):
            for threads in (1, 3):
                torch.set_num_threads(threads)
                yield kind(chunk_elements=chunk)
    finally:
        torch.set_num_threads(before)


@ON_EVERY_PATH
@BOTH
@pytest.mark.parametrize("count", [1, 3, 64, 150])
def test_expand_has_the_same_bits_for_every_chunk_and_thread_count(path: None, kind: Kind, count: int) -> None:
    size = 1_001 if kind is TruncatedNormal else 70_003
    coordinates, target = heavy_tailed(count, 1), heavy_tailed(size)
    expected = kind().expand_(target.clone(), coordinates, KEY, 0.37)
    for variant in chunks_and_threads(kind):
        assert torch.equal(variant.expand_(target.clone(), coordinates, KEY, 0.37), expected)


@ON_EVERY_PATH
def test_expand_of_very_many_coordinates_has_the_same_bits_for_every_chunk(path: None) -> None:
    size, count = 700_001, 300_007
    coordinates = heavy_tailed(count, 1)
    expected = SignBuckets().expand_(torch.zeros(size), coordinates, KEY)
    for variant in chunks_and_threads(SignBuckets):
        assert torch.equal(variant.expand_(torch.zeros(size), coordinates, KEY), expected)
    bucket = torch.arange(size) % count
    assert torch.equal(expected.abs(), coordinates[bucket].abs())
    folded = torch.zeros(count).index_add_(0, bucket, heavy_tailed(size).abs())
    positive = SignBuckets().expand_(torch.zeros(size), torch.ones(count), KEY) * heavy_tailed(size).abs()
    torch.testing.assert_close(SignBuckets().project(positive, count, KEY), folded, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("split", [1, 63, 500, 1000])
def test_a_block_may_be_split_into_tensors(kind: Kind, split: int) -> None:
    size, count = 1001, 70
    delta, coordinates = heavy_tailed(size), heavy_tailed(count, 1)
    whole = kind().expand_(torch.zeros(size), coordinates, KEY)
    pieces = torch.zeros(size)
    for piece, offset in ((pieces[:split], 0), (pieces[split:], split)):
        kind().expand_(piece, coordinates, KEY, size=size, offset=offset)
    assert torch.equal(pieces, whole)
    out = kind().project(delta[:split], count, KEY, size=size)
    assert kind().project(delta[split:], count, KEY, size=size, offset=split, out=out) is out
    scale = kind().unbiased_scale(size, count)
    torch.testing.assert_close(out, kind().project(delta, count, KEY), rtol=1e-4, atol=1e-6 * scale)


@ON_EVERY_PATH
@BOTH
def test_project_has_the_same_bits_for_every_thread_count(path: None, kind: Kind) -> None:
    size = 5_000 if kind is TruncatedNormal else 400_001
    delta = heavy_tailed(size)
    before = torch.get_num_threads()
    try:
        for count in (1, 5, 1000):
            torch.set_num_threads(1)
            expected = kind().project(delta, count, KEY)
            torch.set_num_threads(3)
            assert torch.equal(kind().project(delta, count, KEY), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 2, 63, 8193, 300_000])
def test_sign_buckets_with_one_coordinate_per_weight_are_exact(size: int) -> None:
    delta = heavy_tailed(size)
    reconstructed = SignBuckets().expand_(torch.zeros(size), SignBuckets().project(delta, size, KEY), KEY)
    assert torch.equal(reconstructed, delta)
    assert SignBuckets().error_energy(size, size) == 0


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_fp32_and_rounded_once(kind: Kind, dtype: torch.dtype) -> None:
    size, count = 3001, 17
    delta, coordinates = heavy_tailed(size).to(dtype), heavy_tailed(count, 1)
    assert torch.equal(kind().project(delta, count, KEY), kind().project(delta.float(), count, KEY))
    expected = kind().expand_(delta.float(), coordinates, KEY, 0.1).to(dtype)
    assert torch.equal(kind().expand_(delta.clone(), coordinates, KEY, 0.1), expected)


@BOTH
def test_any_layout_is_read_in_row_major_order(kind: Kind) -> None:
    count, coordinates = 11, heavy_tailed(11, 1)
    table = heavy_tailed(60).view(6, 10)
    for layout in (table.T, table[:, ::3], table[1], table.view(-1)[::2], table[0, 0]):
        packed = layout.contiguous().clone()
        fewer = min(count, packed.numel())
        assert torch.equal(kind().project(layout, fewer, KEY), kind().project(packed, fewer, KEY))
        expected = kind().expand_(packed.view(-1), coordinates[:fewer], KEY).view(layout.shape)
        storage = table.clone()
        target = storage.as_strided(layout.shape, layout.stride(), layout.storage_offset())
        assert kind().expand_(target, coordinates[:fewer], KEY) is target
        assert torch.equal(target, expected)
        untouched = storage.numel() - target.numel()
        assert int((storage == table).sum()) >= untouched


@BOTH
def test_parameters_that_require_gradients_are_modified_in_place(kind: Kind) -> None:
    parameter = torch.nn.Parameter(torch.zeros(8, 4))
    kind().expand_(parameter, kind().project(parameter + 1, 4, KEY), KEY)
    assert parameter.requires_grad and parameter.is_leaf and bool(parameter.detach().any())


@BOTH
def test_results_depend_on_key_and_input_and_inputs_are_not_modified(kind: Kind) -> None:
    delta = heavy_tailed(500)
    copy = delta.clone()
    first = kind().project(delta, 50, KEY)
    assert torch.equal(delta, copy)
    assert torch.equal(first, kind().project(delta, 50, KEY))
    assert not torch.equal(first, kind().project(delta, 50, KEY.fold(1)))
    coordinates = first.clone()
    kind().expand_(delta, first, KEY, 2.0)
    assert torch.equal(first, coordinates)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 100, 30_000, 2**24])
def test_elements_are_the_inverse_distribution_function(size: int) -> None:
    words = torch.arange(-(2**31), 2**31, 2**15 + 3, dtype=torch.int64).to(torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    values = elements(zero, words, size)[0].double()
    u = uniforms(zero, words)[0].double()
    mass = torch.special.erf(values / math.sqrt(2)) / math.erf(math.sqrt(0.5 / size))
    assert ((mass - u).abs() <= 2.0**-21 * u.abs()).all()
    assert values.square().mean() == pytest.approx(variance(size), rel=0.01)


@BOTH
@pytest.mark.parametrize("count", [0, 11])
def test_a_block_has_between_one_coordinate_and_one_per_weight(kind: Kind, count: int) -> None:
    with pytest.raises(UserError, match="give it 1 to 10"):
        kind().project(torch.zeros(10), count, KEY)
    with pytest.raises(UserError, match="give it 1 to 10"):
        kind().expand_(torch.zeros(10), torch.zeros(count), KEY)


def test_blocks_beyond_the_counter_are_refused() -> None:
    with pytest.raises(UserError, match="too large for truncated-normal, which takes at most 4,294,967,296"):
        TruncatedNormal().project(torch.zeros(1), 1, KEY, size=2**32 + 1)


def test_bases_are_found_by_name() -> None:
    assert basis("sign-buckets") == SignBuckets() and basis("truncated-normal") == TruncatedNormal()
    with pytest.raises(UserError, match='did you mean "sign-buckets"'):
        basis("sign-bucket")
