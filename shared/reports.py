"""What commands print with --json and leave in files: the schemas are made from these."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from bract.shared import versions
from bract.shared.audits import MechanismAudit
from bract.shared.configuration import Frozen
from bract.shared.contract import Contract

GUARANTEE_PRIVATE: Final = "(ε, δ)-DP per example"
GUARANTEE_SIMULATION: Final = "none: simulation"
GUARANTEE_UNPROTECTED: Final = "none: unprotected"
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


class Scores(Frozen):
    """How good the last weights are on public test examples.

    Of the task "classes" there is what tells classes apart; `auc` is the area under the ROC curve,
    the mean of each class against the rest where there are more than two, and null where one of
    them is missing. Of "next-token" accuracy and loss are those of a token, and the perplexity is
    exp(loss). Of "value" the loss is the mean squared error as the model learns it; the errors
    below are in the file's own unit, where a table's target says its bounds. What the task has not
    is null, and so are the figures of groups where the data set knows none.
    """

    test_accuracy: Annotated[float, Probability] | None
    test_loss: float | None
    test_perplexity: float | None = None
    test_mean_squared_error: float | None = None
    test_mean_absolute_error: float | None = None
    test_r2: float | None = None
    precision: Annotated[float, Probability] | None = None
    recall: Annotated[float, Probability] | None = None
    f1: Annotated[float, Probability] | None = None
    confusion: list[list[int]] | None = None
    auc: Annotated[float, Probability] | None = None
    test_accuracy_by_group: dict[str, Annotated[float, Probability]] | None = None
    test_accuracy_mean_of_groups: Annotated[float, Probability] | None = None
    test_auc_by_group: dict[str, Annotated[float, Probability] | None] | None = None

    @property
    def line(self) -> str:
        """The scores that there are, in words."""
        named = {
            "test accuracy": self.test_accuracy,
            "macro F1": self.f1,
            "AUC": self.auc,
            "perplexity": self.test_perplexity,
            "test loss": self.test_loss if self.test_accuracy is None else None,
            "mean absolute error": self.test_mean_absolute_error,
            "R²": self.test_r2,
        }
        return "   ".join(f"{name} {v:.4f}" for name, v in named.items() if v is not None)


class LocalAccuracy(Frozen):
    """How right the weights that a round began with are on the sites' own examples.

    From counts that each site noised and charged, so that all of it may be known; `local_accuracy`
    is over all sites that replied, the others are each site's own, within [0, 1]. The
    errors are the standard errors that the noise gives, at the most: among many sites the worst
    looks worse than it is by a few of them. A site is null where noise left it no examples; all
    is null where the contract asks for none.
    """

    local_accuracy: Annotated[float, Probability] | None = None
    local_accuracy_worst: Annotated[float, Probability] | None = None
    local_accuracy_worst_site: str | None = None
    local_accuracy_by_site: dict[str, Annotated[float, Probability] | None] | None = None
    local_accuracy_error_by_site: dict[str, float] | None = None


class Traffic(Frozen):
    """Bytes of arrays as they travel, without headers: what a site is sent, and what it sends."""

    weights_bytes: int | None = None
    update_bytes: int | None = None


class RunFacts(Scores, LocalAccuracy, Traffic):
    """What is known of a run on either side of the network.

    Local accuracy is that of the last round which asked for it, `local_accuracy_round`; bytes are
    those of one site in one round.
    """

    local_accuracy_round: int | None = None

    run: str
    epsilon_run: float | None
    delta: float
    adjacency: str
    unit: Literal["example", "client"]
    mechanism: str
    noise_multiplier: float
    sampling_rate: float
    clip_norm: float
    sites: int
    refused: list[RefusedRound]
    heads: dict[str, LedgerHead]
    rounds: int
    seconds: float
    versions: dict[str, str]
    contract_sha256: str
    guarantee: Guarantee
    out: str
    rows_per_person: int | None = None
    epsilon_person: float | None = None


class Summary(RunFacts):
    """summary.json: one run, with what its ledgers prove.

    `epsilon` is of one example; `epsilon_person` bounds that of a person with `rows_per_person`.
    """

    epsilon: float | None
    epsilon_prv: float | None
    unbounded: bool
    per_site: dict[str, SitePrivacy]
    device: str
    workers: int


class MetricsLine(LocalAccuracy, Traffic):
    """A line of metrics.jsonl: one completed round, scored on public validation examples."""

    round: int
    validation_accuracy: Annotated[float, Probability] | None
    validation_loss: float | None
    validation_perplexity: float | None = None
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
    """One chain that holds.

    `witnessed` is the last entry that a server countersigned; `received` counts the updates that a
    server took, each behind its charge, and is null where no receipts were given.
    """

    ledger: str
    site: str
    domain: str
    entries: int
    head: str
    anchored: bool
    witnessed: int | None
    received: int | None
    simulation: bool


class Verification(Frozen):
    """`bract audit verify --json`."""

    verified: bool
    chains: list[VerifiedChain]
    faults: list[str]


class LedgerExport(Frozen):
    """`bract audit export --json`; `sha256` is the file's."""

    output: str
    chains: int
    entries: int
    contracts: int
    policies: int
    witnesses: int
    sha256: str


