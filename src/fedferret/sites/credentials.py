"""The files that let a server be trusted and a site in: read, checked, unpacked; and how private files are written.

    server/  server.crt, server.key         for the port that sites call; names and addresses as given
             superlink.crt, superlink.key   for Flower behind it, loopback's names alone
    ward-7/  ca.crt                         whom the site trusts; all else would let others be its server
             site.crt, site.key             what the proxy in front of Flower asks for
             node.key, node.pub             what Flower itself asks for, a lock of its own behind the first
             README.txt

Reading checks everything that would otherwise fail later and obscurely: that the files are there and nobody else can
read them, that keys belong to their certificates, who signed, for what use, and that the time is right. What will
expire soon is said in ``notices``, a line each, for the commands to show when they start.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.sites import certificates as x
from fedferret.sites.certificates import Clock, Pair, wall_clock

SITE_FILES = ("ca.crt", "site.crt", "site.key", "node.key", "node.pub", "README.txt")
WARN_DAYS = 30  # a month: an administrator on holiday still has time to renew
LOOPBACK_DAYS = 3650  # never leaves the machine and signs nothing else: there is no reason to renew it

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LARGEST = 1 << 16  # bytes; the largest file of an archive that anybody made with us has some 1,500


@dataclass(frozen=True)
class SiteCredentials:
    """A site's folder, checked."""

    name: str
    folder: Path
    notices: tuple[str, ...]

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        return self.folder / "site.crt"

    @property
    def key(self) -> Path:
        return self.folder / "site.key"

    @property
    def node_key(self) -> Path:
        """For ``flower-supernode --auth-supernode-private-key``."""
        return self.folder / "node.key"

    @property
    def node_public_key(self) -> Path:
        """For ``flwr supernode register``, at the server."""
        return self.folder / "node.pub"


@dataclass(frozen=True)
class ServerCredentials:
    """What serving needs of the folder that ``fedferret pki`` keeps; the authority's key is not among it."""

    folder: Path
    hosts: tuple[str, ...]
    notices: tuple[str, ...]

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def revocations(self) -> Path:
        return self.folder / "revoked.crl"

    @property
    def proxy(self) -> tuple[Path, Path]:
        """Certificate and key of the port that sites call."""
        return self.folder / "server" / "server.crt", self.folder / "server" / "server.key"

    @property
    def superlink(self) -> tuple[Path, Path]:
        """Certificate and key of Flower's own port, on loopback."""
        return self.folder / "server" / "superlink.crt", self.folder / "server" / "superlink.key"

    def node_public_keys(self) -> dict[str, Path]:
        """The sites there are, and the public keys to register with Flower."""
        return {path.parent.name: path for path in sorted(self.folder.glob("sites/*/node.pub"))}


def read_site(folder: Path, clock: Clock = wall_clock) -> SiteCredentials:
    """Check a site's folder. Raises :class:`UserError`."""
    folder = folder.resolve()
    what = f"the credentials in {folder}"
    for name in ("ca.crt", "site.crt", "site.key", "node.key", "node.pub"):
        _check_there(folder / name, f"unpack the archive that the server's administrator sent ({what} are incomplete)")
    for private in (folder, folder / "site.key", folder / "node.key"):
        check_private(private)
    authority = (folder / "ca.crt").read_bytes()
    pair = Pair((folder / "site.crt").read_bytes(), (folder / "site.key").read_bytes())
    name = _check_pair(pair, authority, folder / "site.crt")
    remedy = "ask the server's administrator for `fedferret pki renew`"
    notices = check_time(pair.certificate, f"the certificate of {name}", remedy, clock)
    return SiteCredentials(name, folder, tuple(notices))


def read_server(folder: Path, clock: Clock = wall_clock) -> ServerCredentials:
    """Check the server's part of the folder of ``fedferret pki``. Raises :class:`UserError`."""
    folder = folder.resolve()
    for name in ("ca.crt", "revoked.crl", "server/server.crt", "server/server.key"):
        _check_there(folder / name, "make it with `fedferret pki init`")
    authority = (folder / "ca.crt").read_bytes()
    notices = check_time(authority, "the authority", "make a new one, and send every site new credentials", clock)
    for name in ("server", "superlink"):
        check_private(folder / "server" / f"{name}.key")
        pair = Pair(*((folder / "server" / f"{name}.{end}").read_bytes() for end in ("crt", "key")))
        _check_pair(pair, authority, folder / "server" / f"{name}.crt")
        notices += check_time(pair.certificate, "the server's certificate", "give `fedferret pki renew server`", clock)
    hosts = tuple(x.hosts_of((folder / "server" / "server.crt").read_bytes()))
    return ServerCredentials(folder, hosts, tuple(dict.fromkeys(notices)))


