"""What an operator asks before and while a site takes part; nothing here starts or charges."""

from __future__ import annotations

import json
from pathlib import Path

from bract.client import settings
from bract.client.holdings import Roots
from bract.client.installed import SiteState
from bract.client.settings import SiteSettings
from bract.shared import contract as contracts
from bract.shared import keys, locks
from bract.shared.errors import Refusal, VerificationFailed
from bract.shared.policy import check as check_policy
from bract.shared.privacy import accounting, budget, verification
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.events import PoissonGaussian
from bract.shared.reports import ContractCheck, DomainStatus, SiteStatus


def check(path: Path, contract_path: Path) -> ContractCheck:
    """Returns whether the gate would take a contract, what it costs, and how the data fit.

    The true data are read, for the operator's eyes alone: before the site is offered.

    Raises:
        UsageError: where a file will not do.
        VerificationFailed: where the ledger does not hold.
    """
    chosen = settings.read(path)
    signed = contracts.read(contract_path)
    agreed = signed.contract
    roots = Roots({name: domain.data for name, domain in chosen.domains.items()})
    reason: str | None = None
    problems: list[str] = []
    before = after = None
    try:
        if agreed.coordinator not in chosen.coordinators:
            raise VerificationFailed("the coordinator's key is not in the policy")
        signed.verify(agreed.coordinator)
        terms = check_policy(chosen.policy(), agreed)
        if terms.key != keys.load(Path(chosen.keys.ledger)).public:
            raise VerificationFailed("the contract lists another ledger key for this site")
        roots.check(terms.domain, agreed.data)
        limits = chosen.domains[terms.domain]
        chain = _chains(chosen).get(terms.domain) or _new_chain(chosen, terms.domain)
        before = accounting.epsilon(chain.events, limits.delta)
        ahead = PoissonGaussian(
            agreed.privacy.sampling_rate,
            agreed.privacy.noise_multiplier,
            agreed.training.local_steps * agreed.max_attempts,
        )
        after = accounting.epsilon([*chain.events, ahead], limits.delta)
        budget.check_room(chain, agreed, chosen.policy().domains[terms.domain])
        problems = roots.problems(terms.domain, terms.nominal_size)
    except (Refusal, VerificationFailed) as refusal:
        reason = str(refusal)
    return ContractCheck(
        contract_sha256=agreed.sha256,
        accepted=reason is None,
        reason=reason,
        problems=problems,
        epsilon_before=before,
        epsilon_after=after,
    )


def lines(report: ContractCheck) -> list[str]:
    """Returns a check as text."""
    shown = [f"contract {report.contract_sha256}"]
    if report.epsilon_before is not None and report.epsilon_after is not None:
        after = f"after the whole contract {report.epsilon_after:.3f}"
        shown.append(f"ε now {report.epsilon_before:.3f}, {after}")
    shown += [f"data: {problem}" for problem in report.problems]
    if report.accepted:
        shown.append("the gate would accept it" + ("" if report.problems else "; the data fit"))
    return shown


def status(path: Path) -> SiteStatus:
    """Returns what the running process last said, and what the ledger says.

    Raises:
        VerificationFailed: where the ledger does not hold.
    """
    chosen = settings.read(path)
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
            name: _domain_status(chains.get(name), domain.epsilon, domain.delta)
            for name, domain in chosen.domains.items()
        },
    )


def status_lines(report: SiteStatus) -> list[str]:
    """Returns a status as text."""
    shown = [f"{report.site}: {report.doing}, round {report.round or '-'}, since {report.since}"]
    shown += [
        f"{name}: ε {_number(domain.epsilon)} of {domain.limit:g} at δ {domain.delta:g}, left "
        f"{_number(domain.left)}, {domain.charges} charges"
        for name, domain in report.domains.items()
    ]
    return shown


def _number(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.3f}"


def _domain_status(chain: Chain | None, limit: float, delta: float) -> DomainStatus:
    spent = accounting.epsilon(chain.events, delta) if chain else 0.0
    unbounded = chain is not None and accounting.is_unbounded(chain.events)
    return DomainStatus(
        epsilon=None if unbounded else spent,
        limit=limit,
        left=None if unbounded else max(limit - spent, 0.0),
        delta=delta,
        charges=sum(chain.attempts.values()) if chain else 0,
    )


def _chains(chosen: SiteSettings) -> dict[str, Chain]:
    path = SiteState(Path(chosen.state)).ledger
    if not path.exists():
        return {}
    public = keys.load(Path(chosen.keys.ledger)).public
    found = verification.verify(path, site_keys={chosen.site: public}, anchors={})
    return {one.chain.domain: one.chain for one in found}


def _new_chain(chosen: SiteSettings, domain: str) -> Chain:
    """Returns the chain that a first charge would begin."""
    public = keys.load(Path(chosen.keys.ledger)).public
    return budget.unbegun(chosen.policy(), domain, key=public)
