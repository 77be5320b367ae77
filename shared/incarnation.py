"""Which process speaks for a node: an id that the node's key signs once for each process.

Two live processes with one key would each believe that it holds the site's ledger. The server lets
the newest speak; the older is told so and ends.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bract.shared import canonical
from bract.shared.errors import VerificationFailed

HEADER = "bract-incarnation"
SIGNATURE_HEADER = "bract-incarnation-signature"


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One process of a node: 16 random bytes in hexadecimal, and the node key's signature."""

    name: str
    signature: str

    @property
    def headers(self) -> dict[str, str]:
        """What every request of the process carries."""
        return {HEADER: self.name, SIGNATURE_HEADER: self.signature}


def new(key: ec.EllipticCurvePrivateKey) -> Incarnation:
    """Returns the incarnation of this process."""
    name = secrets.token_hex(16)
    signature = key.sign(_digest(name), ec.ECDSA(hashes.SHA256()))
    return Incarnation(name=name, signature=base64.b64encode(signature).decode())


def verify(public_pem: bytes, incarnation: Incarnation) -> None:
    """Returns where the node's key signed the incarnation.

    Raises:
        VerificationFailed: otherwise, with no more said.
    """
    try:
        key = serialization.load_pem_public_key(public_pem)
        signature = base64.b64decode(incarnation.signature, validate=True)
        if len(incarnation.name) != 32 or not isinstance(key, ec.EllipticCurvePublicKey):
            raise VerificationFailed("incarnation does not verify")
        key.verify(signature, _digest(incarnation.name), ec.ECDSA(hashes.SHA256()))
    except (
        InvalidSignature,
        UnsupportedAlgorithm,
        ValueError,
        TypeError,
        binascii.Error,
    ) as error:
        raise VerificationFailed("incarnation does not verify") from error


def _digest(name: str) -> bytes:
    return canonical.tagged("incarnation/1", name.encode())
