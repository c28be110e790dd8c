"""Files that appear whole or not at all, files that may be damaged, and the folder for what can be made again."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedferret.core.errors import RunError, UserError

LONGEST_NAME = 200  # characters of a path in a message
_AT_ONCE = 16  # files that are flushed together; threads only wait here


def cache_folder() -> Path:
    """Where what can be made again is kept between runs.

    Returns:
        ``$FEDFERRET_CACHE``, or ``fedferret`` in the user's cache; it need not exist.
    """
    if chosen := os.environ.get("FEDFERRET_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedferret"


def in_words(error: OSError) -> str:
    """Say what failed, and on which file.

    Args:
        error: of the operating system.

    Returns:
        The file, if the error names one, and the reason; a name that is too long is cut in its middle.
    """
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    name = "" if error.filename is None else os.fsdecode(error.filename)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}…{name[-LONGEST_NAME // 2 :]}"
    return f"{name}: {reason}" if name else reason


def check_place(path: Path) -> None:
    """Find out before long work whether a file or folder can be written.

    Args:
        path: of it; it need not exist, nor the folders above it.

    Raises:
        UserError: the name is too long, what is to be a folder is a file, or nothing may be written there.
    """
    try:
        for place in (path, *path.absolute().parents):
            try:
                os.lstat(place)
            except (FileNotFoundError, NotADirectoryError):
                continue
            if place != path and not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
            if not os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
                raise PermissionError(errno.EACCES, "nothing may be written there", str(place))
            return
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        what = in_words(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"{what}: choose another file or folder to write to") from None


def write_atomically(path: Path, data: bytes | str, *, private: bool = False, flushed: bool = True) -> None:
    """Write ``data`` beside ``path`` and rename it into place; a crash leaves the old file or none.

    Args:
        path: the file; missing folders are made.
        data: the content; text is written as UTF-8.
        private: only the owner may read the file, and enter its folder if that is made; else the umask decides.
        flushed: whether file and folder are on disk when the call returns; else they are after ``flush_all``.
    """
    content = data.encode() if isinstance(data, str) else data
    build_atomically(path, lambda temporary: temporary.write_bytes(content), private=private, flushed=flushed)


def build_atomically(
    path: Path, build: Callable[[Path], object], *, private: bool = False, flushed: bool = True
) -> None:
    """Let ``build`` write a temporary file beside ``path``, rename it into place, and flush file and folder to disk.

    Args:
        path: the file; missing folders are made.
        build: is called with the temporary file, which exists and is empty.
        private: as for ``write_atomically``.
        flushed: as for ``write_atomically``.
    """
    make_folder(path.parent, private=private)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # a name that nobody can have planted, and the mode that the umask gives to any new file
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600 if private else 0o666))
    try:
        build(temporary)
        if flushed:
            flush(temporary)
        os.replace(temporary, path)
        if flushed:
            flush(path.parent)  # a rename is on disk only when its folder is
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path, *, private: bool = False) -> None:
    """Make a folder and those above it, on disk when the call returns.

    Args:
        folder: nothing happens if it exists.
        private: only the owner may enter the folder; else the umask decides, as it does for those above it.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700 if private else 0o777, exist_ok=True)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk.

    Args:
        path: of the file or folder.

    Raises:
        OSError: the disk failed, or the file system cannot flush this file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        if path.is_dir():  # one that may be written to and not read
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # file systems that flush no folders
            raise
    finally:
        os.close(handle)


def flush_all(paths: Collection[Path]) -> None:
    """Wait until these files and their names are on disk: all at once, which takes hardly longer than one of them.

    Args:
        paths: of files.

    Raises:
        OSError: as ``flush``.
    """
    if paths:
        with ThreadPoolExecutor(min(_AT_ONCE, len(paths))) as threads:
            for _ in threads.map(flush, paths):
                pass
        for folder in {path.parent for path in paths}:
            flush(folder)


def read_intact(path: Path, remedy: str) -> bytes:
    """The content of a file that ought to be there.

    Args:
        path: the file.
        remedy: what the user has to do otherwise, for the message.

    Returns:
        All of its bytes.

    Raises:
        RunError: if the file is missing, is no file, or cannot be read.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would wait for ever
        raise RunError(f"{path} is no file: {remedy}")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path} is missing: {remedy}") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from None


def inside(folder: Path, path: Path) -> Path:
    """Refuse a path that a link leads out of its folder: a folder that was sent may point anywhere.

    Args:
        folder: of a run or a comparison; may be a link itself.
        path: below ``folder``; it need not exist.

    Returns:
        ``path``.

    Raises:
        UserError: if the path leads elsewhere.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link that leads out of {folder}: remove the link, it is not followed")
    return path
