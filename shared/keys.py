"""Ed25519 signing keys: a site signs its ledger, a coordinator its contracts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bract.shared import canonical, keyfiles
from bract.shared.errors import UsageError, VerificationFailed


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private Ed25519 key; `public` is its 32-byte public half in hexadecimal."""

    private: Ed25519PrivateKey
    public: str = field(init=False)

    def __post_init__(self) -> None:
        """Notes the public half, which every signature is remembered by."""
        object.__setattr__(self, "public", self.private.public_key().public_bytes_raw().hex())

    def sign(self, digest: bytes) -> bytes:
        """Returns the 64-byte signature of a tagged digest."""
        signature = self.private.sign(digest)
        _remember((bytes.fromhex(self.public), signature, digest))
        return signature

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public})"


def generate() -> SigningKey:
    """Returns a new key from the operating system's randomness."""
    return SigningKey(Ed25519PrivateKey.generate())


def derived(root: SigningKey, name: str) -> SigningKey:
    """Returns the key of a name under another key: the same each time, and no file of its own.

    For simulated sites, of which one process holds thousands.
    """
    secret = root.private.private_bytes_raw()
    seed = canonical.tagged("derived-key/1", secret, name.encode())
    return SigningKey(Ed25519PrivateKey.from_private_bytes(seed))


def save(key: SigningKey, path: Path) -> None:
    """Writes a private key as PKCS#8 PEM, readable by its owner alone.

    Raises:
        UsageError: where the file exists; a key is never overwritten.
    """
    keyfiles.create([keyfiles.private(path, to_pem(key))])


def to_pem(key: SigningKey) -> bytes:
    """Returns the private key as PKCS#8 PEM."""
    return key.private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def load(path: Path) -> SigningKey:
    """Returns the key in a PEM file.

    Raises:
        UsageError: where the file is missing or holds no Ed25519 key.
    """
    try:
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UsageError(f"no key at {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} holds no readable private key") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise UsageError(f"{path} holds another kind of key; an Ed25519 key is needed")
    keyfiles.warn_if_open(path)
    return SigningKey(private)


def load_or_generate(path: Path) -> SigningKey:
    """Returns the key in a file, made first where there is none."""
    if not path.exists():
        save(generate(), path)
    return load(path)


def verify(public: str, signature: bytes, digest: bytes) -> None:
    """Returns when the signature of a tagged digest holds.

    Raises:
        VerificationFailed: for any other outcome, with no more said.
    """
    try:
        key = bytes.fromhex(public)
        if (key, signature, digest) in _HOLD:
            return
        Ed25519PublicKey.from_public_bytes(key).verify(signature, digest)
        _remember((key, signature, digest))
    except (InvalidSignature, ValueError, TypeError) as error:
        raise VerificationFailed("signature does not verify") from error


_KEPT = 4096
# Signatures that this process made or verified, the newest: a contract comes with every order, and
# a ledger reads again what it wrote. Equal in all three parts, a signature holds again.
_HOLD: OrderedDict[tuple[bytes, bytes, bytes], None] = OrderedDict()


def _remember(held: tuple[bytes, bytes, bytes]) -> None:
    _HOLD[held] = None
    while len(_HOLD) > _KEPT:
        _HOLD.popitem(last=False)
