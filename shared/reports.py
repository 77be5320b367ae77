"""What commands print with --json and leave in files: the schemas are made from these."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from bract.shared.configuration import Frozen

GUARANTEE_PRIVATE = "(ε, δ)-DP per example"
GUARANTEE_SIMULATION = "none: simulation"
GUARANTEE_UNPROTECTED = "none: unprotected"
Guarantee = Literal["none: simulation", "none: unprotected", "(ε, δ)-DP per example"]
Probability = Field(ge=0, le=1)


class RefusedRound(Frozen):
    """A site's refusal of one round."""

    site: str
    round: int
    reason: str


class LedgerHead(Frozen):
    """The last entry of a site's ledger: an anchor for `bract audit verify`."""

    domain: str
    sequence: int
    hash: str


class SitePrivacy(Frozen):
    """One site's ε: its ledger's total for the domain, and this run's; null where unbounded."""

    epsilon: float | None
    epsilon_run: float | None
    unbounded: bool
    charges: int
    domain: str


class Summary(Frozen):
    """summary.json: one run."""

    run: str
    epsilon: float | None
    epsilon_run: float | None
    epsilon_prv: float | None
    unbounded: bool
    delta: float
    adjacency: str
    unit: Literal["example", "client"]
    mechanism: str
    noise_multiplier: float
    sampling_rate: float
    clip_norm: float
    sites: int
    refused: list[RefusedRound]
    per_site: dict[str, SitePrivacy]
    heads: dict[str, LedgerHead]
    test_accuracy: float = Probability
    test_loss: float | None
    precision: float = Probability
    recall: float = Probability
    f1: float = Probability
    confusion: list[list[int]]
    rounds: int
    seconds: float
    device: str
    workers: int
    versions: dict[str, str]
    contract_sha256: str
    guarantee: Guarantee
    out: str


class MetricsLine(Frozen):
    """A line of metrics.jsonl: one completed round, scored on public validation examples."""

    round: int
    validation_accuracy: float = Probability
    validation_loss: float | None
    epsilon_run: float | None
    replied: int
    refused: int


class Calibration(Frozen):
    """`bract calibrate --json`: σ for a budget, and what it buys."""

    noise_multiplier: float
    epsilon: float
    epsilon_prv: float | None
    epsilon_filter: float
    filter_order: int
    delta: float
    sampling_rate: float
    steps: int
    max_steps: int
    adjacency: str


class VerifiedChain(Frozen):
    """One chain that holds."""

    ledger: str
    site: str
    domain: str
    entries: int
    head: str
    anchored: bool
    simulation: bool


class Verification(Frozen):
    """`bract audit verify --json`."""

    verified: bool
    chains: list[VerifiedChain]
    faults: list[str]


class DomainBudget(Frozen):
    """The budget of one domain of one site, over all runs in its ledger."""

    ledger: str
    site: str
    domain: str
    epsilon: float | None
    epsilon_prv: float | None
    epsilon_filter: float | None
    filter_order: int | None
    unbounded: bool
    limit: float
    left: float | None
    delta: float
    adjacency: str
    charges: int
    steps: int
    seeded: bool
    more_rounds: int | None
    note: str


class Budget(Frozen):
    """`bract audit budget --json`."""

    domains: list[DomainBudget]


class CoordinatorKeys(Frozen):
    """`bract keys coordinator --json`: where the files are, and what a SITE.toml pins."""

    ca_file: str
    ca_key_file: str
    coordinator_key_file: str
    coordinator: str
    certificate_sha256: str
    not_after: datetime
    toml: str


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
    """`bract keys site --json`; `key` signs the ledger, `node_key` speaks to the server."""

    name: str
    ledger_key_file: str
    node_key_file: str
    node_public_file: str
    key: str
    node_key: str
    domain: str | None
    nominal_size: int | None
    toml: str


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


class Failure(Frozen):
    """What any command prints with --json when it fails."""

    error: dict[Literal["type", "message"], str]


REPORTS: dict[str, type[Frozen]] = {
    "summary": Summary,
    "metrics": MetricsLine,
    "calibrate": Calibration,
    "audit-verify": Verification,
    "audit-budget": Budget,
    "keys-coordinator": CoordinatorKeys,
    "keys-server": ServerKeys,
    "keys-site": SiteKeys,
    "keys-auditor": AuditorKeys,
    "keys-show": ShownKeys,
    "error": Failure,
}


def schema(name: str) -> dict[str, Any]:
    """Returns the JSON Schema of a report."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **REPORTS[name].model_json_schema(),
    }
