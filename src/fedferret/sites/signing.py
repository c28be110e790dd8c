"""Seals: who sent a request or a response, by Ed25519 signatures over the whole encoded message.

    "fS"  version(1)  signature(64)  |  direction(18)  length(2)  certificate  message      signed: all after the bar

The direction is "fedferret request" or "fedferret response" and a zero byte or none, so no message passes for one of
the other way. A request carries the certificate of the server's signing key (DER). A site verifies that its authority
signed the certificate, for this purpose alone, that it is valid now, and that it is not older than one that the site
accepted before: the server's key can change in the middle of a run, and a key that was replaced is of no more use. A
response carries none: the server has each site's public key, from `fedferret pki issue`.

SITE/server-signing.crt   the newest certificate that this site accepted
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedferret.core.errors import UserError
from fedferret.core.files import write_atomically
from fedferret.sites.certificates import Clock, Pair, wall_clock
from fedferret.sites.credentials import ServerCredentials, SiteCredentials
from fedferret.sites.signing_keys import SigningCertificate, read_private, read_public

NEWEST = "server-signing.crt"
REQUEST, RESPONSE = b"fedferret request\0", b"fedferret response"
_HEAD, _SIGNATURE = b"fS\1", 64  # magic and version; bytes of a signature
_SIGNED = len(_HEAD) + _SIGNATURE  # where the signed bytes begin
_ENVELOPE = _SIGNED + len(REQUEST) + 2  # bytes before certificate and message


class ServerSeal:
    """The server's end: signs requests, verifies responses."""

    signs = True

    def __init__(self, credentials: ServerCredentials) -> None:
        """Read the server's signing key and those of all sites.

        Args:
            credentials: checked.
        """
        self._paths, self._credentials = credentials.signing, credentials
        self._sites = {name: read_public(path.read_bytes()) for name, path in credentials.signing_keys().items()}
        self._read: tuple[int, ...] = ()
        self._key, self._certificate = self._load()

    def close(self, message: bytes) -> bytes:
        """Sign a request, with the key that `fedferret pki renew server` made last."""
        try:
            if self._changed():
                self._key, self._certificate = self._load()
        except (OSError, ValueError):
            pass  # in the middle of being replaced: the former key is good until then
        return _close(self._key, REQUEST, self._certificate, message)

    def open(self, sender: str, sealed: bytes) -> bytes:
        """Verify a site's response; see ``Seal.open``."""
        if sender not in self._sites and not self._found(sender):
            raise ValueError(f"there is no signing key of {sender}")
        _, message = _parts(sealed, RESPONSE)
        _verify(self._sites[sender], sealed, "the site's")
        return bytes(message)

    def _found(self, sender: str) -> bool:
        """Read the key of a site that came after this process began; returns whether there is one."""
        path = self._credentials.signing_keys().get(sender)
        if path is None:
            return False
        self._sites[sender] = read_public(path.read_bytes())
        return True

    def _load(self) -> tuple[Ed25519PrivateKey, bytes]:
        read = self._times()
        pair = Pair(*(path.read_bytes() for path in self._paths))
        loaded = read_private(pair.key), SigningCertificate.of(pair).der
        self._read = read
        return loaded

    def _changed(self) -> bool:
        return self._times() != self._read

    def _times(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in self._paths)


class SiteSeal:
    """A site's end: verifies requests, signs responses."""

    signs = True

    def __init__(self, credentials: SiteCredentials, folder: Path, clock: Clock = wall_clock) -> None:
        """Read the site's signing key, and the newest certificate of the server that it accepted.

        Args:
            credentials: checked.
            folder: of the site.
            clock: returns the time, UTC.

        Raises:
            UserError: the stored certificate is damaged.
        """
        self._key = read_private(credentials.signing_key.read_bytes())
        self._authority, self._path, self._clock = credentials.authority.read_bytes(), folder / NEWEST, clock
        self._newest: SigningCertificate | None = None
        if self._path.exists():
            try:
                newest = SigningCertificate.read(self._path.read_bytes())
            except ValueError as error:
                raise UserError(
                    f"{self._path} is damaged ({error}): it is the newest certificate of the server, without which an "
                    f"older one would be accepted; delete it if the server's key was never stolen"
                ) from None
            if newest.signed_by(self._authority):  # else it is from another authority's days
                self._newest = newest

    def close(self, message: bytes) -> bytes:
        """Sign a response."""
        return _close(self._key, RESPONSE, b"", message)

    def open(self, sender: str, sealed: bytes) -> bytes:
        """Verify a request of the server; see ``Seal.open``."""
        encoded, message = _parts(sealed, REQUEST)
        certificate = self._newest
        if certificate is None or bytes(encoded) != certificate.der:
            certificate = self._newer(bytes(encoded))
        certificate.check_time(self._clock())
        _verify(certificate.key, sealed, "the server's")
        if certificate is not self._newest:
            write_atomically(self._path, certificate.der, private=True)
            self._newest = certificate
        return bytes(message)

    def _newer(self, encoded: bytes) -> SigningCertificate:
        """A certificate other than the newest so far. Raises ValueError unless it may take that one's place."""
        certificate = SigningCertificate.read(encoded)
        if not certificate.signed_by(self._authority):
            raise ValueError("the certificate of the server's signing key is of another authority")
        if self._newest and certificate.begin <= self._newest.begin:
            raise ValueError(
                f"the server's signing key is an old one, certified on {certificate.begin:%Y-%m-%d %H:%M}; this site "
                f"knows one of {self._newest.begin:%Y-%m-%d %H:%M}"
            )
        return certificate


def _close(key: Ed25519PrivateKey, direction: bytes, certificate: bytes, message: bytes) -> bytes:
    signed = b"".join((direction, len(certificate).to_bytes(2, "little"), certificate, message))
    return b"".join((_HEAD, key.sign(signed), signed))


def _parts(sealed: bytes, direction: bytes) -> tuple[memoryview, memoryview]:
    """Certificate and message, unverified. Raises ValueError for bytes of another form or direction."""
    view = memoryview(sealed)
    if len(view) < _ENVELOPE or view[: len(_HEAD)] != _HEAD:
        raise ValueError("the message has no signature")
    if view[_SIGNED : _SIGNED + len(direction)] != direction:
        raise ValueError("the message was signed for the other direction")
    length = int.from_bytes(view[_ENVELOPE - 2 : _ENVELOPE], "little")
    return view[_ENVELOPE : _ENVELOPE + length], view[_ENVELOPE + length :]


def _verify(key: Ed25519PublicKey, sealed: bytes, signer: str) -> None:
    view = memoryview(sealed)
    try:
        key.verify(sealed[len(_HEAD) : _SIGNED], view[_SIGNED:])
    except InvalidSignature:
        raise ValueError(f"the signature is not {signer}") from None
