"""The credentials of the server and of the sites: reading and checking them; writing private files.

    server/  server.crt, server.key         for the port that sites call; names and addresses as given
             superlink.crt, superlink.key   for the SuperLink behind the proxy; loopback's names only
             signing.crt, signing.key       signs requests (`signing.py`)
    ward-7/  ca.crt                         the only authority that the site trusts
             site.crt, site.key             for the proxy in front of Flower
             node.key, node.pub             for Flower: a second check, after the proxy's
             signing.key                    signs responses; the server has signing.pub
             README.txt

Reading checks what would otherwise fail later with an obscure error: that the files exist and only their owner can
read them, that keys belong to their certificates, that the authority signed the certificates, that the node key is a
pair and that of the site in the certificate, and that certificates are valid now. ``notices`` has a line for each
certificate that will expire soon; the commands log these lines when they start.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedferret.core.errors import RunError, UserError
from fedferret.core.files import read_intact, write_atomically
from fedferret.sites import certificates as x
from fedferret.sites.certificates import Clock, Pair, wall_clock
from fedferret.sites.signing_keys import SigningCertificate, read_private, read_public

SITE_FILES = ("ca.crt", "site.crt", "site.key", "node.key", "node.pub", "signing.key", "README.txt")
UNSIGNED = "Insecure: requests and responses are not signed, and anyone on the way can change or repeat them."
WARN_DAYS = 30  # a month: an administrator on holiday still has time to renew
LOOPBACK_DAYS = 3650  # the key never leaves the machine and signs nothing else: no reason to renew it

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


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
        """Return the path of each site's public node key, by site name.

        Raises:
            UserError: if a key is damaged, or names another site than its folder.
        """
        found = {}
        for path in sorted(self.folder.glob("sites/*/node.pub")):
            name, remedy = path.parent.name, "copy it again from the folder of `fedferret pki`"
            try:
                owner = x.node_key_owner(content_of(path, remedy))
            except ValueError as error:
                raise UserError(f"{path} is no node key ({error}): {remedy}") from None
            if owner != name:
                raise UserError(f"{path} is the node key of {owner}: {remedy}")
            found[name] = path
        return found


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
    again = f"unpack the archive that the server's administrator sent ({what} are incomplete)"
    needed = [name for name in SITE_FILES if name not in ("signing.key", "README.txt")]
    files = {name: content_of(folder / name, again) for name in needed}
    pair = Pair(files["site.crt"], files["site.key"])
    if not (folder / "signing.key").exists():
        raise UserError(without_signing_key(str(folder), name_in(files["site.crt"])))
    for private in (folder, folder / "site.key", folder / "node.key", folder / "signing.key"):
        check_private(private)
    _check_signing(lambda: read_private(content_of(folder / "signing.key", again)), folder / "signing.key")
    name = check_pair(pair, files["ca.crt"], folder / "site.crt")
    try:
        owner = x.node_key_owner(files["node.pub"], files["node.key"])
    except ValueError as error:
        raise UserError(f"{folder / 'node.key'}: {error}: unpack the newest archive again") from None
    if owner != name:
        raise UserError(
            f"{folder / 'node.pub'} is the node key of {owner}, and site.crt the certificate of {name}: unpack the "
            f"newest archive again"
        )
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
    made = "make it with `fedferret pki init`"
    authority, revoked = content_of(folder / "ca.crt", made), content_of(folder / "revoked.crl", made)
    try:
        x.read_revocations(revoked)
    except ValueError as error:
        remedy = "copy it again from where `fedferret pki` runs"
        raise UserError(f"{folder / 'revoked.crl'} cannot be read as PEM ({error}): {remedy}") from None
    notices = check_time(authority, "the authority", "make a new authority, and send every site new credentials", clock)
    for name in ("server", "superlink"):
        pair = Pair(*(content_of(folder / "server" / f"{name}.{end}", made) for end in ("crt", "key")))
        check_private(folder / "server" / f"{name}.key")
        check_pair(pair, authority, folder / "server" / f"{name}.crt", "run `fedferret pki renew server`")
        notices += check_time(pair.certificate, "the server's certificate", "run `fedferret pki renew server`", clock)
    notices += _check_signing_pair(folder / "server", authority, clock)
    hosts = tuple(x.hosts_of((folder / "server" / "server.crt").read_bytes()))
    credentials = ServerCredentials(folder, hosts, tuple(dict.fromkeys(notices)))
    for path in credentials.signing_keys().values():
        _check_signing(partial(read_public, path.read_bytes()), path)
    return credentials


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
    if not NAME.fullmatch(name):
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
    try:
        now, begin, until = clock(), x.valid_from(certificate), x.valid_until(certificate)
    except ValueError as error:
        raise UserError(f"{what} cannot be read as PEM ({error}): {remedy}") from None
    if now < begin:
        raise UserError(f"{what} is valid only from {begin:%Y-%m-%d %H:%M} UTC: check this machine's clock")
    if now >= until:
        raise UserError(f"{what} expired on {until:%Y-%m-%d}: {remedy}")
    days = (until - now).days
    return [f"{what} expires in {days} days, on {until:%Y-%m-%d}: {remedy}"] if days < WARN_DAYS else []


def private_folder(path: Path) -> None:
    """Make a folder that only its owner can enter.

    Raises:
        UserError: if the folder exists and others can enter it, or there is a file of that name.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path} is a file: give a folder") from None
    check_private(path)


