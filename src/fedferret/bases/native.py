"""The inner loops of bases and rotations in machine code: ``kernels.c``, compiled where there is a C compiler.

At first use (never at import) the machine's ``cc`` builds a library into the cache. Its name is a hash of the source,
the flags, the compiler and the processor; later processes load it. ctypes releases Python's lock during a call, so
pieces of one tensor run on a pool of as many threads as torch uses. The code uses no OpenMP, because torch has an
OpenMP runtime already and two in one process conflict.

Additions to weights and rotations give the same bits as the PyTorch fallback, element by element. Coordinates are sums
in another order and agree to rounding (in units of the norm of their bucket or column, about 1e-7 times the square root
of the number of sequential additions). Sizes alone determine how work is split, so results do not depend on the number
of threads.

Without a compiler, or with ``FEDFERRET_NATIVE=0``, the bases use the PyTorch fallback. A process tries a failing build
once and logs the failure once, through ``logging``. The cache is ``$FEDFERRET_CACHE/kernels``, or ``fedferret/kernels``
in ``$XDG_CACHE_HOME`` or in ``~/.cache``.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedferret.bases.arithmetic import fold_rows_
from fedferret.core.files import build_atomically, cache_folder
from fedferret.core.keys import Key

_REQUIRED = ("-O3", "-ffp-contract=off", "-fPIC", "-shared")
_TUNED = (("-march=native",), ())  # the first that the compiler accepts is used

_MOST_PIECES = 64
_CONVERTED = 1 << 15  # elements of another dtype converted to fp32 at a time: torch starts no threads for so few
_FEW_BUCKETS = 1 << 12  # fewer buckets are repeated, so that runs of positions are long enough for vector instructions
_COLUMN_BLOCK = 1 << 14  # buckets that fit in a core's cache
_SIGN_PIECE = 1 << 17  # weights that repay starting a thread: about 20 microseconds of work
_DENSE_PIECE = 1 << 20  # elements of V: a few hundred microseconds of work
_CHUNK, _GROUP = 4096, 64  # as in kernels.c

T = TypeVar("T")

_log = logging.getLogger(__name__)
_lock = threading.Lock()


def kernels(device: torch.device) -> Kernels | None:
    """The compiled kernels for tensors on ``device``; None where the bases use the PyTorch fallback."""
    if device.type != "cpu" or os.environ.get("FEDFERRET_NATIVE") == "0":
        return None
    with _lock:
        return _load()


@cache
def _load() -> Kernels | None:
    try:
        return Kernels(build(cache_folder() / "kernels"))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or b"").decode(errors="replace") or str(error)
        _log.warning(
            "projections use the PyTorch fallback, several times slower: kernels.c could not be compiled (%s); "
            "install a C compiler, or set FEDFERRET_NATIVE=0 to use the fallback without this warning",
            " ".join(reason.split())[:200],
        )
        return None


def build(folder: Path) -> Path:
    """The path of the library in ``folder``, compiled if missing. Concurrent builds all get a complete library.

    Args:
        folder: created if missing.
    Raises:
        FileNotFoundError: without a compiler.
        subprocess.CalledProcessError: where the compiler fails.
        OSError: where the folder cannot be written.
    """
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("there is no cc, gcc or clang")
    source = files("fedferret.bases").joinpath("kernels.c").read_bytes()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    identity = b"\0".join((source, repr((_REQUIRED, _TUNED)).encode(), version, _processor().encode()))
    library = folder / f"kernels-{hashlib.blake2b(identity, digest_size=10).hexdigest()}.so"
    if not library.exists():
        build_atomically(library, lambda temporary: _compile(compiler, source, temporary))
    return library


def _compile(compiler: str, source: bytes, target: Path) -> None:
    """Write the library to ``target``, with the first tuning flags that the compiler accepts."""
    refused: subprocess.CalledProcessError | None = None
    for tuned in _TUNED:
        command = [compiler, *_REQUIRED, *tuned, "-x", "c", "-", "-o", str(target)]
        try:
            subprocess.run(command, input=source, capture_output=True, check=True, timeout=120)
            return
        except subprocess.CalledProcessError as error:
            refused = error
    assert refused is not None
    raise refused


def _processor() -> str:
    """What ``-march=native`` depends on: machines with different processors may share a cache."""
    description = [platform.system(), platform.machine(), platform.processor()]
    information = Path("/proc/cpuinfo")
    if information.exists():
        of_interest = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        description += sorted({line for line in information.read_text().splitlines() if line.startswith(of_interest)})
    return "\n".join(description)


class Kernels:
    """The loops over one piece of a block; the piece's first element is at position ``offset`` of the block."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, size, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32
        series = (pointer, ctypes.c_int32)
        keys = (word, word)
        signatures = {
            "sign_project": (pointer, size, size, pointer, size, size, size, *keys),
            "sign_expand": (pointer, size, size, pointer, size, *keys),
            "dense_project": (pointer, size, word, pointer, word, word, *series, *keys),
            "dense_expand": (pointer, size, word, pointer, word, *series, *keys),
            "fold_rows": (pointer, pointer, size, size),
            "rotate": (pointer, size, size, ctypes.c_float, *keys),
            "rotate_back": (pointer, size, size, ctypes.c_float, *keys),
            "gaussian_add": (pointer, size, word, pointer, pointer, size, pointer, *keys),
            "round_to_bf16": (pointer, pointer, size, word, *keys),
        }
        for name, signature in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = signature, None
        self._library = library

    def sign_project(self, delta_N: Tensor, out_K: Tensor, key: Key, offset: int) -> None:
        """Add the signed bucket sums of a piece to ``out_K``.

        Args:
            delta_N: any float dtype, shape (N,).
            out_K: fp32, shape (K,), changed in place.
            key: of the block.
            offset: position in the block of the first element of ``delta_N``.
        """
        count, repeats = delta_N.numel(), _repeats(delta_N.numel(), out_K.numel())
        buckets = repeats * out_K.numel()
        cached = _clamp(buckets // _COLUMN_BLOCK, _MOST_PIECES)
        # the split of buckets changes no sum, the split of positions does
        whole = _is_contiguous_fp32(delta_N)
        blocks = cached if whole else 1
        pieces = _clamp(count // max(64 * buckets, _SIGN_PIECE), _MOST_PIECES // cached)
        # sums are added to out_K directly; with K = d this is exact
        direct = repeats == pieces == 1 and out_K.is_contiguous()
        sums_PR = out_K[None] if direct else torch.zeros(pieces, buckets)
        if whole and pieces == blocks == 1 and out_K.is_contiguous():  # a small tensor: most of its time is Python's
            sums = sums_PR.data_ptr()
            self._library.sign_project(delta_N.data_ptr(), count, offset, sums, buckets, 0, buckets, *key.words)
            if not direct:
                self._library.fold_rows(out_K.data_ptr(), sums, repeats, out_K.numel())
            return

        def work(task: tuple[int, tuple[int, int], tuple[int, int]]) -> None:
            piece, positions, columns = task
            for start, values in _in_fp32(delta_N, *positions):
                where = (values.data_ptr(), values.numel(), offset + start)
                self._library.sign_project(*where, sums_PR[piece].data_ptr(), buckets, *columns, *key.words)

        parts = enumerate(_split(count, pieces))
        _for_each(work, [(*part, columns) for part in parts for columns in _split(buckets, blocks)])
        if not direct:
            out_K += fold_rows_(sums_PR.view(-1, out_K.numel()))

    def sign_expand_(self, target_N: Tensor, coordinates_K: Tensor, key: Key, offset: int) -> None:
        """Add to every weight the coordinate of its bucket, with the weight's sign.

        Args:
            target_N: any float dtype, shape (N,), changed in place.
            coordinates_K: fp32, shape (K,).
            key: of the block.
            offset: position in the block of the first element of ``target_N``.
        """
        count = target_N.numel()
        coordinates_R = coordinates_K.repeat(_repeats(count, coordinates_K.numel()))

        def work(positions: tuple[int, int]) -> None:
            for start, values in _in_fp32(target_N, *positions, write_back=True):
                where = (values.data_ptr(), values.numel(), offset + start)
                self._library.sign_expand(*where, coordinates_R.data_ptr(), coordinates_R.numel(), *key.words)

        _for_each(work, _split(count, _clamp(count // _SIGN_PIECE, _MOST_PIECES)))

    def rotate_(self, ring_K: Tensor, length: int, key: Key, back: bool) -> None:
        """One step of a rotation: new signs, then the Hadamard transform of the first values; or both undone.

        Args:
            ring_K: fp32, contiguous, shape (K,), changed in place.
            length: of the transform, a power of two, at most K.
            key: of the signs.
            back: whether the step is undone.
        """
        step = self._library.rotate_back if back else self._library.rotate
        step(ring_K.data_ptr(), ring_K.numel(), length, 1 / math.sqrt(length), *key.words)

    def dense_project(
        self, delta_N: Tensor, num_columns: int, key: Key, offset: int, coefficients: Sequence[float]
    ) -> Tensor:
        """Vᵀ Δ of a piece, unscaled.

        Args:
            delta_N: any float dtype, shape (N,).
            num_columns: K.
            key: of the block.
            offset: position in the block of the first element of ``delta_N``.
            coefficients: of the odd power series of an element, at least one.
        Returns:
            fp64, shape (K,).
        """
        count, groups = delta_N.numel(), -(-num_columns // _GROUP)
        tasks = _clamp(count * num_columns // _DENSE_PIECE, _MOST_PIECES)
        blocks = min(tasks, groups)
        pieces = _clamp(count // _CHUNK, tasks // blocks)
        totals_PK = torch.zeros(pieces, num_columns, dtype=torch.float64)
        series = _as_argument(coefficients)

        def work(task: tuple[int, tuple[int, int], tuple[int, int]]) -> None:
            piece, positions, (first, last) = task
            first, last = first * _GROUP, min(last * _GROUP, num_columns)
            totals = totals_PK[piece, first:]
            for start, values in _in_fp32(delta_N, *positions):
                where = (values.data_ptr(), values.numel(), offset + start)
                self._library.dense_project(*where, totals.data_ptr(), first, last, *series, *key.words)

        parts = enumerate(_split(count, pieces))
        _for_each(work, [(*part, columns) for part in parts for columns in _split(groups, blocks)])
        return fold_rows_(totals_PK)

    def dense_expand_(
        self, target_N: Tensor, coordinates_K: Tensor, key: Key, offset: int, coefficients: Sequence[float]
    ) -> None:
        """Add V c to a piece.

        Args:
            target_N: any float dtype, shape (N,), changed in place.
            coordinates_K: c, fp32, shape (K,).
            key: of the block.
            offset: position in the block of the first element of ``target_N``.
            coefficients: of the odd power series of an element, at least one.
        """
        count, coordinates_K = target_N.numel(), coordinates_K.contiguous()
        series = _as_argument(coefficients)

        def work(positions: tuple[int, int]) -> None:
            for start, values in _in_fp32(target_N, *positions, write_back=True):
                where = (values.data_ptr(), values.numel(), offset + start)
                columns = (coordinates_K.data_ptr(), coordinates_K.numel())
                self._library.dense_expand(*where, *columns, *series, *key.words)

        _for_each(work, _split(count, _clamp(count * coordinates_K.numel() // _DENSE_PIECE, min(count, _MOST_PIECES))))

    def gaussian_add_(
        self,
        target_N: Tensor,
        columns: Sequence[int],
        factors_K: Tensor,
        key: Key,
        offset: int,
        coefficients: Sequence[float],
    ) -> None:
        """Add factors times Gaussian directions to a piece of one segment.

        Args:
            target_N: any float dtype, shape (N,), changed in place.
            columns: K indices from 0 to 2^32 - 1.
            factors_K: fp32, contiguous, shape (K,).
            key: of the segment.
            offset: position in the segment of the first element of ``target_N``.
            coefficients: the five of ``gaussian.COEFFICIENTS``.
        """
        count, number = target_N.numel(), len(columns)
        series, _ = _as_argument(coefficients)
        directions = ((ctypes.c_uint32 * number)(*columns), factors_K.data_ptr(), number, series)

        def work(positions: tuple[int, int]) -> None:
            for start, values in _in_fp32(target_N, *positions, write_back=True):
                where = (values.data_ptr(), values.numel(), offset + start)
                self._library.gaussian_add(*where, *directions, *key.words)

        _for_each(work, _split(count, _clamp(min(count // _CHUNK, count * number // _SIGN_PIECE), _MOST_PIECES)))

    def round_to_bf16(self, source_N: Tensor, rounded_N: Tensor, key: Key) -> None:
        """Round values to bf16, up or down at random.

        Args:
            source_N: fp32, contiguous, shape (N,).
            rounded_N: bf16, contiguous, shape (N,), overwritten.
            key: of the tensor; positions count from 0, modulo 2^32.
        """
        count = source_N.numel()

        def work(positions: tuple[int, int]) -> None:
            start, stop = positions
            where = (source_N[start:].data_ptr(), rounded_N[start:].data_ptr(), stop - start)
            self._library.round_to_bf16(*where, start % 2**32, *key.words)

        _for_each(work, _split(count, _clamp(count // _SIGN_PIECE, _MOST_PIECES)))


def _as_argument(coefficients: Sequence[float]) -> tuple[ctypes.Array[ctypes.c_float], int]:
    return (ctypes.c_float * len(coefficients))(*coefficients), len(coefficients)


def _clamp(count: int, most: int) -> int:
    return max(1, min(count, most))


def _repeats(count: int, num_coordinates: int) -> int:
    """How often to repeat few buckets: up to _FEW_BUCKETS in all, and up to an eighth of the weights."""
    return max(1, min(_FEW_BUCKETS, count // 8) // num_coordinates)


def _split(count: int, parts: int) -> list[tuple[int, int]]:
    """(start, stop) of ``parts`` consecutive, about equal parts of ``count``."""
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def _is_contiguous_fp32(values_N: Tensor) -> bool:
    return values_N.dtype == torch.float32 and values_N.is_contiguous()


def _in_fp32(values_N: Tensor, start: int, stop: int, write_back: bool = False) -> Iterator[tuple[int, Tensor]]:
    """(start, values) of positions ``start`` to ``stop - 1``, contiguous fp32: in one part, or converted in several."""
    if _is_contiguous_fp32(values_N):
        yield start, values_N[start:stop]
        return
    values_N = values_N.detach()  # torch.no_grad holds only for the thread that entered it
    for first in range(start, stop, _CONVERTED):
        original = values_N[first : min(stop, first + _CONVERTED)]
        converted = original.to(torch.float32).contiguous()
        yield first, converted
        if write_back:
            original.copy_(converted)


def _for_each(work: Callable[[T], None], tasks: Sequence[T]) -> None:
    """Call ``work`` on every task, in as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads == 1:
        for task in tasks:
            work(task)
    else:
        # consumed, because errors are raised only then
        deque(_pool(torch.get_num_threads(), os.getpid()).map(work, tasks), maxlen=0)


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """The threads of ``process``: a fork inherits none."""
    return ThreadPoolExecutor(threads, thread_name_prefix="fedferret-bases")
