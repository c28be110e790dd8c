"""Keys and certificates as bytes in PEM. Where the files are kept is in ``credentials.py`` and ``pki.py``.

One authority (CA) signs every certificate. Each certificate states its extended key usage, and both ends check it: a
site's certificate has ``clientAuth``; a server's has ``serverAuth`` and lists the server's names and addresses. A site
therefore cannot pose as the server to another site. These keys are elliptic, NIST P-384: Flower accepts only NIST
curves for node keys. Messages are signed with Ed25519 keys (``signing_keys.py``); the certificate of the server's has
``SIGNING``, which no TLS certificate has, as its only usage, and no TLS library accepts that usage.

Functions that need the time take it, or a ``Clock``, as a parameter, so that tests can make expired certificates.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

Clock = Callable[[], datetime]

Usage = ObjectIdentifier  # extended key usage
CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH
SIGNING = ObjectIdentifier(
    "2.25.233870428106573219746308412753904622817"
)  # a random UUID's, as X.667 allows: ours alone
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_SKEW = timedelta(hours=1)  # a machine with a clock up to an hour late still accepts a new certificate


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def wall_clock() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)


def authority(name: str, days: int, now: datetime) -> Pair:
    """Return a new authority; it may sign certificates, but no further authorities.

    Args:
        name: the organisation in the authority's subject.
        days: validity, in days from ``now``.
        now: time of issue, UTC.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject(name, "authority")
    builder = (
        _builder(subject, subject, key.public_key(), now - _SKEW, now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True, signs_handshakes=False), critical=True)
    )
    return _signed(builder, key, key)


def certificate(
    ca: Pair,
    name: str,
    usage: Usage,
    days: int,
    now: datetime,
    hosts: Sequence[str] = (),
    after: datetime | None = None,
) -> Pair:
    """Return a new key and its certificate, signed by the authority.

    Args:
        ca: the authority.
        name: common name in the certificate.
        usage: ``CLIENT_AUTH``, ``SERVER_AUTH`` or ``SIGNING``, which has an Ed25519 key.
        days: validity, in days from ``now``; cut to the authority's.
        now: time of issue, UTC.
        hosts: the names and addresses of a server; clients check them.
        after: the validity begins later than this time, whatever the clock shows.
    """
    issuer = x509.load_pem_x509_certificate(ca.certificate)
    key = Ed25519PrivateKey.generate() if usage == SIGNING else ec.generate_private_key(ec.SECP384R1())
    begin = max(now - _SKEW, after + timedelta(seconds=1)) if after else now - _SKEW
    until = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    organisation = issuer.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
    signer = _private(ca.key)
    builder = (
        _builder(_subject(str(organisation), name), issuer.subject, key.public_key(), begin, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False, signs_handshakes=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=usage == SIGNING)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False)
    return _signed(builder, key, signer)


