"""The folder of `fedferret pki`: an authority, the server's certificates, and each site's credentials.

    pki/ca.crt, ca.key    the authority; its key signs here and is in no archive
        revoked.crl       the certificates that the proxy refuses
        issued/           every certificate ever signed, by serial number: revoking a site revokes all of them
        server/           see ``credentials.py``, for the next two as well
        sites/ward-7/     a site's credentials
        sites/ward-7.tar  the same as one file, to send to the site

Existing files are never overwritten, except by ``renew``, which replaces a site's certificate and keeps its node key
(Flower identifies the site by it) and its signing key (a running server knows the site by it). Renewing the server's
replaces the key that signs requests too. ``revoke`` deletes the keys and lists every certificate of the name as
revoked. The name can then be issued again, with new keys.

Serving needs ``ca.crt``, ``revoked.crl``, ``server/`` and ``sites/*/*.pub``; ``ca.key`` can be kept elsewhere.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path

from fedferret.core.errors import UserError, nearest
from fedferret.sites import certificates as x
from fedferret.sites import credentials
from fedferret.sites.archive import pack
from fedferret.sites.certificates import Clock, Pair, wall_clock
from fedferret.sites.signing_keys import public_of, signing_key

SERVER = "server"
SIGNER = "server-signing"  # the common name in the certificate of the key that signs requests
RESERVED = (SERVER, "superlink", SIGNER)
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,62}")


@dataclass(frozen=True)
class Validity:
    """Validity of certificates, in days."""

    authority: int = 3650  # longer than any study: a new authority means new credentials for every site on one day
    certificate: int = 365  # a site that left without being revoked loses access within a year; renewing is one file


@dataclass(frozen=True)
class CertificateStatus:
    """The status of one certificate."""

    name: str
    serial: int
    days_left: int
    revoked: bool


class Authority:
    """The folder of `fedferret pki`, with the authority's key."""

    def __init__(self, folder: Path, clock: Clock = wall_clock, validity: Validity | None = None) -> None:
        """Open a folder that :meth:`create` made.

        Args:
            folder: the folder of `fedferret pki`.
            clock: returns the time, UTC.
            validity: of new certificates.
        Raises:
            UserError: if the authority is missing, readable by others or not valid now.
        """
        self.folder, self._clock, self._validity = folder.resolve(), clock, validity or Validity()
        key = self.folder / "ca.key"
        if not key.exists():
            raise UserError(f"{self.folder} has no authority's key (ca.key): make one with `fedferret pki init`")
        for private in (self.folder, key):
            credentials.check_private(private)
        copy, remedy = "restore it from a copy", "make a new authority in another folder, and send every site new ones"
        certificate = self.folder / "ca.crt"
        self._pair = Pair(credentials.content_of(certificate, copy), credentials.content_of(key, copy))
        credentials.check_pair(self._pair, self._pair.certificate, certificate, copy)
        self.notices = credentials.check_time(self._pair.certificate, "the authority", remedy, clock)

    @classmethod
    def create(
        cls,
        folder: Path,
        hosts: Sequence[str],
        title: str = "fedferret",
        clock: Clock = wall_clock,
        validity: Validity | None = None,
    ) -> Authority:
        """Make the folder, the authority and the server's certificates.

        Args:
            folder: new or empty.
            hosts: every name and address under which sites will call the server.
            title: the federation's name, in every certificate.
            clock: returns the time, UTC.
            validity: of new certificates.
        Raises:
            UserError: for an invalid host or title, or a folder that is not empty.
        """
        hosts, validity = _check_hosts(hosts), validity or Validity()
        if not _TITLE.fullmatch(title):
            raise UserError(
                f'"{title}" cannot name a federation: use up to 63 letters, digits, spaces, ".", "_" and "-"'
            )
        folder = folder.resolve()
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not overwritten: choose another folder")
        credentials.private_folder(folder)
        pair = x.authority(title, validity.authority, clock())
        credentials.write_private(folder / "ca.key", pair.key)
        credentials.write_private(folder / "ca.crt", pair.certificate)
        made = cls(folder, clock, validity)
        made._write_revocations({})
        made._certify_server(hosts)
        return made

    def issue(self, name: str) -> Path:
        """Make a site's certificate, node key and signing key, and return the archive to send.

        Raises:
            UserError: for an invalid, reserved or existing name.
        """
        site = self._site(credentials.check_name(name))
        if name in RESERVED:
            raise UserError(f'"{name}" is reserved for the server: choose another name for the site')
        if site.exists():
            raise UserError(
                f"{site} exists and is not overwritten: `fedferret pki renew {name}` makes a new certificate"
            )
        credentials.private_folder(site.parent)
        with tempfile.TemporaryDirectory(dir=site.parent, prefix=f".{name}.") as temporary:
            building = Path(temporary) / name
            building.mkdir(mode=0o700)
            private, public = x.node_key(name)
            credentials.write_private(building / "node.key", private)
            credentials.write_private(building / "node.pub", public)
            self._certify_site(building)
            building.rename(site)
        return self._archive(site)

    def renew(self, name: str, hosts: Sequence[str] = ()) -> Path:
        """Make a new certificate for a site or the server.

        Args:
            name: a site's name, or "server".
            hosts: the server's new names and addresses; none: as before.
        Returns:
            The archive to send, or the server's folder.
        Raises:
            UserError: for an unknown site, or hosts for a site.
        """
        if name == SERVER:
            known = x.hosts_of((self.folder / SERVER / "server.crt").read_bytes())
            self._certify_server(_check_hosts(hosts or known))
            return self.folder / SERVER
        if hosts:
            raise UserError(f'{name} is a site, and nothing calls sites: hosts are only for "{SERVER}"')
        site = self._known_site(name)
        self._certify_site(site)
        return self._archive(site)

    def revoke(self, name: str) -> int:
        """Revoke every certificate of a site, delete the site's keys, and return how many were revoked.

        Raises:
            UserError: for an unknown site.
        """
        site = self._known_site(name)
        revoked, now = self._revoked(), self._clock()
        mine = [serial for serial, certificate in self._issued().items() if x.common_name(certificate) == name]
        fresh = [serial for serial in mine if serial not in revoked]
        self._write_revocations({**revoked, **dict.fromkeys(fresh, now)})
        site.with_suffix(".tar").unlink(missing_ok=True)
        shutil.rmtree(site)
        return len(fresh)

    def statuses(self) -> list[CertificateStatus]:
        """Return the status of the authority and of every certificate ever signed, by name, newest first."""
        now, revoked = self._clock(), self._revoked()

        def status_of(certificate: bytes) -> CertificateStatus:
            serial = x.serial_number(certificate)
            left = (x.valid_until(certificate) - now).days
            return CertificateStatus(x.common_name(certificate), serial, left, serial in revoked)

        newest_first = sorted(self._issued().values(), key=x.valid_from, reverse=True)
        by_name = sorted(map(status_of, newest_first), key=lambda one: one.name)  # a stable sort
        return [status_of(self._pair.certificate), *by_name]

    def _certify_server(self, hosts: Sequence[str]) -> None:
        folder = self.folder / SERVER
        credentials.private_folder(folder)
        for name, names in ((SERVER, hosts), ("superlink", x.LOOPBACK)):
            pair = self._certified(name, x.SERVER_AUTH, names)
            credentials.write_private(folder / f"{name}.key", pair.key)
            credentials.write_private(folder / f"{name}.crt", pair.certificate)
        before = folder / "signing.crt"
        after = x.valid_from(before.read_bytes()) if before.exists() else None
        pair = self._certified(SIGNER, x.SIGNING, after=after)
        credentials.write_private(folder / "signing.key", pair.key)
        credentials.write_private(before, pair.certificate)

    def _certify_site(self, site: Path) -> None:
        pair = self._certified(site.name, x.CLIENT_AUTH)
        host = x.hosts_of((self.folder / SERVER / "server.crt").read_bytes())[0]
        until = f"{x.valid_until(pair.certificate):%Y-%m-%d}"
        credentials.write_private(site / "ca.crt", self._pair.certificate)
        credentials.write_private(site / "site.key", pair.key)
        credentials.write_private(site / "site.crt", pair.certificate)
        key = site / "signing.key"
        if not key.exists():  # issued now, or by a fedferret that signed no messages
            credentials.write_private(key, signing_key())
        credentials.write_private(site / "signing.pub", public_of(key.read_bytes()))
        readme = _README.format(name=site.name, host=host, until=until)
        credentials.write_private(site / "README.txt", readme.encode())

    def _certified(self, name: str, usage: x.Usage, hosts: Sequence[str] = (), after: datetime | None = None) -> Pair:
        pair = x.certificate(self._pair, name, usage, self._validity.certificate, self._clock(), hosts, after)
        issued = self.folder / "issued"
        credentials.private_folder(issued)
        credentials.write_private(issued / f"{x.serial_number(pair.certificate):040x}.crt", pair.certificate)
        return pair

    def _archive(self, site: Path) -> Path:
        archive = site.with_suffix(".tar")
        credentials.write_private(archive, pack(site))
        return archive

    def _write_revocations(self, revoked: dict[int, datetime]) -> None:
        content = x.revocations(self._pair, revoked, self._clock())
        credentials.write_private(self.folder / "revoked.crl", content)

    def _revoked(self) -> dict[int, datetime]:
        path, remedy = self.folder / "revoked.crl", "restore it from a copy, the server's for instance"
        try:
            return x.read_revocations(credentials.content_of(path, remedy))
        except ValueError as error:
            raise (
                error
                if isinstance(error, UserError)
                else UserError(f"{path} cannot be read as PEM ({error}): {remedy}")
            ) from None

    def _issued(self) -> dict[int, bytes]:
        return {int(path.stem, 16): path.read_bytes() for path in (self.folder / "issued").glob("*.crt")}

    def _site(self, name: str) -> Path:
        return self.folder / "sites" / name

    def _known_site(self, name: str) -> Path:
        site = self._site(credentials.check_name(name))
        if not site.exists():
            known = [path.name for path in site.parent.glob("*") if path.is_dir()]
            hint = nearest(name, known) if known else "none has been issued so far"
            raise UserError(f'no site is called "{name}": {hint}')
        return site


