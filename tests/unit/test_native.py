"""The compiled kernels against the PyTorch fallback: equal additions, sums to rounding, for every split of the work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedferret.bases import native
from fedferret.bases.basis import Basis
from fedferret.bases.rotation import rotate, rotate_back
from fedferret.bases.sign_buckets import SignBuckets
from fedferret.bases.truncated_normal import TruncatedNormal
from fedferret.core.keys import Key

KEY = Key.of(3, "native")
BOTH = pytest.mark.parametrize("kind", [SignBuckets, TruncatedNormal])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Kind = Callable[..., Basis]

compiled_only = pytest.mark.skipif(
    native.kernels(torch.device("cpu")) is None,
    reason="no C compiler, or FEDFERRET_NATIVE=0: only the PyTorch fallback can run",
)

# (weights, coordinates): one of each, odd sizes, a coordinate per weight, and both sides of where the split changes
SIGN_SIZES = [
    (1, 1), (2, 1), (3, 2), (255, 7), (257, 257), (8191, 1), (8193, 4), (20_011, 20_011),
    (33_001, 4095), (33_001, 4096), (33_001, 4097), (40_007, 2049), (70_001, 32_767), (70_001, 32_769),
    (262_143, 5), (300_001, 3), (300_001, 33_000), (600_011, 1000), (600_011, 4097), (2_300_003, 16_385),
]  # fmt: skip
DENSE_SIZES = [
    (1, 1), (2, 2), (3, 1), (63, 63), (64, 5), (65, 64), (127, 65), (1001, 66), (4095, 3), (4097, 127),
    (8191, 1), (8193, 129), (20_011, 200), (1_100_003, 1),
]  # fmt: skip
CASES = [(SignBuckets, *case) for case in SIGN_SIZES] + [(TruncatedNormal, *case) for case in DENSE_SIZES]


def heavy_tailed(size: int, *words: int) -> Tensor:
    """Values of mean zero and very different magnitudes, like those of updates."""
    uniform = 2 * Key.of(9, size, *words).uniform(size) - 1
    return (uniform**5).float()


@contextmanager
def fallback() -> Iterator[None]:
    """Make the bases use the PyTorch fallback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFERRET_NATIVE", "0")
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_sums(actual: Tensor, expected: Tensor, kind: Basis, delta: Tensor, size: int) -> None:
    """Equal to rounding: 2e-6 of the norm of the terms of each coordinate."""
    share = kind.unbiased_scale(size, len(expected)) / size**0.5 if isinstance(kind, TruncatedNormal) else 1.0
    norm = float(delta.double().norm()) * share
    if isinstance(kind, SignBuckets):
        norm = max(norm / len(expected) ** 0.5, float(delta.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6 * norm)


@compiled_only
@pytest.mark.parametrize(("kind", "size", "count"), CASES)
def test_expand_is_bit_equal_to_the_fallback(kind: Kind, size: int, count: int) -> None:
    target, coordinates = heavy_tailed(size), heavy_tailed(count, 1)
    expected = target.clone()
    with fallback():
        kind().expand_(expected, coordinates, KEY, 0.37)
    for number in (1, 3):
        with threads(number):
            assert torch.equal(kind().expand_(target.clone(), coordinates, KEY, 0.37), expected)


@compiled_only
@pytest.mark.parametrize(("kind", "size", "count"), CASES)
def test_project_agrees_with_the_fallback_and_has_equal_bits_for_every_thread_count(
    kind: Kind, size: int, count: int
) -> None:
    delta = heavy_tailed(size)
    with fallback():
        expected = kind().project(delta, count, KEY)
    with threads(1):
        alone = kind().project(delta, count, KEY)
    assert_same_sums(alone, expected, kind(), delta, size)
    for number in (2, 5):
        with threads(number):
            assert torch.equal(kind().project(delta, count, KEY), alone)


@compiled_only
@pytest.mark.parametrize("size", [1, 2, 255, 8193, 40_001, 1_200_007])
def test_one_coordinate_per_weight_is_exact(size: int) -> None:
    delta = heavy_tailed(size)
    coordinates = SignBuckets().project(delta, size, KEY)
    with fallback():
        assert torch.equal(coordinates, SignBuckets().project(delta, size, KEY))
    assert torch.equal(SignBuckets().expand_(torch.zeros(size), coordinates, KEY), delta)


@compiled_only
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_and_layouts_are_read_as_fp32_and_rounded_once(kind: Kind, dtype: torch.dtype) -> None:
    size, count = (400_003, 20_001) if kind is SignBuckets else (70_001, 33)
    wide = heavy_tailed(2 * size).to(dtype)
    packed, strided = wide[::2].clone(), wide[::2]
    coordinates, alone = heavy_tailed(count, 1), kind().project(packed.float(), count, KEY)
    assert torch.equal(kind().project(packed, count, KEY), alone)
    assert torch.equal(kind().project(strided, count, KEY), alone)
    expected, untouched = packed.clone(), wide[1::2].clone()
    with fallback():
        kind().expand_(expected, coordinates, KEY, 0.1)
    assert torch.equal(kind().expand_(packed, coordinates, KEY, 0.1), expected)
    assert torch.equal(kind().expand_(strided, coordinates, KEY, 0.1), expected)
    assert torch.equal(wide[1::2], untouched)


@compiled_only
@pytest.mark.parametrize(("kind", "position"), [(SignBuckets, 2**35 + 12_345), (TruncatedNormal, 2**32 - 5000)])
def test_positions_may_be_far_into_a_block(kind: Kind, position: int) -> None:
    # beyond 32 bits for signs; up to the last position of a uniform's 32-bit counter
    length, count = 5000, 77
    size, delta, coordinates = position + length, heavy_tailed(length), heavy_tailed(count, 1)
    actual = kind().expand_(torch.zeros(length), coordinates, KEY, size=size, offset=position)
    sums = kind().project(delta, count, KEY, size=size, offset=position)
    with fallback():
        expected = kind().expand_(torch.zeros(length), coordinates, KEY, size=size, offset=position)
        expected_sums = kind().project(delta, count, KEY, size=size, offset=position)
    assert torch.equal(actual, expected)
    assert_same_sums(sums, expected_sums, kind(), delta, size)


@compiled_only
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([SignBuckets, TruncatedNormal]),
    before=st.integers(0, 20_000),
    length=st.integers(1, 20_000),
    after=st.integers(0, 9),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    number=st.integers(1, 3),
)
def test_any_piece_of_any_block(
    kind: Kind, before: int, length: int, after: int, share: float, dtype: torch.dtype, number: int
) -> None:
    size = before + length + after
    most = size if kind is SignBuckets else min(size, 80)
    count = 1 + int(share * (most - 1))
    delta, coordinates, out = heavy_tailed(length).to(dtype), heavy_tailed(count, 1), heavy_tailed(count, 2)
    with threads(number):
        sums = kind().project(delta, count, KEY, size=size, offset=before, out=torch.zeros(count))
        added = kind().project(delta, count, KEY, size=size, offset=before, out=out.clone())
        target = kind().expand_(delta.clone(), coordinates, KEY, 0.7, size=size, offset=before)
    with fallback():
        expected_sums = kind().project(delta, count, KEY, size=size, offset=before)
        expected = kind().expand_(delta.clone(), coordinates, KEY, 0.7, size=size, offset=before)
    assert torch.equal(target, expected)
    assert_same_sums(sums, expected_sums, kind(), delta.float(), size)
    assert_same_sums(added - out, sums, kind(), torch.cat((delta.float(), out)), size)