def loopback_certificate(days: int, now: datetime) -> Pair:
    """Return a self-signed certificate for connections within this machine; clients trust the file itself.

    Args:
        days: validity, in days from ``now``.
        now: time of issue, UTC.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject("loopback", "localhost")
    names = x509.SubjectAlternativeName([_general_name(host) for host in LOOPBACK])
    builder = (
        _builder(subject, subject, key.public_key(), now - _SKEW, now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True, signs_handshakes=True), critical=True)
        .add_extension(names, critical=False)
    )
    return _signed(builder, key, key)


def revocations(ca: Pair, revoked: Mapping[int, datetime], now: datetime) -> bytes:
    """Return the certificate revocation list (CRL), PEM, valid as long as the authority.

    The list is a file at the server and is never fetched: an early expiry would lock out every site and protect nobody.

    Args:
        ca: the authority.
        revoked: time of revocation (UTC) by serial number.
        now: time of issue, UTC.
    """
    issuer = x509.load_pem_x509_certificate(ca.certificate)
    signer = _private(ca.key)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(now - _SKEW)
        .next_update(issuer.not_valid_after_utc)
        .add_extension(x509.CRLNumber(len(revoked)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    for serial, since in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(since).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def read_revocations(revocations: bytes) -> dict[int, datetime]:
    """Return the time of revocation (UTC) by serial number, from a CRL in PEM."""
    return {entry.serial_number: entry.revocation_date_utc for entry in x509.load_pem_x509_crl(revocations)}


def node_key(comment: str) -> tuple[bytes, bytes]:
    """Return a node's private and public key in OpenSSH's formats, the only formats that Flower's commands read."""
    key = ec.generate_private_key(ec.SECP384R1())
    encoding, private = serialization.Encoding, serialization.PrivateFormat
    secret = key.private_bytes(encoding.PEM, private.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return secret, public + b" " + comment.encode() + b"\n"


def node_key_owner(public: bytes, private: bytes | None = None) -> str:
    """Return the name of the site that a node's public key is for, as :func:`node_key` writes it behind the key.

    Args:
        public: in OpenSSH's format.
        private: its private key, also in OpenSSH's format; None: not at hand.
    Raises:
        ValueError: if a key cannot be read, or the two are no pair.
    """
    try:
        known = serialization.load_ssh_public_key(public)
        secret = None if private is None else serialization.load_ssh_private_key(private, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"a node key cannot be read: {error}") from None
    if secret is not None and secret.public_key() != known:
        raise ValueError("node.key and node.pub do not belong together")
    return public.decode(errors="replace").split(maxsplit=2)[-1].strip()


def node_key_header(public: bytes) -> str:
    """Return a public node key (OpenSSH) as a node's calls carry it, in Flower's header ``flwr-public-key``."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return b64encode(serialization.load_ssh_public_key(public).public_bytes(serialization.Encoding.PEM, form)).decode()


def key_matches(pair: Pair) -> bool:
    """Return whether the private key belongs to the certificate."""
    public = x509.load_pem_x509_certificate(pair.certificate).public_key()
    return serialization.load_pem_private_key(pair.key, None).public_key() == public


def signed_by(certificate: bytes, authority: bytes) -> bool:
    """Return whether ``authority`` signed ``certificate``.

    Args:
        certificate: PEM.
        authority: the authority's certificate, PEM.
    """
    try:
        leaf, issuer = x509.load_pem_x509_certificate(certificate), x509.load_pem_x509_certificate(authority)
        leaf.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def common_name(certificate: bytes) -> str:
    """Return the common name in the certificate."""
    subject = x509.load_pem_x509_certificate(certificate).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def serial_number(certificate: bytes) -> int:
    """Return the certificate's serial number."""
    return x509.load_pem_x509_certificate(certificate).serial_number


def valid_from(certificate: bytes) -> datetime:
    """Return the start of the certificate's validity, UTC."""
    return x509.load_pem_x509_certificate(certificate).not_valid_before_utc


def valid_until(certificate: bytes) -> datetime:
    """Return the certificate's expiry, UTC."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def hosts_of(certificate: bytes) -> list[str]:
    """Return the names and addresses that a server's certificate lists."""
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(name.value) for name in names.value]


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey | Ed25519PublicKey,
    begin: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _signed(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey,
    signer: ec.EllipticCurvePrivateKey,
) -> Pair:
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return Pair(
        builder.sign(signer, hashes.SHA384()).public_bytes(encoding),
        key.private_bytes(encoding, private, serialization.NoEncryption()),
    )


def _subject(organisation: str, name: str) -> x509.Name:
    parts = ((NameOID.ORGANIZATION_NAME, organisation), (NameOID.COMMON_NAME, name))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


def _key_usage(signs_certificates: bool, signs_handshakes: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs_handshakes,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: bytes) -> ec.EllipticCurvePrivateKey:
    loaded = serialization.load_pem_private_key(key, None)
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise ValueError(f"a {type(loaded).__name__}: the key must be elliptic")
    return loaded