def write_private(path: Path, content: bytes) -> None:
    """Write a file atomically, readable only by its owner.

    Args:
        path: the file; its folder exists.
        content: the file's bytes.
    """
    write_atomically(path, content, private=True)


def content_of(path: Path, remedy: str) -> bytes:
    """Return the content of a file that must be there.

    Args:
        path: the file.
        remedy: what the operator has to do, in messages.
    Raises:
        UserError: if the file is missing or cannot be read.
    """
    try:
        return read_intact(path, remedy)
    except RunError as error:
        raise UserError(str(error)) from None


def check_pair(pair: Pair, authority: bytes, path: Path, remedy: str = "unpack the newest archive again") -> str:
    """Return the common name in a certificate that belongs to its key and to the authority.

    Args:
        pair: certificate and key.
        authority: the authority's certificate, PEM.
        path: of the certificate, in messages.
        remedy: what the operator has to do, in messages.
    Raises:
        UserError: for files that cannot be read or do not belong together.
    """
    try:
        matches, signed, name = (
            x.key_matches(pair),
            x.signed_by(pair.certificate, authority),
            x.common_name(pair.certificate),
        )
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"{path} or its key cannot be read as PEM ({error}): {remedy}") from None
    if not matches:
        raise UserError(f"{path} and its key do not belong together: {remedy}")
    if not signed:
        raise UserError(f"{path} was not signed by the authority in ca.crt: {remedy}")
    return name


def name_in(certificate: bytes) -> str:
    """Return the common name; "nobody" for an invalid certificate, which a check of the pair reports."""
    try:
        return x.common_name(certificate)
    except (ValueError, IndexError):
        return "nobody"


def without_signing_key(what: str, name: str) -> str:
    """Return why credentials of an earlier version are refused, and the command that renews them.

    Args:
        what: the folder or archive.
        name: of the site.
    """
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
    older = f"an earlier fedferret made this folder, without keys that sign requests; {remedy}"
    pair = Pair(*(content_of(folder / f"signing.{end}", older) for end in ("crt", "key")))
    check_private(folder / "signing.key")
    try:
        signed = SigningCertificate.of(pair).signed_by(authority)
    except ValueError as error:
        raise UserError(f"{folder / 'signing.crt'} or its key cannot be used ({error}): {remedy}") from None
    if not signed:
        raise UserError(f"{folder / 'signing.crt'} was not signed by the authority in ca.crt: {remedy}")
    return check_time(pair.certificate, "the certificate of the server's signing key", remedy, clock)
