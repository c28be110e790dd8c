"""Which files a setting names: files, folders, globs, or several of them.

A folder that ``datasets`` has saved is one item. Of any other folder, the files with a known suffix are read, by name;
one with files of several splits is refused, because training on a test set would go unnoticed.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from fedferret.core.errors import UserError
from fedferret.data.examples import listed
from fedferret.data.readers import formats, readable

Paths: TypeAlias = "str | tuple[str, ...]"  # of data.path and the like: each a file, a folder or a glob

_SAVED = ("state.json", "dataset_dict.json")  # `save_to_disk` of a data set, and of several splits
_TRAINING = {"train", "training"}
_SCORED = {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}


def files_of(paths: Paths, setting: str = "data.path") -> tuple[list[Path], list[str]]:
    """The files that a setting names.

    Args:
        paths: one or several files, folders or globs.
        setting: that names them, for errors.

    Returns:
        Each file once, in the order given and within a folder or glob by name; and lines on files that are not read.

    Raises:
        UserError: nothing is there, it is no file, its suffix is unknown, or a file is named twice.
    """
    given = (paths,) if isinstance(paths, str) else tuple(paths)
    if not given or not all(each.strip() for each in given):
        raise UserError(f"{setting} names no file: give a file, a folder or a glob")
    found: list[Path] = []
    notes: list[str] = []
    for each in given:
        files = _found(each, setting, notes)
        found += files
    known: set[Path] = set()
    for path in found:
        if path.resolve() in known:
            raise UserError(f'{setting} names "{path}" twice: name each file once')
        known.add(path.resolve())
    return found, notes


def files_below(*settings: Paths | None) -> tuple[Path, ...]:
    """The files that settings name, those within a folder that ``datasets`` has saved too.

    Args:
        settings: each one or several files, folders or globs; None: none.

    Returns:
        Each file once; nothing of a setting that names no file, which whoever reads it refuses.
    """
    found: list[Path] = []
    for paths in settings:
        with suppress(UserError):
            for path in files_of(paths)[0] if paths is not None else ():
                found += (each for each in sorted(path.rglob("*")) if each.is_file()) if path.is_dir() else [path]
    return tuple(dict.fromkeys(found))


def located(paths: Paths, folder: Path) -> Paths:
    """Paths of which relative ones lie in a folder.

    Args:
        paths: as a setting has them; "~" is the user's home.
        folder: where relative ones lie.
    """
    if isinstance(paths, str):
        return str(folder / Path(paths).expanduser())
    return tuple(str(folder / Path(each).expanduser()) for each in paths)


def named(paths: Paths) -> str:
    """Words for the paths of a setting.

    Args:
        paths: as a setting has them.
    """
    return paths if isinstance(paths, str) else ", ".join(paths)


def _found(given: str, setting: str, notes: list[str]) -> list[Path]:
    path = Path(given)
    if "\0" in given:
        raise UserError(f"{setting}: {given!r:.200} is no valid path")
    try:
        if path.is_dir():
            return _of_folder(path, setting, notes)
        if path.is_file():
            if not readable(path):
                raise UserError(f'cannot read "{path}": files end in {formats()}')
            return [path]
        if path.exists():
            raise UserError(f'{setting}: "{path}" is neither a file nor a folder')
        if path.is_symlink():
            raise UserError(f'there is no file "{path}": it is a link, and nothing is where it points')
        if glob.has_magic(given):
            return _of_glob(given, setting)
    except OSError as error:
        raise UserError(f'{setting}: "{given:.200}" cannot be looked at: {error.strerror or error}') from None
    raise UserError(f'there is no file "{path}": check {setting}')


def _of_folder(folder: Path, setting: str, notes: list[str]) -> list[Path]:
    if any((folder / name).is_file() for name in _SAVED):
        return [folder]
    names = sorted(each for each in folder.iterdir() if not each.name.startswith((".", "_")))
    files = [each for each in names if each.is_file() and readable(each)]
    if not files:
        raise UserError(f'{setting}: the folder "{folder}" holds no file to read: files end in {formats()}')
    _refuse_splits(folder, files, setting)
    others = [each.name for each in names if each not in files]
    if others:
        notes.append(f"{folder}: {len(files):,} files are read; not read: {listed(others)}.")
    return files


def _of_glob(given: str, setting: str) -> list[Path]:
    matches = sorted(Path(each) for each in glob.glob(given, recursive=True))
    files = [each for each in matches if each.is_file()]
    unknown = [str(each) for each in files if not readable(each)]
    if not files:
        raise UserError(f'no file matches "{given}": check {setting}')
    if unknown:
        raise UserError(f'"{given}" matches files that cannot be read ({listed(unknown)}): files end in {formats()}')
    return files


def _refuse_splits(folder: Path, files: Sequence[Path], setting: str) -> None:
    scored = [each.name for each in files if _speaks_of(each, _SCORED)]
    if scored and len(scored) < len(files):
        training = next((each.name for each in files if _speaks_of(each, _TRAINING)), "…")
        raise UserError(
            f'{setting}: the folder "{folder}" holds several splits ({listed(scored)} beside the others): '
            f'name the files, such as data.path = "{folder / training}" and data.held_out_path = "{folder / scored[0]}"'
        )


def _speaks_of(path: Path, words: set[str]) -> bool:
    matches: Callable[[str], bool] = words.__contains__
    return any(map(matches, re.split(r"[^a-z]+", path.name.lower())))