def _check_hosts(hosts: Sequence[str]) -> list[str]:
    if not hosts:
        raise UserError(
            "give every name and address under which sites call the server: --host fed.example.org --host 192.0.2.7"
        )
    return [_check_host(host) for host in hosts]


def _check_host(host: str) -> str:
    try:
        return str(ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host.lower()):
            raise UserError(
                f'"{host}": give a host name (ASCII) or an IP address, without a port: fed.example.org or 192.0.2.7'
            ) from None
        return host.lower()


_README = """\
Credentials of {name}, until {until}

With these files {name}, and nobody else, can take part in a federated run. To the server, whoever has the three keys
is {name}: only the account that runs fedferret may read this folder. Send it to nobody.

  ca.crt      the authority that certifies the server
  site.crt    your identity for the server's port; with its key, site.key
  node.pub    your identity for Flower, behind the port; with its key, node.key
  signing.key signs what you send; the server has its public key

To take part, with fedferret installed (pip install "fedferret[flower]"):

  fedferret join {host}:8443 --data YOUR-FILE.jsonl --name {name} --credentials THIS-FOLDER-OR-ARCHIVE

Your machine calls the server; you need not open a port. Your data stays in your file: the site's audit.jsonl records
what is sent, and how many bytes. If others may have seen a key, tell the server's administrator at once. The
administrator revokes it and sends you a new archive.
"""