class PulledSite(Frozen):
    """What a server showed of one site.

    `entries` is how many it saw, `shown` of how many it saw the body; `updates` each stand behind a
    charge; `extends` says whether an earlier pull was extended.
    """

    site: str
    domain: str
    sequence: int
    head: str
    entries: int
    shown: int
    updates: int
    extends: bool


class AuditPull(Frozen):
    """`bract audit pull --json`; `pinned` is whether the auditor named the coordinator's key."""

    verified: bool
    address: str
    contract_sha256: str
    run: str
    coordinator: str
    pinned: bool
    sites: list[PulledSite]
    output: str


class RunCost(Frozen):
    """What one run cost a domain: `epsilon` is of it alone, and such do not add up to the total."""

    contract_sha256: str
    run: str
    rounds: int
    charges: int
    evaluations: int
    steps: int
    epsilon: float | None


class DomainBudget(Frozen):
    """The budget of one domain of one site, over all runs in its ledger.

    `epsilon_prv` is null too where it was left out, which the note says. `more_rounds` are those of
    `forecast_contract`. `epsilon_replace_one` is of one example that is replaced, `epsilon_group`
    bounds that of `group` examples; null where not asked for, or where nothing bounds it.
    """

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
    forecast_contract: str | None
    epsilon_replace_one: float | None = None
    group: int | None = None
    epsilon_group: float | None = None
    epsilon_group_replace_one: float | None = None
    runs: list[RunCost]
    note: str


class Budget(Frozen):
    """`bract audit budget --json`."""

    domains: list[DomainBudget]


class Figure(Frozen):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class AttackCurve(Frozen):
    """How well members were told from others.

    `auc` is the area under `roc`, whose points are (false-positive rate, true-positive rate); 0.5
    is guessing. `true_positive_rates` are by the false-positive rate, and of such rates alone as
    the non-members can tell.
    """

    auc: Figure
    true_positive_rates: dict[str, Figure]
    roc: list[tuple[float, float]]


class MembershipAttack(Frozen):
    """One attack on models that were trained with privacy, and on the same ones without.

    `models` were attacked of each kind; `members` and `non_members` are distinct examples.
    """

    attack: Literal["loss", "reference models"]
    models: int
    members: int
    non_members: int
    private: AttackCurve
    unprotected: AttackCurve


class Membership(Frozen):
    """`bract audit membership --json` and membership.json: the audit of a result, on public data.

    `epsilon` is what the audited run's ledgers say; `meaning` says what the figures are not.
    """

    experiment: str
    data: str
    model: str
    rounds: int
    sites: int
    epsilon: float | None
    delta: float
    attacks: list[MembershipAttack]
    meaning: str


class ContractShown(Frozen):
    """`bract contract make --json` and `show --json`; ε is what one site spends.

    `epsilon_person` is, for every attempt, that of a person with `rows_per_person`.
    """

    contract_sha256: str
    contract: dict[str, Any]
    epsilon: float | None
    epsilon_rounds: float | None
    rows_per_person: int | None = None
    epsilon_person: float | None = None
    delta: float
    adjacency: str


class ContractCheck(Frozen):
    """`bract client SITE.toml --check contract.json --json`, for the site's operator alone.

    `problems` names files, rows and columns of the true data, never a value.
    """

    contract_sha256: str
    accepted: bool
    reason: str | None
    problems: list[str]
    epsilon_before: float | None
    epsilon_after: float | None


