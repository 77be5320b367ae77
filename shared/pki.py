"""X.509 certificates: who may speak on a federation's network.

The coordinator's authority signs the server's certificate, which every site checks, and the
auditors', which the server checks. Sites need no certificate: Flower knows each by its node key,
see `node_keys`. What is signed for good (contracts, ledgers) is signed by `keys`, not here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bract.shared import canonical
from bract.shared.errors import UsageError

AUTHORITY_DAYS = 5 * 365
CERTIFICATE_DAYS = 365
CLOCK_SKEW = timedelta(minutes=5)
CURVE = ec.SECP384R1

_MOST_DAYS = 100 * 365
# What cryptography raises for bytes that are broken, locked or of a kind it doesn't know.
UNREADABLE = (
    ValueError,
    TypeError,
    NotImplementedError,
    InternalError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its private key; `chain` is what its holder shows: itself, its issuer."""

    chain: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate of this key."""
        return self.chain[0]

    def certificate_pem(self) -> bytes:
        """Returns the chain as PEM, its own certificate first, as TLS servers read it."""
        return to_pem(self.chain)

    def key_pem(self) -> bytes:
        """Returns the private key as PKCS#8 PEM."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def new_authority(*, days: int = AUTHORITY_DAYS, now: datetime | None = None) -> Identity:
    """Returns a self-signed authority that may sign certificates, but no other authority.

    Raises:
        UsageError: where `days` is out of range.
    """
    key, now = ec.generate_private_key(CURVE()), now or datetime.now(UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # Two authorities must not share a name: a verifier would try the wrong key first.
    name = _name(f"bract authority {identifier.digest.hex()[:16]}")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = (
        _builder(name, key.public_key(), now, _end(now, days))
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
    )
    return Identity((builder.sign(key, hashes.SHA384()),), key)


def issue_server(
    authority: Identity,
    hosts: Sequence[str],
    *,
    days: int = CERTIFICATE_DAYS,
    now: datetime | None = None,
) -> Identity:
    """Returns a TLS server's identity for DNS names and IP addresses.

    Raises:
        UsageError: where a host is neither, or the authority would end first.
    """
    if not hosts:
        raise UsageError("a server certificate needs at least one host name or IP address")
    names = x509.SubjectAlternativeName(dict.fromkeys(_alternative(host) for host in hosts))
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    return _issue(authority, "bract server", usage, names, days=days, now=now)


def issue_auditor(
    authority: Identity,
    name: str,
    *,
    days: int = CERTIFICATE_DAYS,
    now: datetime | None = None,
) -> Identity:
    """Returns a TLS client's identity whose common name is `name`, of 1 to 64 characters.

    Raises:
        UsageError: where the name is too long, or the authority would end first.
    """
    if not 1 <= len(name) <= 64:
        raise UsageError(f"auditor {name!r}: a certificate's name has 1 to 64 characters")
    return _issue(authority, name, ExtendedKeyUsageOID.CLIENT_AUTH, None, days=days, now=now)


def load_authority(certificate: Path, key: Path) -> Identity:
    """Returns the authority in two files.

    Raises:
        UsageError: where a file is unreadable, is no authority's, or they are not a pair.
    """
    chain, private = certificates(certificate), load_private_key(key)
    if not _may_sign(chain[0]):
        raise UsageError(f"{certificate} may not sign certificates: name the coordinator's folder")
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise UsageError(f"{key} holds another kind of key; an authority's is ECDSA")
    if chain[0].public_key() != private.public_key():
        raise UsageError(f"{key} is not the key of {certificate}: they must be made together")
    return Identity(tuple(chain), private)


def certificates(path: Path) -> list[x509.Certificate]:
    """Returns the certificates in a PEM file, one at least.

    Raises:
        UsageError: where the file is unreadable or holds none.
    """
    try:
        found = x509.load_pem_x509_certificates(read(path))
        for one in found:  # cryptography parses these when asked: a fault shows here or never
            _ = one.subject, one.issuer, one.extensions, one.public_key()
        return found
    except UNREADABLE as error:
        raise UsageError(f"{path} holds no readable certificate") from error


def to_pem(chain: Iterable[x509.Certificate]) -> bytes:
    """Returns certificates as PEM, in order."""
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain)


