"""Node keys: how Flower knows a site, which has no certificate."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bract.shared import pki
from bract.shared.errors import UsageError

KIND = "ecdsa-sha2-nistp384"


def new() -> ec.EllipticCurvePrivateKey:
    """Returns a new key by which Flower will know a site's node."""
    return ec.generate_private_key(pki.CURVE())


def to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Returns a node's private key in OpenSSH's format, the only one Flower's SuperNode reads."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def public_line(key: ec.EllipticCurvePublicKey, comment: str = "") -> str:
    """Returns a node's public key as one OpenSSH line, without its end.

    Example:
        >>> public_line(new().public_key(), "alpha").split()[::2]
        ['ecdsa-sha2-nistp384', 'alpha']
    """
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return f"{line.decode()} {comment}".rstrip()


def load(path: Path) -> ec.EllipticCurvePrivateKey:
    """Returns the node key in a file.

    Raises:
        UsageError: where the file is unreadable or holds no ECDSA P-384 key in OpenSSH's format.
    """
    try:
        key = serialization.load_ssh_private_key(pki.read(path), password=None)
    except pki.UNREADABLE as error:
        raise UsageError(
            f"{path} holds no node key in OpenSSH's format, or a password protects it"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, pki.CURVE):
        raise UsageError(f"{path} holds another kind of key; a node key is {KIND}")
    return key


def public(line: str, *, source: str = "node key") -> ec.EllipticCurvePublicKey:
    """Returns the node key in an OpenSSH line, `ecdsa-sha2-nistp384 AAAA… [comment]`.

    Raises:
        UsageError: where the text is no such line; `source` says where it stood.
    """
    if line.split(" ")[0] != KIND or len(line.splitlines()) != 1:
        raise UsageError(f"{source} must be one line that begins with {KIND}")
    try:
        key = serialization.load_ssh_public_key(line.encode())
    except pki.UNREADABLE as error:
        raise UsageError(f"{source} holds no readable {KIND} key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UsageError(f"{source} holds another kind of key than {KIND}")
    return key
