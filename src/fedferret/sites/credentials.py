"""The credentials of the server and of the sites: reading, checking and unpacking them; writing private files.

    server/  server.crt, server.key         for the port that sites call; names and addresses as given
             superlink.crt, superlink.key   for the SuperLink behind the proxy; loopback's names only
             signing.crt, signing.key       signs requests (`signing.py`)
    ward-7/  ca.crt                         the only authority that the site trusts
             site.crt, site.key             for the proxy in front of Flower
             node.key, node.pub             for Flower: a second check, after the proxy's
             signing.key                    signs responses; the server has signing.pub
             README.txt

Reading checks what would otherwise fail later with an obscure error: that the files exist and only their owner can
read them, that keys belong to their certificates, that the authority signed the certificates, and that they are valid
now. ``notices`` has a line for each certificate that will expire soon; the commands log these lines when they start.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.sites import certificates as x
from fedferret.sites.certificates import Clock, Pair, wall_clock
from fedferret.sites.signing_keys import SigningCertificate, read_private, read_public

SITE_FILES = ("ca.crt", "site.crt", "site.key", "node.key", "node.pub", "signing.key", "README.txt")
UNSIGNED = "Insecure: requests and responses are not signed, and anyone on the way can change or repeat them."
WARN_DAYS = 30  # a month: an administrator on holiday still has time to renew
LOOPBACK_DAYS = 3650  # the key never leaves the machine and signs nothing else: no reason to renew it

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LARGEST = 1 << 16  # bytes; the largest file in an archive of ours has some 1,500


@dataclass(frozen=True)
class SiteCredentials:
    """A site's credentials, checked."""

    name: str
    folder: Path
    notices: tuple[str, ...]  # a line for each certificate that expires soon

    @property
    def authority(self) -> Path:
        """The certificate of the authority that the site trusts."""
        return self.folder / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The site's certificate."""
        return self.folder / "site.crt"

    @property
    def key(self) -> Path:
        """The private key of the site's certificate."""
        return self.folder / "site.key"

    @property
    def node_key(self) -> Path:
        """The private key for ``flower-supernode --auth-supernode-private-key``."""
        return self.folder / "node.key"

    @property
    def node_public_key(self) -> Path:
        """The public key that the server registers with the SuperLink."""
        return self.folder / "node.pub"

    @property
    def signing_key(self) -> Path:
        """The private key that signs responses."""
        return self.folder / "signing.key"