def pack(folder: Path) -> bytes:
    """A site's folder as a tar archive: its files, readable by their owner alone, nothing else that may lie there."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in SITE_FILES:
            content = (folder / name).read_bytes()
            entry = tarfile.TarInfo(f"{folder.name}/{name}")
            entry.size, entry.mode, entry.mtime = len(content), 0o600, int((folder / name).stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def unpack(archive: Path, into: Path, clock: Clock = wall_clock) -> SiteCredentials:
    """Unpack what :func:`pack` made into the folder ``into`` and check it; newer credentials replace older ones.

    An archive comes from outside: only the files of a site are taken, whatever else it holds is refused, and nothing
    is written anywhere but directly in ``into``. Raises :class:`UserError`.
    """
    wrong = UserError(f"{archive} is no archive of a site's credentials, as `fedferret pki issue` makes them")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.partition("/")
                if not (member.isfile() and member.size <= _LARGEST and name in SITE_FILES and _NAME.fullmatch(folder)):
                    raise wrong
                file = tar.extractfile(member)
                assert file is not None  # only of folders and the like
                files[name] = file.read()
    except FileNotFoundError:
        raise UserError(f"there is no file {archive}") from None
    except (tarfile.TarError, OSError, EOFError):
        raise wrong from None
    if set(files) != set(SITE_FILES):
        raise wrong
    private_folder(into)
    before, now = into / "site.crt", files["site.crt"]
    if before.exists() and (whose := _name_in(before.read_bytes())) != _name_in(now):
        raise UserError(
            f"{into} holds the credentials of {whose}, {archive} those of {_name_in(now)}: give another folder"
        )
    for name, content in files.items():
        write_private(into / name, content)
    return read_site(into, clock)


def loopback(folder: Path, clock: Clock = wall_clock) -> tuple[Path, Path]:
    """Certificate and key for this machine's own connections, made once in ``folder`` and kept there."""
    certificate, key = folder / "loopback.crt", folder / "loopback.key"
    if not (certificate.exists() and key.exists() and clock() < x.valid_until(certificate.read_bytes())):
        pair = x.loopback_certificate(LOOPBACK_DAYS, clock())
        write_private(key, pair.key)
        write_private(certificate, pair.certificate)
    return certificate, key


def check_name(name: str) -> str:
    """``name`` if it may be a site's: it becomes a folder, a host name and an argument. Raises :class:`UserError`."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f'"{name}" cannot be the name of a site: use 1 to 63 of a-z, 0-9 and "-", not at either end, as in ward-7'
        )
    return name


def check_private(path: Path) -> None:
    """Raises :class:`UserError` if anybody but its owner can read the file or enter the folder."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        wanted = "700" if path.is_dir() else "600"
        raise UserError(f"{path} can be read by others (mode {mode:o}); give: chmod {wanted} {path}")


def check_time(certificate: bytes, whose: str, remedy: str, clock: Clock = wall_clock) -> list[str]:
    """A line if it expires within ``WARN_DAYS``. Raises :class:`UserError` if it is not valid now."""
    now, until = clock(), x.valid_until(certificate)
    if now < (begin := x.valid_from(certificate)):
        raise UserError(f"{whose} is valid only from {begin:%Y-%m-%d %H:%M} UTC: is this machine's clock right?")
    if now >= until:
        raise UserError(f"{whose} expired on {until:%Y-%m-%d}: {remedy}")
    days = (until - now).days
    return [f"{whose} expires in {days} days, on {until:%Y-%m-%d}: {remedy}"] if days < WARN_DAYS else []


def private_folder(path: Path) -> None:
    """Make a folder that its owner alone can enter; one that others can enter is refused."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(path)


def write_private(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, that its owner alone can read."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # with mode 600 from the start
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _check_there(path: Path, remedy: str) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing: {remedy}")


def _name_in(certificate: bytes) -> str:
    """Whose it is; "nobody" for what is no certificate, which the check after unpacking names."""
    try:
        return x.common_name(certificate)
    except ValueError:
        return "nobody"


def _check_pair(pair: Pair, authority: bytes, path: Path) -> str:
    """The name in the certificate. Raises :class:`UserError` for files that do not belong together."""
    try:
        belongs, signed, name = (
            x.belongs(pair),
            x.signed_by(pair.certificate, authority),
            x.common_name(pair.certificate),
        )
    except ValueError as error:
        raise UserError(f"{path} or its key cannot be read as PEM: {error}") from None
    if not belongs:
        raise UserError(f"{path} and the key beside it do not belong together: unpack the newest archive again")
    if not signed:
        raise UserError(f"{path} was not signed by the authority in ca.crt: unpack the newest archive again")
    return name
