"""Folders that are written completely or not at all."""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.core.files import flush, make_folder


def refuse_filled(folder: Path) -> None:
    """Check that nothing would be overwritten: ``folder`` is absent, or is an empty folder.

    Raises:
        UserError: if ``folder`` is a file, or a folder that is not empty.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        what = "is not empty" if folder.is_dir() else "is a file"
        raise UserError(f'folder "{folder}" {what}: nothing is overwritten; give a new or an empty folder')


def build_folder(folder: Path, build: Callable[[Path], object]) -> None:
    """Fill a temporary folder beside ``folder``, rename it to ``folder``, and flush all of it to disk.

    Modes are those that the umask gives to new files, whatever ``build`` gave them.

    Args:
        folder: the folder to make; absent or empty.
        build: is called with the temporary folder and fills it.
    Raises:
        UserError: if ``folder`` is a file, or a folder that is not empty.
        OSError: if something cannot be written; nothing is left then.
    """
    refuse_filled(folder)
    folder = folder.absolute()
    make_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        with _named(folder):
            build(temporary)
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            flush(path)
        flush(temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn safetensors' error for a disk without room into one that names the folder."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, f"the weights cannot be written ({error})", str(folder)) from error
