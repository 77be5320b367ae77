"""What commands print with --json and leave in files: the schemas are made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
    """summary.json: one run.

    `auc` is null unless there are two classes; the accuracies of groups are null where the data
    set knows none.
    """

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
    auc: Annotated[float, Probability] | None = None
    test_accuracy_by_group: dict[str, Annotated[float, Probability]] | None = None
    test_accuracy_mean_of_groups: Annotated[float, Probability] | None = None
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


class Failure(Frozen):
    """What any command prints with --json when it fails."""

    error: dict[Literal["type", "message"], str]


REPORTS: dict[str, type[Frozen]] = {
    "summary": Summary,
    "metrics": MetricsLine,
    "calibrate": Calibration,
    "audit-verify": Verification,
    "audit-budget": Budget,
    "error": Failure,
}


def schema(name: str) -> dict[str, Any]:
    """Returns the JSON Schema of a report."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **REPORTS[name].model_json_schema(),
    }
