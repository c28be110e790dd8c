"""Folders that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fedferret.core.errors import UserError


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
    """Fill a temporary folder beside ``folder``, flush it to disk, then rename it to ``folder``.

    Args:
        folder: the folder to make; absent or empty.
        build: is called with the temporary folder and fills it.
    Raises:
        UserError: if ``folder`` is a file, or a folder that is not empty.
    """
    refuse_filled(folder)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        build(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep other users out
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
