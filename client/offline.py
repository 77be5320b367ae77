"""What an operator asks before and while a site takes part; nothing here starts or charges."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from bract.client import holdings, settings
from bract.client.holdings import Roots
from bract.client.installed import SiteState, head_file_of
from bract.client.settings import SiteSettings
from bract.shared import canonical, keys, locks
from bract.shared import contract as contracts
from bract.shared.contract import Contract
from bract.shared.errors import Refusal, RolledBack, VerificationFailed
from bract.shared.policy import check as check_policy
from bract.shared.privacy import accounting, budget, contents, sharing, verification
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.verification import Verified
from bract.shared.reports.services import ContractCheck, DomainStatus, SiteStatus
from bract.shared.terms import of_rows_kept

_ROW = re.compile(r"(.*), row \d+[,:] (.*)", re.DOTALL)
_SHOWN_ROWS = 3


def check(path: Path, contract_path: Path) -> ContractCheck:
    """Returns whether the gate would take a contract, what it costs, and how the data fit.

    The true data are read, for the operator's eyes alone: before the site is offered.

    Raises:
        UsageError: where a file will not do.
        VerificationFailed: where the ledger does not hold.
    """
    chosen = settings.read(path)
    signed = contracts.read(contract_path)
    agreed, policy = signed.contract, chosen.policy()
    data = {name: domain.data for name, domain in chosen.domains.items()}
    roots = Roots(data)
    holdings.bindings(data, policy, SiteState(Path(chosen.state)).bindings)
    reason: str | None = None
    problems: list[str] = []
    costs: dict[str, float | None] = {"epsilon_before": None, "epsilon_after": None}
    rows_kept: int | None = None
    try:
        if agreed.coordinator not in chosen.coordinators:
            raise VerificationFailed("the coordinator's key is not in the policy")
        signed.verify(agreed.coordinator)
        terms = check_policy(policy, agreed)
        if terms.key != keys.load(Path(chosen.keys.ledger)).public:
            raise VerificationFailed("the contract lists another ledger key for this site")
        roots.check(terms.domain, agreed.data)
        chains = _chains(chosen)
        costs = _costs(chains[terms.domain], agreed, chosen.domains[terms.domain].delta)
        rows_kept = agreed.rows_per_person
        for domain in policy.charged_domains(terms.domain):
            held = chains[domain]
            begun = max((n for name, n in held.charges if name == agreed.sha256), default=0)
            following = min(begun + 1, agreed.rounds)
            budget.check_room(held, agreed, policy.domains[domain], round_number=following)
        problems = roots.problems(terms.domain, agreed.data, terms.nominal_size)
    except (Refusal, VerificationFailed) as refusal:
        reason = str(refusal)
    return ContractCheck(
        contract_sha256=agreed.sha256,
        accepted=reason is None,
        reason=reason,
        problems=problems,
        rows_kept=rows_kept,
        **costs,
    )


def _costs(chain: Chain, agreed: Contract, delta: float) -> dict[str, float | None]:
    """Returns ε now, and after every attempt of a contract that is not charged yet."""
    found: dict[str, float | None] = {}
    ahead = budget.ahead(chain, agreed)
    if agreed.rows_per_person is not None:
        replaced = accounting.epsilon_replace_one([*chain.events, *ahead], delta)
        found["epsilon_replaced_after"] = canonical.finite(replaced)
    for when, more in (("before", ()), ("after", ahead)):
        found[f"epsilon_{when}"] = canonical.finite(
            accounting.epsilon([*chain.events, *more], delta)
        )
        found[f"epsilon_filter_{when}"] = canonical.finite(budget.filtered(chain, delta, more))
    return found


def lines(report: ContractCheck) -> list[str]:
    """Returns a check as text."""
    shown = [f"contract {report.contract_sha256}"]
    if report.epsilon_before is not None and report.epsilon_after is not None:
        before = _both(report.epsilon_before, report.epsilon_filter_before)
        after = _both(report.epsilon_after, report.epsilon_filter_after)
        shown.append(f"ε now {before}, after the whole contract {after}")
    if report.rows_kept is not None:
        shown.append(of_rows_kept(report.rows_kept, _number(report.epsilon_replaced_after)))
    shown += [f"data: {problem}" for problem in _shortened(report.problems)]
    if report.accepted:
        shown.append("the gate would accept it" + ("" if report.problems else "; the data fit"))
    return shown


def _shortened(problems: Sequence[str]) -> Iterator[str]:
    """Yields problems as text, of rows with one fault the first few: a file may lack a column."""
    rows: Counter[tuple[str, str]] = Counter()
    for problem in problems:
        match = _ROW.fullmatch(problem)
        kind = (match[1], match[2]) if match else (problem, "")
        rows[kind] += 1
        if match is None or rows[kind] <= _SHOWN_ROWS:
            yield problem
    for (path, fault), count in rows.items():
        if fault and count > _SHOWN_ROWS:
            yield f"{path}, in more rows, which --json lists: {fault}"


def status(path: Path) -> SiteStatus:
    """Returns what the running process last said, and what the ledger says.

    Raises:
        UsageError: where data that a domain counts are offered under another.
        VerificationFailed: where the ledger does not hold, or fixed other terms than the file has.
    """
    chosen = settings.read(path)
    policy = chosen.policy()
    roots = {name: domain.data for name, domain in chosen.domains.items()}
    holdings.bindings(roots, policy, SiteState(Path(chosen.state)).bindings)
    state = SiteState(Path(chosen.state))
    said = json.loads(state.status.read_bytes()) if state.status.exists() else {}
    running = locks.is_held(state.lock)
    chains = _chains(chosen)
    return SiteStatus(
        site=chosen.site,
        running=running,
        doing=str(said.get("doing", "never started")) if running else "not running",
        round=said.get("round"),
        since=said.get("since"),
        domains={
            name: _domain_status(chains[name], domain.epsilon, domain.delta).model_copy(
                update={"shared": policy.charged_domains(name)[1:]}
            )
            for name, domain in chosen.domains.items()
        },
    )


def status_lines(report: SiteStatus) -> list[str]:
    """Returns a status as text."""
    since = report.since or "-"
    shown = [f"{report.site}: {report.doing}, round {report.round or '-'}, since {since}"]
    shown += [
        f"{name}: ε {_spent(domain)} of {domain.limit:g} at δ {domain.delta:g}, left "
        f"{_left(domain)}, {domain.charges} charges{_shared(domain)}"
        for name, domain in report.domains.items()
    ]
    return shown


def _spent(domain: DomainStatus) -> str:
    if domain.menu is None:
        return _both(domain.epsilon, domain.epsilon_filter)
    return f"{_number(domain.epsilon)} ({_number(domain.epsilon_menu)} by the whole menu)"


def _left(domain: DomainStatus) -> str:
    if domain.left is None and domain.menu and domain.epsilon is not None:
        return " and ".join(entry.words for entry in domain.menu)
    return _number(domain.left)


def _shared(domain: DomainStatus) -> str:
    others = " and ".join(map(repr, domain.shared))
    return (
        f"; each use is charged to {others} too, and must fit what is left there" if others else ""
    )


def _both(epsilon: float | None, filtered: float | None) -> str:
    """Returns ε by PLD and, where it is another, as the site's filter counts it."""
    known = _number(epsilon)
    return known if filtered is None else f"{known} ({filtered:.3f} by the filter)"


