"""Keys and certificates, as bytes in PEM: what is in them and nothing about where they are kept.

One authority signs everything. What a certificate may be used for is written into it and checked at both ends: a
site's is good for calling (``clientAuth``), a server's for being called (``serverAuth``) under the names and addresses
it lists, so that a site cannot pose as the server to another site. All keys are elliptic, NIST P-384: Flower takes
NIST curves alone for its node keys, and one curve for everything is one thing to reason about.

Times are read from a ``Clock`` that the caller may replace: certificates of last year are what expiry is tested with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

Clock = Callable[[], datetime]

Use = ObjectIdentifier  # what a certificate is good for
CALLING = ExtendedKeyUsageOID.CLIENT_AUTH
BEING_CALLED = ExtendedKeyUsageOID.SERVER_AUTH
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_SKEW = timedelta(hours=1)  # a clock that is an hour late still takes a certificate made now


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def wall_clock() -> datetime:
    """Now, in UTC."""
    return datetime.now(UTC)


def authority(name: str, days: int, now: datetime) -> Pair:
    """A new authority, valid for ``days``; it may sign certificates, no further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject(name, "authority")
    builder = (
        _builder(subject, subject, key.public_key(), now, now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certifies=True, shakes_hands=False), critical=True)
    )
    return _signed(builder, key, key)


def certificate(by: Pair, name: str, use: Use, days: int, now: datetime, hosts: Sequence[str] = ()) -> Pair:
    """A new key and its certificate, signed by the authority ``by``; it never outlives the authority.

    ``hosts``: the names and addresses under which a server may be called (checked by whoever calls it).
    """
    issuer = x509.load_pem_x509_certificate(by.certificate)
    key = ec.generate_private_key(ec.SECP384R1())
    until = min(now + timedelta(days=days), issuer.not_valid_after_utc)
    organisation = issuer.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
    signer = _private(by.key)
    builder = (
        _builder(_subject(str(organisation), name), issuer.subject, key.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certifies=False, shakes_hands=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), False)
    return _signed(builder, key, signer)


def loopback_certificate(days: int, now: datetime) -> Pair:
    """A self-signed certificate for this machine talking to itself; whoever trusts it has been handed the file."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _subject("loopback", "localhost")
    names = x509.SubjectAlternativeName([_general_name(host) for host in LOOPBACK])
    builder = (
        _builder(subject, subject, key.public_key(), now, now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certifies=True, shakes_hands=True), critical=True)
        .add_extension(names, critical=False)
    )
    return _signed(builder, key, key)


def revocations(by: Pair, revoked: Mapping[int, datetime], now: datetime) -> bytes:
    """The list of revoked certificates, by serial number and since when; PEM, valid as long as the authority.

    It is a file beside the server and never fetched: an early end would lock out every site and protect nobody.
    """
    issuer = x509.load_pem_x509_certificate(by.certificate)
    signer = _private(by.key)
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
    """What :func:`revocations` was given."""
    return {entry.serial_number: entry.revocation_date_utc for entry in x509.load_pem_x509_crl(revocations)}


def node_key(comment: str) -> tuple[bytes, bytes]:
    """A node's private and public key in OpenSSH's formats, the only ones that Flower's commands read."""
    key = ec.generate_private_key(ec.SECP384R1())
    encoding, private = serialization.Encoding, serialization.PrivateFormat
    secret = key.private_bytes(encoding.PEM, private.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return secret, public + b" " + comment.encode() + b"\n"


def belongs(pair: Pair) -> bool:
    """Whether the key is the certificate's own."""
    public = x509.load_pem_x509_certificate(pair.certificate).public_key()
    return _private(pair.key).public_key() == public


def signed_by(certificate: bytes, authority: bytes) -> bool:
    """Whether ``authority`` signed the certificate."""
    try:
        leaf, issuer = x509.load_pem_x509_certificate(certificate), x509.load_pem_x509_certificate(authority)
        leaf.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def common_name(certificate: bytes) -> str:
    """Whose certificate it is."""
    subject = x509.load_pem_x509_certificate(certificate).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def serial_number(certificate: bytes) -> int:
    """The number that the authority gave it."""
    return x509.load_pem_x509_certificate(certificate).serial_number


def valid_from(certificate: bytes) -> datetime:
    """When it begins to be valid, in UTC."""
    return x509.load_pem_x509_certificate(certificate).not_valid_before_utc


def valid_until(certificate: bytes) -> datetime:
    """When it expires, in UTC."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def hosts_of(certificate: bytes) -> list[str]:
    """The names and addresses that a server's certificate lists."""
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(name.value) for name in names.value]


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, by: ec.EllipticCurvePrivateKey) -> Pair:
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return Pair(
        builder.sign(by, hashes.SHA384()).public_bytes(encoding),
        key.private_bytes(encoding, private, serialization.NoEncryption()),
    )


def _subject(organisation: str, name: str) -> x509.Name:
    parts = ((NameOID.ORGANIZATION_NAME, organisation), (NameOID.COMMON_NAME, name))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


def _usage(certifies: bool, shakes_hands: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=shakes_hands,
        key_cert_sign=certifies,
        crl_sign=certifies,
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
        raise ValueError(f"{type(loaded).__name__} where an elliptic key is expected")
    return loaded