class Recovery(Frozen):
    """`bract client SITE.toml --recover DOMAIN --json`."""

    domain: str
    epsilon: float


class DomainStatus(Frozen):
    """What is spent and left of one domain's budget."""

    epsilon: float | None
    limit: float
    left: float | None
    delta: float
    charges: int


class SiteStatus(Frozen):
    """`bract client SITE.toml --status --json`."""

    site: str
    running: bool
    doing: str
    round: str | None
    since: str | None
    domains: dict[str, DomainStatus]


class ServerSummary(RunFacts):
    """summary.json of a real run, as far as a server can know it.

    `epsilon_run` is what a site that served every attempt has spent in this run, `epsilon_person`
    the same of a person with `rows_per_person`; what its ledger holds beside it is the site's own
    affair.
    """


class Repeats(Frozen):
    """Test accuracies, each the mean over the groups' test sets, of runs that know no other."""

    accuracies: list[Annotated[float, Probability]]
    mean: float = Probability
    deviation: float | None


class FederationSummary(Summary):
    """What an example of a real federation prints: its last run, by the sites' own ledgers.

    `plain_accuracy` is the test accuracy of a simulation without privacy on the same data.
    """

    plain_accuracy: float = Probability
    plain_accuracy_mean_of_groups: Annotated[float, Probability] | None
    repeats: Repeats


class ServerStatus(Frozen):
    """`bract server FEDERATION.toml --status --json`."""

    run: str
    doing: str
    healthy: bool
    connected: list[str]
    round: int
    rounds: int
    attempts: int
    epsilon_run: float | None
    written: str | None


class ModelScores(Scores):
    """`bract model evaluate --json`: a run's model on public test examples."""

    run: str
    examples: int
    contract_sha256: str


class ModelPredictions(Frozen):
    """`bract model predict --json`."""

    run: str
    output: str
    rows: int
    contract_sha256: str


class ModelExport(Frozen):
    """`bract model export --json`.

    `greatest_difference` is of the file's answers from the model's on made-up inputs, relative to
    the greatest answer where that is over 1; `sha256` and `bytes` are the file's.
    """

    run: str
    format: Literal["safetensors", "torch", "onnx"]
    output: str
    card: str
    sha256: str
    bytes: int
    greatest_difference: float
    guarantee: Guarantee
    contract_sha256: str


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


class Failure(Frozen):
    """What any command prints with --json when it fails."""

    error: dict[Literal["type", "message"], str]


REPORTS: dict[str, type[Frozen]] = {
    "summary": Summary,
    "metrics": MetricsLine,
    "calibrate": Calibration,
    "audit-verify": Verification,
    "audit-budget": Budget,
    "audit-export": LedgerExport,
    "audit-pull": AuditPull,
    "audit-membership": Membership,
    "audit-experiment": MechanismAudit,
    "contract": ContractShown,
    "client-check": ContractCheck,
    "client-recover": Recovery,
    "client-status": SiteStatus,
    "server": ServerSummary,
    "federation": FederationSummary,
    "server-status": ServerStatus,
    "model-evaluate": ModelScores,
    "model-predict": ModelPredictions,
    "model-export": ModelExport,
    "keys-coordinator": CoordinatorKeys,
    "keys-server": ServerKeys,
    "keys-site": SiteKeys,
    "keys-auditor": AuditorKeys,
    "keys-show": ShownKeys,
    "error": Failure,
}


def facts_of(agreed: Contract) -> dict[str, Any]:
    """Returns what a report of a run takes from its contract and from this installation."""
    privacy = agreed.privacy
    return {
        "run": agreed.run,
        "adjacency": privacy.adjacency,
        "unit": privacy.unit,
        "rows_per_person": agreed.data.rows_per_person,
        "mechanism": privacy.mechanism,
        "noise_multiplier": privacy.noise_multiplier,
        "sampling_rate": privacy.sampling_rate,
        "clip_norm": privacy.clip_norm,
        "sites": len(agreed.cohort),
        "versions": versions.installed(),
        "contract_sha256": agreed.sha256,
    }


def schema(name: str) -> dict[str, Any]:
    """Returns the JSON Schema of a report."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **REPORTS[name].model_json_schema(),
    }
