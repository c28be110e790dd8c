"""The folder of ``fedferret pki``: an authority, the server's certificates, and what each site is sent.

    pki/ca.crt, ca.key    the authority; its key signs here and is in no archive
        revoked.crl       what the proxy in front of Flower refuses
        issued/           every certificate that was ever signed, by serial number: so that revoking a site revokes all
        server/           see ``credentials.py``, for these too
        sites/ward-7/     what was made for a site
        sites/ward-7.tar  the same as one file: this is what goes to the site

Nothing that exists is written over, except by ``renew``, which keeps a site's node key (Flower knows the site by it)
and replaces its certificate. ``revoke`` forgets the keys and lists every certificate of that name as revoked; the name
can then be issued again, with all keys new.

Serving needs ``ca.crt``, ``revoked.crl``, ``server/`` and ``sites/*/node.pub``; ``ca.key`` can be kept elsewhere.
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
from fedferret.sites.certificates import Clock, Pair, wall_clock

SERVER = "server"
RESERVED = (SERVER, "superlink")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,62}")


@dataclass(frozen=True)
class Validity:
    """For how many days certificates are valid."""

    authority: int = 3650  # longer than any study: a new authority means new credentials at every site on one day
    certificate: int = 365  # a site that left and was forgotten loses its access within the year; renewing is one file


@dataclass(frozen=True)
class CertificateStatus:
    """How one certificate stands."""

    name: str
    serial: int
    days_left: int
    revoked: bool


class Authority:
    """The folder, opened by those who hold the authority's key."""

    def __init__(self, folder: Path, clock: Clock = wall_clock, validity: Validity | None = None) -> None:
        """Open a folder that :meth:`create` made. Raises :class:`UserError`."""
        self.folder, self._clock, self._validity = folder.resolve(), clock, validity or Validity()
        key = self.folder / "ca.key"
        if not key.exists():
            raise UserError(f"{self.folder} holds no authority's key (ca.key): make one with `fedferret pki init`")
        for private in (self.folder, key):
            credentials.check_private(private)
        self._pair = Pair((self.folder / "ca.crt").read_bytes(), key.read_bytes())
        remedy = "make a new one in another folder, and send every site new credentials"
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
        """Make the folder, the authority and the server's certificates. Raises :class:`UserError`.

        ``hosts``: every name and address under which sites will call the server; ``title``: the federation's name.
        """
        hosts, validity = _check_hosts(hosts), validity or Validity()
        if not _TITLE.fullmatch(title):
            raise UserError(
                f'"{title}" cannot name a federation: use up to 63 letters, digits, spaces, ".", "_" and "-"'
            )
        folder = folder.resolve()
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is not written over: choose another folder")
        credentials.private_folder(folder)
        pair = x.authority(title, validity.authority, clock())
        credentials.write_private(folder / "ca.key", pair.key)
        credentials.write_private(folder / "ca.crt", pair.certificate)
        made = cls(folder, clock, validity)
        made._write_revocations({})
        made._certify_server(hosts)
        return made

    def issue(self, name: str) -> Path:
        """Make a site's certificate and node key; the archive to send. Raises :class:`UserError`."""
        site = self._site(credentials.check_name(name))
        if name in RESERVED:
            raise UserError(f'"{name}" is a name of the server\'s own: choose another for the site')
        if site.exists():
            raise UserError(
                f"{site} exists and is not written over: `fedferret pki renew {name}` makes a new certificate"
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
        """Make a site's or the server's certificate anew; the archive to send, or the server's folder.

        ``hosts``: for the server alone, if it is to be called otherwise than before. Raises :class:`UserError`.
        """
        if name == SERVER:
            known = x.hosts_of((self.folder / SERVER / "server.crt").read_bytes())
            self._certify_server(_check_hosts(hosts or known))
            return self.folder / SERVER
        if hosts:
            raise UserError(f'{name} is a site, and sites are not called: hosts are for "{SERVER}" alone')
        site = self._known_site(name)
        self._certify_site(site)
        return self._archive(site)

    def revoke(self, name: str) -> int:
        """Revoke every certificate of a site and forget its keys; how many were revoked. Raises :class:`UserError`."""
        site = self._known_site(name)
        revoked, now = self._revoked(), self._clock()
        mine = [serial for serial, certificate in self._issued().items() if x.common_name(certificate) == name]
        fresh = [serial for serial in mine if serial not in revoked]
        self._write_revocations({**revoked, **dict.fromkeys(fresh, now)})
        site.with_suffix(".tar").unlink(missing_ok=True)
        shutil.rmtree(site)
        return len(fresh)

    def statuses(self) -> list[CertificateStatus]:
        """The authority and every certificate that was ever signed, by name, the newest of a name first."""
        now, revoked = self._clock(), self._revoked()

        def status_of(certificate: bytes) -> CertificateStatus:
            serial = x.serial_number(certificate)
            left = (x.valid_until(certificate) - now).days
            return CertificateStatus(x.common_name(certificate), serial, left, serial in revoked)

        newest_first = sorted(self._issued().values(), key=x.valid_from, reverse=True)
        by_name = sorted(map(status_of, newest_first), key=lambda one: one.name)  # which keeps their order
        return [status_of(self._pair.certificate), *by_name]

    def _certify_server(self, hosts: Sequence[str]) -> None:
        folder = self.folder / SERVER
        credentials.private_folder(folder)
        for name, names in ((SERVER, hosts), ("superlink", x.LOOPBACK)):
            pair = self._certified(name, x.BEING_CALLED, names)
            credentials.write_private(folder / f"{name}.key", pair.key)
            credentials.write_private(folder / f"{name}.crt", pair.certificate)

    def _certify_site(self, site: Path) -> None:
        pair = self._certified(site.name, x.CALLING)
        host = x.hosts_of((self.folder / SERVER / "server.crt").read_bytes())[0]
        until = f"{x.valid_until(pair.certificate):%Y-%m-%d}"
        credentials.write_private(site / "ca.crt", self._pair.certificate)
        credentials.write_private(site / "site.key", pair.key)
        credentials.write_private(site / "site.crt", pair.certificate)
        readme = _README.format(name=site.name, host=host, until=until)
        credentials.write_private(site / "README.txt", readme.encode())

    def _certified(self, name: str, use: x.Use, hosts: Sequence[str] = ()) -> Pair:
        pair = x.certificate(self._pair, name, use, self._validity.certificate, self._clock(), hosts)
        book = self.folder / "issued"
        credentials.private_folder(book)
        credentials.write_private(book / f"{x.serial_number(pair.certificate):040x}.crt", pair.certificate)
        return pair

    def _archive(self, site: Path) -> Path:
        archive = site.with_suffix(".tar")
        credentials.write_private(archive, credentials.pack(site))
        return archive

    def _write_revocations(self, revoked: dict[int, datetime]) -> None:
        content = x.revocations(self._pair, revoked, self._clock())
        credentials.write_private(self.folder / "revoked.crl", content)

    def _revoked(self) -> dict[int, datetime]:
        return x.read_revocations((self.folder / "revoked.crl").read_bytes())

    def _issued(self) -> dict[int, bytes]:
        return {int(path.stem, 16): path.read_bytes() for path in (self.folder / "issued").glob("*.crt")}

    def _site(self, name: str) -> Path:
        return self.folder / "sites" / name

    def _known_site(self, name: str) -> Path:
        site = self._site(credentials.check_name(name))
        if not site.exists():
            known = [path.name for path in site.parent.glob("*") if path.is_dir()]
            hint = nearest(name, known) if known else "none was issued so far"
            raise UserError(f'no site is called "{name}": {hint}')
        return site


def _check_hosts(hosts: Sequence[str]) -> list[str]:
    if not hosts:
        raise UserError(
            "say under which names and addresses sites will call the server: --host fed.example.org --host 192.0.2.7"
        )
    return [_check_host(host) for host in hosts]


def _check_host(host: str) -> str:
    try:
        return str(ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host.lower()):
            raise UserError(
                f'"{host}" is neither a host name nor an address: in ASCII, without port: fed.example.org or 192.0.2.7'
            ) from None
        return host.lower()


_README = """\
Credentials of {name}, until {until}

These files let {name}, and nobody else, take part in a federated run. Whoever holds site.key and node.key is {name}
to the server: keep this folder readable by the account that runs fedferret alone, and send it nowhere.

  ca.crt      whom to trust as the server
  site.crt    who you are, for the server's port; with its key, site.key
  node.pub    who you are, for the program behind it; with its key, node.key

To take part, with fedferret installed (pip install "fedferret[flower]"):

  fedferret join {host}:8443 --data YOUR-FILE.jsonl --name {name} --credentials THIS-FOLDER-OR-ARCHIVE

Only this machine calls the server; no port has to be opened here. Your data stays in your file: what is sent, and how
many bytes, is written down in the site's audit.jsonl. If a key may have been seen by others, tell the server's
administrator at once: it is revoked there, and you are sent a new archive.
"""
