"""Files that appear whole or not at all, and the folder for those that can be made again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: ``$FEDFERRET_CACHE``, or ``fedferret`` in the user's cache."""
    if chosen := os.environ.get("FEDFERRET_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedferret"


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write ``data`` beside ``path`` and rename it into place; a crash leaves the old file or none."""
    content = data.encode() if isinstance(data, str) else data
    build_atomically(path, lambda temporary: temporary.write_bytes(content))


def build_atomically(path: Path, build: Callable[[Path], object]) -> None:
    """Let ``build`` write a temporary file beside ``path``, flush it to disk, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        build(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep colleagues from reading a run folder
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
