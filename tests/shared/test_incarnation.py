"""An incarnation is signed by the node's key, and by no other."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from bract.shared import incarnation, node_keys
from bract.shared.errors import VerificationFailed

KEY = node_keys.new()


def pem(key: Any) -> bytes:
    made: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return made


def test_every_process_has_its_own_and_it_holds_by_its_nodes_key() -> None:
    made = [incarnation.new(KEY) for _ in range(2)]
    for one in made:
        incarnation.verify(pem(KEY), one)
        assert one.headers == {
            incarnation.HEADER: one.name,
            incarnation.SIGNATURE_HEADER: one.signature,
        }
    assert made[0].name != made[1].name


SHOWN = incarnation.new(KEY)
FORGED = {
    "another name": replace(SHOWN, name="0" * 32),
    "a shorter name": replace(SHOWN, name=SHOWN.name[:-1]),
    "a longer name": replace(SHOWN, name=SHOWN.name + "0"),
    "no name": replace(SHOWN, name=""),
    "half a character": replace(SHOWN, name="\ud800" * 32),
    "no signature": replace(SHOWN, signature=""),
    "another signature": replace(SHOWN, signature=incarnation.new(KEY).signature),
    "no base64": replace(SHOWN, signature="ε" + SHOWN.signature),
    "base64 with more": replace(SHOWN, signature=SHOWN.signature + "\n"),
    "no DER": replace(SHOWN, signature=base64.b64encode(b"x" * 70).decode()),
}


@pytest.mark.parametrize("case", FORGED)
def test_what_the_key_did_not_sign_is_refused_with_no_more_said(case: str) -> None:
    with pytest.raises(VerificationFailed, match=r"^incarnation does not verify$"):
        incarnation.verify(pem(KEY), FORGED[case])


@pytest.mark.parametrize(
    "public",
    [
        pem(node_keys.new()),
        pem(ec.generate_private_key(ec.SECP256R1())),
        pem(ed25519.Ed25519PrivateKey.generate()),
        b"",
        b"-----BEGIN PUBLIC KEY-----\n",
        node_keys.to_pem(KEY),
    ],
    ids=["another", "another curve", "another kind", "nothing", "half a key", "a private key"],
)
def test_no_other_key_verifies_it(public: bytes) -> None:
    with pytest.raises(VerificationFailed, match=r"^incarnation does not verify$"):
        incarnation.verify(public, SHOWN)