@compiled_only
@BOTH
def test_parameters_are_modified_in_place_by_every_thread(kind: Kind) -> None:
    with threads(3):
        for dtype in (torch.float32, torch.bfloat16):
            parameter = torch.nn.Parameter(torch.zeros(600_000 if kind is SignBuckets else 60_000, dtype=dtype))
            kind().expand_(parameter, kind().project(parameter + 1, 40, KEY), KEY)
            assert parameter.requires_grad and parameter.is_leaf and int((parameter == 0).sum()) < 100


@compiled_only
def test_threads_may_project_concurrently() -> None:
    delta = heavy_tailed(600_000)
    expected = SignBuckets().project(delta, 1000, KEY)
    with ThreadPoolExecutor(4) as pool:
        assert all(
            torch.equal(each, expected)
            for each in pool.map(lambda _: SignBuckets().project(delta, 1000, KEY), range(8))
        )


@compiled_only
def test_a_library_is_built_once_and_complete_under_concurrent_builds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(native.build, [tmp_path / "new" / "folder"] * 3))
    (path,) = paths
    assert list(path.parent.iterdir()) == [path]
    delta, sums = heavy_tailed(1000), torch.zeros(7)
    native.Kernels(path).sign_project(delta, sums, KEY, 0)
    assert torch.equal(sums, SignBuckets().project(delta, 7, KEY))
    built = path.stat().st_mtime_ns
    assert native.build(path.parent) == path and path.stat().st_mtime_ns == built


