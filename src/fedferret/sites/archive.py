"""A site's credentials as one file: packing them, and unpacking them so that a bad archive damages nothing.

ward-7.tar  ->  a folder beside the site's credentials  ->  all checks of ``credentials.py``  ->  swapped as a whole
"""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.core.files import flush, make_folder
from fedferret.sites.certificates import Clock, wall_clock
from fedferret.sites.credentials import (
    NAME,
    SITE_FILES,
    SiteCredentials,
    check_private,
    content_of,
    name_in,
    read_site,
    without_signing_key,
    write_private,
)

_LARGEST = 1 << 16  # bytes; the largest file in an archive of ours has some 1,500


def pack(folder: Path) -> bytes:
    """Return a tar archive of the credentials in ``folder``, with mode 600; other files are left out."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in SITE_FILES:
            content = (folder / name).read_bytes()
            entry = tarfile.TarInfo(f"{folder.name}/{name}")
            entry.size, entry.mode, entry.mtime = len(content), 0o600, int((folder / name).stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def unpack(archive: Path, into: Path, clock: Clock = wall_clock, name: str = "") -> SiteCredentials:
    """Unpack an archive of :func:`pack` and check the credentials; newer ones replace older ones as a whole.

    Archives are untrusted: one with any other file is refused, and what is in ``into`` stays until everything in the
    archive has been checked in a folder beside it.

    Args:
        archive: the tar file.
        into: the folder to write to; files of it that are not in archives are kept.
        clock: returns the time, UTC.
        name: of the site that the credentials must be for; "": any.
    Raises:
        UserError: for another kind of file, credentials of another site than ``name`` or those in ``into``, or invalid
            ones.
    """
    files, named = _read_archive(archive)
    make_folder(into.parent, private=True)
    for abandoned in into.parent.glob(f".{into.name}.*.new"):  # left by a process that was killed
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name}.", suffix=".new") as temporary:
        building = Path(temporary).resolve() / "credentials"
        building.mkdir(mode=0o700)
        for file, content in files.items():
            write_private(building / file, content)
        try:
            known = read_site(building, clock)
        except UserError as error:
            raise UserError(f"{archive}: {str(error).replace(f'{building}/', '')}") from None
        if named != known.name:
            raise UserError(f"{archive}: its folder is called {named}, and its credentials are those of {known.name}")
        if name and known.name != name:
            raise UserError(f"--name {name}: {archive} holds the credentials of {known.name}; give those of {name}")
        _swap(building, into, Path(temporary) / "before", f"{archive} those of", known.name)
    return read_site(into, clock)


def _swap(building: Path, into: Path, before: Path, given: str, name: str) -> None:
    """Put the folder ``building`` in the place of ``into``, which goes to ``before``."""
    if into.exists():
        check_private(into)
        old = into / "site.crt"
        if old.exists() and (holder := name_in(content_of(old, "remove it"))) not in (name, "nobody"):
            raise UserError(f"{into} holds the credentials of {holder}, {given} {name}: give another folder")
        for path in into.iterdir():
            if path.name not in SITE_FILES and path.is_file():
                shutil.copy2(path, building / path.name, follow_symlinks=False)
        into.rename(before)
    building.rename(into)
    flush(into.parent)


def _read_archive(archive: Path) -> tuple[dict[str, bytes], str]:
    """The files in an archive by name, and the name of their folder. Raises UserError."""
    wrong = UserError(f"{archive}: not an archive of a site's credentials, as `fedferret pki issue` makes them")
    files: dict[str, bytes] = {}
    folders: set[str] = set()
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.partition("/")
                if not (member.isfile() and member.size <= _LARGEST and name in SITE_FILES and NAME.fullmatch(folder)):
                    raise wrong
                file = tar.extractfile(member)
                assert file is not None  # only of folders and the like
                files[name] = file.read()
                folders.add(folder)
    except FileNotFoundError:
        raise UserError(f"there is no file {archive}") from None
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise error if isinstance(error, UserError) else wrong from None
    if set(SITE_FILES) - set(files) == {"signing.key"}:
        raise UserError(without_signing_key(str(archive), name_in(files["site.crt"])))
    if set(files) != set(SITE_FILES) or len(folders) != 1:
        raise wrong
    return files, folders.pop()
