"""What `bract keys` makes and finds."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from bract.shared.configuration import Frozen


class CoordinatorKeys(Frozen):
    """`bract keys coordinator --json`: where the files are, and what a SITE.toml pins.

    `toml` is for every SITE.toml, `own_toml` for FEDERATION.toml.
    """

    ca_file: str
    ca_key_file: str
    coordinator_key_file: str
    coordinator: str
    certificate_sha256: str
    not_after: datetime
    toml: str
    own_toml: str


class ServerKeys(Frozen):
    """`bract keys server --json`; `witness` is the key that countersigns ledger heads."""

    certificate_file: str
    key_file: str
    witness_key_file: str
    witness: str
    hosts: list[str]
    certificate_sha256: str
    not_after: datetime
    toml: str


class SiteKeys(Frozen):
    """`bract keys site --json`; `key` signs the ledger, `node_key` speaks to the server.

    `toml` is for FEDERATION.toml, `own_toml` for SITE.toml.
    """

    name: str
    ledger_key_file: str
    node_key_file: str
    node_public_file: str
    key: str
    node_key: str
    domain: str | None
    nominal_size: int | None
    toml: str
    own_toml: str


class AuditorKeys(Frozen):
    """`bract keys auditor --json`."""

    name: str
    certificate_file: str
    key_file: str
    certificate_sha256: str
    not_after: datetime
    toml: str


class CertificateFile(Frozen):
    """A certificate, by its public facts; `public` is the SHA-256 of its public key."""

    path: str
    kind: Literal["certificate"] = "certificate"
    subject: str
    issuer: str
    hosts: list[str]
    not_before: datetime
    not_after: datetime
    days_left: int
    expired: bool
    sha256: str
    public: str
    warnings: list[str]


class KeyFile(Frozen):
    """A key, by its public half.

    `public` is a signing key's 32 bytes in hexadecimal, a node key's OpenSSH line, or the SHA-256
    of a certificate's public key.
    """

    path: str
    kind: Literal["signing key", "node key", "node public key", "certificate key"]
    public: str
    warnings: list[str]


class ShownKeys(Frozen):
    """`bract keys show --json`."""

    files: list[CertificateFile | KeyFile]
