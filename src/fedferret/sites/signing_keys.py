"""Ed25519 keys that sign requests and responses, and the certificate of the server's key, as bytes.

A site's public key needs no certificate: `fedferret pki issue` puts it beside the site's node key, where the server
reads both. The server's key has one, since sites must know it when it changes in the middle of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedferret.sites.certificates import SIGNING, Pair

_LARGEST = 4096  # bytes of a certificate; ours have some 600


def signing_key() -> bytes:
    """Return a new private key, PEM."""
    form = serialization.PrivateFormat.PKCS8
    key = Ed25519PrivateKey.generate()
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def public_of(private: bytes) -> bytes:
    """Return the public key of a private one, both PEM. Raises ValueError for another kind of key."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return read_private(private).public_key().public_bytes(serialization.Encoding.PEM, form)


def read_private(private: bytes) -> Ed25519PrivateKey:
    """Read a private key, PEM. Raises ValueError for another kind of key."""
    key = serialization.load_pem_private_key(private, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"a {type(key).__name__}: a signing key must be Ed25519")
    return key


def read_public(public: bytes) -> Ed25519PublicKey:
    """Read a public key, PEM. Raises ValueError for another kind of key."""
    key = serialization.load_pem_public_key(public)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"a {type(key).__name__}: a signing key must be Ed25519")
    return key


@dataclass(frozen=True)
class SigningCertificate:
    """The certificate of a server's signing key. Its form is checked; ``signed_by`` checks who signed it."""

    der: bytes
    key: Ed25519PublicKey
    begin: datetime  # of its validity, UTC
    end: datetime

    @classmethod
    def read(cls, der: bytes) -> SigningCertificate:
        """Read a certificate.

        Raises:
            ValueError: the bytes are no certificate for signing messages, and for nothing else.
        """
        try:
            if len(der) > _LARGEST:
                raise ValueError
            read = x509.load_der_x509_certificate(der)
            usages = read.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            authority = read.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            key = read.public_key()
        except Exception as error:  # anyone's bytes, and the library has a dozen kinds of errors for them
            kind = type(error).__name__
            raise ValueError(f"what came as the certificate of the server's signing key is none ({kind})") from None
        if list(usages) != [SIGNING] or authority or not isinstance(key, Ed25519PublicKey):
            raise ValueError("what came as the certificate of the server's signing key is for another purpose")
        return cls(der, key, read.not_valid_before_utc, read.not_valid_after_utc)

    @classmethod
    def of(cls, pair: Pair) -> SigningCertificate:
        """Read the certificate of a pair that `fedferret pki` made. Raises ValueError as ``read``, and for no pair."""
        certificate = cls.read(
            x509.load_pem_x509_certificate(pair.certificate).public_bytes(serialization.Encoding.DER)
        )
        if read_private(pair.key).public_key() != certificate.key:
            raise ValueError("the signing key is not that of its certificate")
        return certificate

    def signed_by(self, authority: bytes) -> bool:
        """Return whether the authority with this certificate (PEM) signed this one."""
        try:
            issuer = x509.load_pem_x509_certificate(authority)
            x509.load_der_x509_certificate(self.der).verify_directly_issued_by(issuer)
        except Exception:  # a wrong signature, or anyone's bytes as one
            return False
        return True

    def check_time(self, now: datetime) -> None:
        """Raise ValueError unless the certificate is valid at a time, UTC."""
        if now < self.begin:
            raise ValueError(
                f"the server's signing key is valid only from {self.begin:%Y-%m-%d %H:%M} UTC: check this machine's "
                f"clock"
            )
        if now >= self.end:
            raise ValueError(
                f"the certificate of the server's signing key expired on {self.end:%Y-%m-%d}: at the server, run "
                f"`fedferret pki renew server`"
            )