@dataclass(frozen=True)
class ServerCredentials:
    """The files of `fedferret pki` that serving needs, checked; the authority's key is not among them."""

    folder: Path
    hosts: tuple[str, ...]  # names and addresses in the server's certificate
    notices: tuple[str, ...]  # a line for each certificate that expires soon

    @property
    def authority(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    @property
    def revocations(self) -> Path:
        """The certificate revocation list (CRL)."""
        return self.folder / "revoked.crl"

    @property
    def proxy(self) -> tuple[Path, Path]:
        """Certificate and key of the port that sites call."""
        return self.folder / "server" / "server.crt", self.folder / "server" / "server.key"

    @property
    def superlink(self) -> tuple[Path, Path]:
        """Certificate and key of the SuperLink's port, on loopback."""
        return self.folder / "server" / "superlink.crt", self.folder / "server" / "superlink.key"

    @property
    def signing(self) -> tuple[Path, Path]:
        """Certificate and key that sign requests."""
        return self.folder / "server" / "signing.crt", self.folder / "server" / "signing.key"

    def signing_keys(self) -> dict[str, Path]:
        """Return the path of each site's public signing key, by site name."""
        return {path.parent.name: path for path in sorted(self.folder.glob("sites/*/signing.pub"))}

    def node_public_keys(self) -> dict[str, Path]:
        """Return the path of each site's public node key, by site name."""
        return {path.parent.name: path for path in sorted(self.folder.glob("sites/*/node.pub"))}


def read_site(folder: Path, clock: Clock = wall_clock) -> SiteCredentials:
    """Check the credentials of a site.

    Args:
        folder: the site's credentials, unpacked.
        clock: returns the time, UTC.
    Raises:
        UserError: if a file is missing, readable by others, invalid now, or of another authority.
    """
    folder = folder.resolve()
    what = f"the credentials in {folder}"
    for name in ("ca.crt", "site.crt", "site.key", "node.key", "node.pub"):
        _check_there(folder / name, f"unpack the archive that the server's administrator sent ({what} are incomplete)")
    name = _name_in((folder / "site.crt").read_bytes())
    if not (folder / "signing.key").exists():
        raise UserError(_without_signing_key(str(folder), name))
    for private in (folder, folder / "site.key", folder / "node.key", folder / "signing.key"):
        check_private(private)
    _check_signing(lambda: read_private((folder / "signing.key").read_bytes()), folder / "signing.key")
    authority = (folder / "ca.crt").read_bytes()
    pair = Pair((folder / "site.crt").read_bytes(), (folder / "site.key").read_bytes())
    name = _check_pair(pair, authority, folder / "site.crt")
    remedy = "ask the server's administrator for `fedferret pki renew`"
    notices = check_time(pair.certificate, f"the certificate of {name}", remedy, clock)
    return SiteCredentials(name, folder, tuple(notices))


def read_server(folder: Path, clock: Clock = wall_clock) -> ServerCredentials:
    """Check the server's part of the folder of `fedferret pki`.

    Args:
        folder: the folder of `fedferret pki`.
        clock: returns the time, UTC.
    Raises:
        UserError: if a file is missing, readable by others, invalid now, or of another authority.
    """
    folder = folder.resolve()
    for name in ("ca.crt", "revoked.crl", "server/server.crt", "server/server.key"):
        _check_there(folder / name, "make it with `fedferret pki init`")
    authority = (folder / "ca.crt").read_bytes()
    notices = check_time(authority, "the authority", "make a new authority, and send every site new credentials", clock)
    for name in ("server", "superlink"):
        check_private(folder / "server" / f"{name}.key")
        pair = Pair(*((folder / "server" / f"{name}.{end}").read_bytes() for end in ("crt", "key")))
        _check_pair(pair, authority, folder / "server" / f"{name}.crt")
        notices += check_time(pair.certificate, "the server's certificate", "run `fedferret pki renew server`", clock)
    notices += _check_signing_pair(folder / "server", authority, clock)
    hosts = tuple(x.hosts_of((folder / "server" / "server.crt").read_bytes()))
    made = ServerCredentials(folder, hosts, tuple(dict.fromkeys(notices)))
    for path in made.signing_keys().values():
        _check_signing(partial(read_public, path.read_bytes()), path)
    return made


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


def unpack(archive: Path, into: Path, clock: Clock = wall_clock) -> SiteCredentials:
    """Unpack an archive of :func:`pack` and check the credentials; newer ones replace older ones.

    Archives are untrusted: one with any other file is refused, and files are written only directly in ``into``.

    Args:
        archive: the tar file.
        into: the folder to write to.
        clock: returns the time, UTC.
    Raises:
        UserError: for another kind of file, credentials of another site than those in ``into``, or invalid ones.
    """
    wrong = UserError(f"{archive}: not an archive of a site's credentials, as `fedferret pki issue` makes them")
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
    if set(SITE_FILES) - set(files) == {"signing.key"}:
        raise UserError(_without_signing_key(str(archive), _name_in(files["site.crt"])))
    if set(files) != set(SITE_FILES):
        raise wrong
    private_folder(into)
    before, now = into / "site.crt", files["site.crt"]
    if before.exists() and (name := _name_in(before.read_bytes())) != _name_in(now):
        raise UserError(
            f"{into} holds the credentials of {name}, {archive} those of {_name_in(now)}: give another folder"
        )
    for name, content in files.items():
        write_private(into / name, content)
    return read_site(into, clock)


def loopback(folder: Path, clock: Clock = wall_clock) -> tuple[Path, Path]:
    """Return certificate and key for connections within this machine; make them where they are missing or expired.

    Args:
        folder: where the files are.
        clock: returns the time, UTC.
    """
    certificate, key = folder / "loopback.crt", folder / "loopback.key"
    if not (certificate.exists() and key.exists() and clock() < x.valid_until(certificate.read_bytes())):
        pair = x.loopback_certificate(LOOPBACK_DAYS, clock())
        write_private(key, pair.key)
        write_private(certificate, pair.certificate)
    return certificate, key


def check_name(name: str) -> str:
    """Return ``name`` if a site can have that name: it becomes a folder, a host name and an argument.

    Raises:
        UserError: unless the name is valid.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f'"{name}" cannot be the name of a site: use 1 to 63 of a-z, 0-9 and "-" (not first or last), as in ward-7'
        )
    return name


def check_private(path: Path) -> None:
    """Check that only the owner can read the file or enter the folder.

    Raises:
        UserError: if others can.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        wanted = "700" if path.is_dir() else "600"
        raise UserError(f"{path} can be read by others (mode {mode:o}); run: chmod {wanted} {path}")


def check_time(certificate: bytes, what: str, remedy: str, clock: Clock = wall_clock) -> list[str]:
    """Check that a certificate is valid now.

    Args:
        certificate: PEM.
        what: the certificate's name in messages.
        remedy: what the operator has to do, in messages.
        clock: returns the time, UTC.
    Returns:
        One line if the certificate expires within ``WARN_DAYS``; otherwise none.
    Raises:
        UserError: if the certificate is not valid now.
    """
    now, until = clock(), x.valid_until(certificate)
    if now < (begin := x.valid_from(certificate)):
        raise UserError(f"{what} is valid only from {begin:%Y-%m-%d %H:%M} UTC: check this machine's clock")
    if now >= until:
        raise UserError(f"{what} expired on {until:%Y-%m-%d}: {remedy}")
    days = (until - now).days
    return [f"{what} expires in {days} days, on {until:%Y-%m-%d}: {remedy}"] if days < WARN_DAYS else []


def private_folder(path: Path) -> None:
    """Make a folder that only its owner can enter.

    Raises:
        UserError: if the folder exists and others can enter it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(path)


def write_private(path: Path, content: bytes) -> None:
    """Write a file atomically, readable only by its owner.

    Args:
        path: the file; its folder exists.
        content: the file's bytes.
    """
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


def _without_signing_key(what: str, name: str) -> str:
    return (
        f"{what} has no signing key, an earlier fedferret made it: ask the server's administrator for "
        f"`fedferret pki renew {name}` and the new archive"
    )


def _check_signing(read: Callable[[], object], path: Path) -> None:
    """Raises UserError for a file that is no signing key."""
    try:
        read()
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a signing key ({error})") from None


def _check_signing_pair(folder: Path, authority: bytes, clock: Clock) -> list[str]:
    """A line if the certificate expires soon. Raises UserError for a pair that cannot sign requests."""
    remedy = "run `fedferret pki renew server`"
    for name in ("signing.crt", "signing.key"):
        _check_there(folder / name, f"an earlier fedferret made this folder, without keys that sign requests; {remedy}")
    check_private(folder / "signing.key")
    pair = Pair((folder / "signing.crt").read_bytes(), (folder / "signing.key").read_bytes())
    try:
        signed = SigningCertificate.of(pair).signed_by(authority)
    except ValueError as error:
        raise UserError(f"{folder / 'signing.crt'} or its key cannot be used ({error}): {remedy}") from None
    if not signed:
        raise UserError(f"{folder / 'signing.crt'} was not signed by the authority in ca.crt: {remedy}")
    return check_time(pair.certificate, "the certificate of the server's signing key", remedy, clock)


def _name_in(certificate: bytes) -> str:
    """The common name; "nobody" for an invalid certificate, which the check after unpacking reports."""
    try:
        return x.common_name(certificate)
    except ValueError:
        return "nobody"


def _check_pair(pair: Pair, authority: bytes, path: Path) -> str:
    """Return the common name. Raises UserError for files that do not belong together."""
    try:
        matches, signed, name = (
            x.key_matches(pair),
            x.signed_by(pair.certificate, authority),
            x.common_name(pair.certificate),
        )
    except ValueError as error:
        raise UserError(f"{path} or its key cannot be read as PEM: {error}") from None
    if not matches:
        raise UserError(f"{path} and its key do not belong together: unpack the newest archive again")
    if not signed:
        raise UserError(f"{path} was not signed by the authority in ca.crt: unpack the newest archive again")
    return name
