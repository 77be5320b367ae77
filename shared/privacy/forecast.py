"""How far what is left of a budget reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bract.shared.contract import Contract
from bract.shared.errors import Reason, Refusal
from bract.shared.policy import DomainPolicy, Policy, check
from bract.shared.privacy import accounting, budget, entries
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.events import Event

GREATEST = 1_000_000


@dataclass(frozen=True, slots=True)
class RoundsLeft:
    """How many more rounds of a contract fit, None where that has no answer.

    `contract` is its hash; `bound` says what bounds the number, where it is not the domain's own ε.
    """

    number: int | None
    contract: str | None
    bound: str | None = None


def rounds_left(
    domain: str, policy: Policy, chains: Mapping[str, Chain], contract: Contract | None
) -> RoundsLeft:
    """Returns how many more rounds of a contract's kind a site's gate would charge to a domain.

    A use charges every domain that shares examples, and each must hold it: the least counts.

    Args:
        domain: whose rounds.
        policy: the site's.
        chains: of the site by domain; one that is missing is not begun yet.
        contract: whose rounds; None, or one without noise, gives None.
    """
    own = chains[domain]
    if contract is None:
        return RoundsLeft(None, None)
    try:
        _check(domain, policy, chains, contract)
    except Refusal as refusal:
        return RoundsLeft(0, contract.sha256, f"no rounds are left of the contract: {refusal}")
    found = {
        name: more_rounds(
            chains.get(name) or budget.unbegun(policy, name, key=own.key),
            policy.domains[name],
            contract,
        )
        for name in policy.charged_domains(domain)
    }
    rounds = {name: number for name, number in found.items() if number is not None}
    least = min(rounds, key=rounds.__getitem__, default=domain)  # of equals the domain itself
    return RoundsLeft(
        rounds.get(least),
        contract.sha256,
        None if least == domain else f"rounds left are those that fit the domain {least!r}",
    )


def _check(domain: str, policy: Policy, chains: Mapping[str, Chain], contract: Contract) -> None:
    """Returns where the gate would take a contract, if the budget held it, and charge a domain.

    Raises:
        Refusal: with the gate's own reason.
    """
    if contract.coordinator not in policy.coordinators:
        raise Refusal(Reason.CONTRACT_UNTRUSTED, "the coordinator's key is not in the policy")
    terms = check(policy, contract)
    if terms.key != chains[domain].key:
        raise Refusal(Reason.NOT_IN_CONTRACT, "the contract lists another key for this site")
    charged = policy.charged_domains(terms.domain)
    if domain not in charged:
        raise Refusal(Reason.POLICY_DOMAIN, f"the contract uses the domain {terms.domain!r}")
    for name in chains.keys() & charged:
        budget.check_kind(chains[name], contract)


def more_rounds(chain: Chain, domain: DomainPolicy, contract: Contract) -> int | None:
    """Returns how many more rounds of a contract's kind fit one domain, evaluations included.

    Args:
        chain: the domain's.
        domain: its limits.
        contract: whose rounds; one without noise gives None.
    """
    if contract.privacy.mechanism == "none":
        return None
    served = (number for name, number in chain.charges if name == contract.sha256)
    number = max(served, default=0)
    every = contract.evaluation.every if contract.evaluation else None

    def ahead(rounds: int) -> tuple[Event, ...]:
        evaluations = (number + rounds) // every - number // every if every else 0
        more = entries.events_of(contract, rounds=rounds, evaluations=evaluations)
        return (*chain.events, *more)

    def fits(rounds: int) -> bool:
        return budget.within(chain, ahead(rounds), domain)

    def may_fit(rounds: int) -> bool:
        order = budget.order_of(chain)
        if order is None:
            return fits(rounds)
        return accounting.filter_epsilon(ahead(rounds), domain.delta, order) <= domain.epsilon

    # The filter alone is a thousand times cheaper, and nearly always what binds.
    most = greatest_that_fits(may_fit, GREATEST)
    return most if most == 0 or fits(most) else greatest_that_fits(fits, most)


def greatest_that_fits(fits: Callable[[int], bool], bound: int) -> int:
    """Returns the greatest number that fits, up to a bound's order, where fewer always fit too."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < bound and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