def check_auditor(certificate: Path, key: Path) -> None:
    """Returns where two files are a TLS client's certificate, as auditors have, and its key.

    Raises:
        UsageError: where they are anything else, a site's or the server's files included.
    """
    shown = certificates(certificate)[0]
    try:
        usage = shown.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
        raise UsageError(
            f"{certificate} is no auditor's certificate: the coordinator makes one with bract keys "
            "auditor"
        )
    if b"-----BEGIN OPENSSH PRIVATE KEY-----" in read(key):
        raise UsageError(f"{key} is a site's node key: name the auditor-key.pem of {certificate}")
    if load_private_key(key).public_key() != shown.public_key():
        raise UsageError(f"{key} is not the key of {certificate}: they must be made together")


def fingerprint(certificate: x509.Certificate) -> str:
    """Returns the SHA-256 of a certificate in hexadecimal, by which an auditor is listed."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Returns the DNS names and IP addresses that a certificate is good for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    ]


def load_private_key(path: Path) -> PrivateKeyTypes:
    """Returns the private key of any kind in a PEM file.

    Raises:
        UsageError: where the file is unreadable, holds none, or a password protects it.
    """
    try:
        return serialization.load_pem_private_key(read(path), password=None)
    except UNREADABLE as error:
        raise UsageError(f"{path} holds no private key, or a password protects it") from error


def key_fingerprint(public: PublicKeyTypes) -> str:
    """Returns the SHA-256 of a public key (SubjectPublicKeyInfo, DER) in hexadecimal.

    A certificate and its private key have the same.
    """
    der = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return canonical.sha256(der)


def read(path: Path) -> bytes:
    """Returns the bytes of a file of keys or certificates.

    Raises:
        UsageError: where it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _issue(
    authority: Identity,
    name: str,
    usage: x509.ObjectIdentifier,
    alternatives: x509.SubjectAlternativeName | None,
    *,
    days: int,
    now: datetime | None,
) -> Identity:
    issuer, now = authority.certificate, now or datetime.now(UTC)
    end, last = _end(now, days), issuer.not_valid_after_utc
    if end > last:
        left = (last - now).days
        remedy = f"give --days {left} at most" if left > 0 else "make a new authority"
        raise UsageError(f"{days} days would outlive the authority, which ends {last:%F}: {remedy}")
    key = ec.generate_private_key(CURVE())
    # As the issuer spells it: verifiers compare the two.
    issuer_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(_name(name), key.public_key(), now, end)
        .issuer_name(issuer.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id),
            critical=False,
        )
    )
    if alternatives is not None:
        builder = builder.add_extension(alternatives, critical=False)
    return Identity((builder.sign(authority.key, hashes.SHA384()), *authority.chain), key)


def _builder(
    name: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)  # a site whose clock is behind meets it the same day
        .not_valid_after(end)
    )


def _may_sign(certificate: x509.Certificate) -> bool:
    extensions = certificate.extensions
    try:
        extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _alternative(host: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return x509.DNSName(_dns_name(host))
    if getattr(address, "scope_id", None):
        raise UsageError(f"host {host!r}: an address with a zone is known on one machine only")
    return x509.IPAddress(address)


def _dns_name(host: str) -> str:
    name = host.lower()
    labels = name.split(".")
    # A last label of digits is an IP address with a typing error, not a name.
    whole = len(name) <= 253 and not labels[-1].isdigit()
    if not whole or not all(_LABEL.fullmatch(label) for label in labels):
        raise UsageError(
            f"host {host!r} is neither an IP address nor a DNS name: write it without scheme, "
            "port or wildcard, letters beyond ASCII as xn--"
        )
    return name


def _end(now: datetime, days: int) -> datetime:
    if not 1 <= days <= _MOST_DAYS:
        raise UsageError(f"--days {days} must be from 1 to {_MOST_DAYS}")
    return now + timedelta(days=days)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