@compiled_only
@pytest.mark.parametrize("count", [1, 2, 3, 7, 255, 256, 4095, 4096, 8192, 8193, 84_992, 131_072])
def test_rotations_are_bit_equal_to_the_fallback_and_leave_their_input(count: int) -> None:
    wide = heavy_tailed(2 * count)
    wide[0] = -0.0
    before = wide.clone()
    for values in (wide[:count], wide[::2], wide[:count].double()):
        turned, back = rotate(values, KEY), rotate_back(values, KEY)
        with fallback():
            expected = rotate(values, KEY), rotate_back(values, KEY)
        for one, other in zip((turned, back), expected, strict=True):
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    assert torch.equal(wide, before)


PROGRAM = """
import logging, sys, torch
from fedferret.bases.sign_buckets import SignBuckets
from fedferret.bases.truncated_normal import TruncatedNormal
from fedferret.core.keys import Key
logging.basicConfig(format="%(message)s")
update, coordinates = torch.zeros(3001), torch.linspace(-1, 2, 67)
for kind in (SignBuckets, TruncatedNormal):
    kind().expand_(update, coordinates, Key.of(3, "native"))
sys.stdout.write(update.numpy().tobytes().hex())
"""


def update_in_a_process(folder: Path, **environment: str) -> tuple[bytes, list[str]]:
    """The bits that both bases write in a process with an empty cache, and the lines that the process logs."""
    environment = {**os.environ, "FEDFERRET_CACHE": str(folder), "OMP_NUM_THREADS": "1", **environment}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", PROGRAM]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return bytes.fromhex(finished.stdout), finished.stderr.splitlines()


def expected_update() -> bytes:
    update, coordinates = torch.zeros(3001), torch.linspace(-1, 2, 67)
    for kind in (SignBuckets, TruncatedNormal):
        kind().expand_(update, coordinates, KEY)
    return update.numpy().tobytes()


def compiler_that(folder: Path, script: str) -> str:
    """A PATH on which ``cc`` is this shell script."""
    folder.mkdir()
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
def test_without_a_compiler_the_fallback_is_used_and_logged_once(tmp_path: Path) -> None:
    update, lines = update_in_a_process(tmp_path, PATH=str(tmp_path))
    assert update == expected_update()
    assert len(lines) == 1 and lines[0].startswith("projections use the PyTorch fallback")
    assert "(there is no cc, gcc or clang); install a C compiler" in lines[0]


@pytest.mark.slow
def test_a_failing_compiler_is_called_once_and_quoted(tmp_path: Path) -> None:
    path = compiler_that(tmp_path / "tools", "[ $1 = --version ] && exit; echo called >&2; echo 'no space' >&2; exit 1")
    update, lines = update_in_a_process(tmp_path, PATH=path)
    assert update == expected_update()
    assert len(lines) == 1 and "(called no space)" in lines[0]
    assert not list((tmp_path / "kernels").iterdir())


@pytest.mark.slow
def test_the_environment_turns_the_kernels_off(tmp_path: Path) -> None:
    update, lines = update_in_a_process(tmp_path, FEDFERRET_NATIVE="0")
    assert update == expected_update() and lines == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler called cc")
def test_a_compiler_without_march_native_gives_the_same_bits(tmp_path: Path) -> None:
    refusal = f'for each; do [ "$each" = -march=native ] && exit 1; done; exec {shutil.which("cc")} "$@"'
    update, lines = update_in_a_process(tmp_path, PATH=compiler_that(tmp_path / "tools", refusal))
    assert update == expected_update() and lines == []
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1
