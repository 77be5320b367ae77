"""What is said of contracts, of a site and of a server."""

from __future__ import annotations

from typing import Any

from bract.shared.configuration import Frozen
from bract.shared.policy import MenuLeft


class ContractShown(Frozen):
    """`bract contract make --json` and `show --json`; ε is what one site spends.

    It is null where it is unbounded, and where a noise multiplier under 0.1 makes it absurd.
    `epsilon_person` is, for every attempt, that of a person with `rows_per_person`; `epsilon` is of
    a row of such a person, and `epsilon_replaced` of one of a person with more rows, whose place
    another takes.
    """

    contract_sha256: str
    contract: dict[str, Any]
    epsilon: float | None
    epsilon_rounds: float | None
    rows_per_person: int | None = None
    epsilon_person: float | None = None
    epsilon_replaced: float | None = None
    delta: float
    adjacency: str


class ContractCheck(Frozen):
    """`bract client SITE.toml --check contract.json --json`, for the site's operator alone.

    `problems` names files, rows and columns of the true data, never a value. The gate asks that
    neither ε by PLD nor that by the domain's filter, if it has one, is over the limit. Of a person
    with more rows than `rows_kept` another takes a row's place: `epsilon_replaced_after` is of it.
    """

    contract_sha256: str
    accepted: bool
    reason: str | None
    problems: list[str]
    epsilon_before: float | None
    epsilon_after: float | None
    epsilon_filter_before: float | None = None
    epsilon_filter_after: float | None = None
    rows_kept: int | None = None
    epsilon_replaced_after: float | None = None


class Recovery(Frozen):
    """`bract client SITE.toml --recover DOMAIN --json`."""

    domain: str
    epsilon: float


class DomainStatus(Frozen):
    """What is spent and left of one domain's budget.

    `left` is the ε that its gate would charge; each use is charged to the domains `shared` too, and
    must fit what is left of them. A menu gives out steps instead: `left` is null while `menu` has
    some, and `epsilon_menu` is of the whole of it.
    """

    epsilon: float | None
    epsilon_filter: float | None = None
    epsilon_menu: float | None = None
    menu: list[MenuLeft] | None = None
    limit: float
    left: float | None
    delta: float
    charges: int
    shared: tuple[str, ...] = ()


class SiteStatus(Frozen):
    """`bract client SITE.toml --status --json`."""

    site: str
    running: bool
    doing: str
    round: str | None
    since: str | None
    domains: dict[str, DomainStatus]


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
