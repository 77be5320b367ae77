"""What audits print: of ledgers, budgets, exports and membership."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bract.shared.configuration import Frozen
from bract.shared.policy import MenuLeft


class Ceiling(Frozen):
    """The ε that a site's policy allowed from an entry on."""

    entry: int
    epsilon: float


def allowed(ceilings: Sequence[Ceiling]) -> str:
    """Returns in words every ε that a domain was allowed, and from which entry on."""
    first, *later = ceilings
    return f"ε {first.epsilon:g} allowed" + "".join(
        f", from entry {one.entry} on ε {one.epsilon:g}" for one in later
    )


class VerifiedChain(Frozen):
    """One chain that holds.

    `ceilings` are all that the site's policies allowed, in order: more than one tells that ε was
    raised or lowered on the way.
    `anchor` is the last entry that was seen elsewhere: what came after it can have been cut off.
    `witnessed` is the last entry that a server whose key is pinned countersigned; `received` counts
    the updates that a server took, each behind its charge, and is null where no receipts were
    given. Of a chain that `lost` entries the whole ceiling counts as spent.
    """

    ledger: str
    site: str
    domain: str
    entries: int
    charges: int
    ceilings: list[Ceiling]
    head: str
    anchored: bool
    anchor: int | None
    witnessed: int | None
    received: int | None
    simulation: bool
    lost: bool


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
    bounds that of `group` examples; null where not asked for, or where nothing bounds it. The first
    is given too where a contract keeps only so many rows of a person, of whom another row takes the
    place of one: `epsilon` is of a row of a person with no more, which the note says.
    `epsilon_person` bounds that of a person with `rows_per_person` examples, as every contract
    charged bounds them; null where one does not. `epsilon_menu` is of the whole of a menu, which
    holds however contracts were chosen; under a menu `left` is null while `menu` has steps left.
    `left` is what a gate will still give, on its own grid, however finely ε was counted.
    `anchor` is the last entry that was seen elsewhere: what came after it can have been cut off.
    """

    ledger: str
    site: str
    domain: str
    epsilon: float | None
    epsilon_prv: float | None
    epsilon_filter: float | None
    filter_order: int | None
    epsilon_menu: float | None = None
    menu: list[MenuLeft] | None = None
    unbounded: bool
    limit: float
    left: float | None
    delta: float
    adjacency: str
    unit: str
    entries: int
    anchor: int | None
    charges: int
    steps: int
    seeded: bool
    more_rounds: int | None
    forecast_contract: str | None
    epsilon_replace_one: float | None = None
    group: int | None = None
    epsilon_group: float | None = None
    rows_per_person: int | None = None
    epsilon_person: float | None = None
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