def _number(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.3f}"


def _domain_status(chain: Chain, limit: float, delta: float) -> DomainStatus:
    spent, filtered = accounting.epsilon(chain.events, delta), budget.filtered(chain, delta)
    return DomainStatus(
        epsilon=canonical.finite(spent),
        epsilon_filter=canonical.finite(filtered),
        epsilon_menu=canonical.finite(budget.of_menu(chain, delta)),
        menu=budget.menu_left(chain),
        limit=limit,
        left=budget.left(chain, limit, spent, budget.adaptive(chain, delta)),
        delta=delta,
        charges=sum(chain.attempts.values()),
    )


def _chains(chosen: SiteSettings) -> dict[str, Chain]:
    """Returns the chain of each domain, as its next charge would find or begin it.

    So a domain counts here what others that share its examples were charged before.

    Raises:
        VerificationFailed: where the ledger does not hold, lacks what the head file saw, or fixed
            other terms than the file has: by those another epsilon would seem to be left.
    """
    policy, found = chosen.policy(), _verified(chosen)
    public = keys.load(Path(chosen.keys.ledger)).public
    chains = {}
    for domain in policy.domains:
        held = found.get(domain)
        chains[domain] = held.chain if held else budget.unbegun(policy, domain, key=public)
        fault = budget.genesis_fault(chains[domain], policy)
        fault = fault or (sharing.parted(domain, held.policy, policy) if held else None)
        if fault:
            raise VerificationFailed(fault)
    for shared in {frozenset(policy.charged_domains(domain)) for domain in chains}:
        for domain, lacking in sharing.missing([chains[name] for name in shared]).items():
            chains[domain].count_(lacking.events)
    return chains


def _verified(chosen: SiteSettings) -> dict[str, Verified]:
    """Returns the begun domains of the site's ledger, none where nothing was ever charged."""
    path, head_file = SiteState(Path(chosen.state)).ledger, head_file_of(chosen)
    seen = head_file.read() if head_file else {}
    # A site that was started and has not trained has a ledger without entries.
    if not path.exists() or not contents.read(path).rows:
        if any(site == chosen.site for site, _ in seen):
            raise RolledBack(
                f"{path} lacks entries that {chosen.head_file} saw: restore the newest copy, or "
                "close the domain with --recover"
            )
        return {}
    public = keys.load(Path(chosen.keys.ledger)).public
    found = verification.verify(path, site_keys={chosen.site: public}, anchors=seen)
    return {one.chain.domain: one for one in found}
