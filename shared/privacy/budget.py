"""Does a domain's budget hold a charge? The rule is fixed in the ledger's first entry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from bract.shared.contract import Contract
from bract.shared.errors import Reason, Refusal
from bract.shared.policy import DomainPolicy, Filter, Menu, MenuClass, MenuLeft, Policy
from bract.shared.privacy import accounting, entries
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import NO_PREVIOUS, Genesis
from bract.shared.privacy.events import Event, PoissonGaussian, merge
from bract.shared.privacy.orders import best_order
from bract.shared.terms import ADJACENCY, Unit


def fixed_rule(domain: DomainPolicy) -> dict[str, Any]:
    """Returns the composition rule as genesis records it: a filter's order is settled here."""
    rule = domain.composition
    if isinstance(rule, Filter):
        order = rule.order if rule.order is not None else best_order(domain.epsilon, domain.delta)
        return {"rule": "filter", "order": order}
    return rule.model_dump(mode="json")


def genesis(
    policy: Policy, domain: str, key: str, *, nonce: str, simulation: bool, unit: Unit
) -> Genesis:
    """Returns the first entry of a domain's chain: it fixes what no policy may change later.

    Args:
        policy: the site's.
        domain: of the policy.
        key: the site's.
        nonce: 32 hexadecimal digits that make a ledger begun anew another ledger.
        simulation: whether the ledger is a simulation's.
        unit: what the ledger protects.
    """
    terms = policy.domains[domain]
    return Genesis(
        schema_version=entries.SCHEMA_VERSION,
        site=policy.site,
        key=key,
        domain=domain,
        sequence=0,
        previous=NO_PREVIOUS,
        genesis=NO_PREVIOUS,
        policy=policy.sha256,
        attempt=0,
        kind="genesis",
        nonce=nonce,
        simulation=simulation,
        unit=unit,
        adjacency=ADJACENCY,
        delta=terms.delta.hex(),
        composition=fixed_rule(terms),
    )


def unbegun(policy: Policy, domain: str, *, key: str) -> Chain:
    """Returns the chain that a site's first charge would begin; nothing is written."""
    chain = Chain(site=policy.site, domain=domain, key=key)
    chain.genesis = genesis(policy, domain, key, nonce="0" * 32, simulation=False, unit="example")
    return chain


def order_of(chain: Chain) -> int | None:
    """Returns the order of a chain's filter, or None under a menu."""
    return chain.genesis.composition.get("order") if chain.genesis else None


def filtered(chain: Chain, delta: float, more: Iterable[Event] = ()) -> float | None:
    """Returns ε as a chain's filter counts it, with what more it may hold; None under a menu."""
    order = order_of(chain)
    if order is None:
        return None
    return accounting.filter_epsilon([*chain.events, *more], delta, order)


def of_menu(chain: Chain, delta: float) -> float | None:
    """Returns ε of a chain's whole menu, None under a filter.

    That is what holds of contracts that were chosen after looking at earlier releases: of what a
    menu was used for so far, nothing is proven but that it stopped within the whole.
    """
    steps = menu_left(chain)
    if steps is None:
        return None
    others = [event for event in chain.events if not isinstance(event, PoissonGaussian)]
    return accounting.epsilon([*(_whole(entry) for entry in steps), *others], delta)


def adaptive(chain: Chain, delta: float) -> float | None:
    """Returns the ε that holds however contracts were chosen, by whichever rule the chain has."""
    by_filter = filtered(chain, delta)
    return of_menu(chain, delta) if by_filter is None else by_filter


def menu_left(chain: Chain) -> list[MenuLeft] | None:
    """Returns the classes of a chain's menu with the steps that are left, None under a filter."""
    fixed = chain.genesis.composition if chain.genesis else {}
    if fixed.get("rule") != "menu":
        return None
    taken = {
        (event.sampling_rate, event.noise_multiplier): event.steps
        for event in chain.events
        if isinstance(event, PoissonGaussian)
    }
    return [
        MenuLeft(
            **entry.model_dump(),
            left=max(
                0,
                entry.max_steps - taken.get((entry.sampling_rate, entry.noise_multiplier), 0),
            ),
        )
        for entry in Menu.model_validate(fixed).classes
    ]


def left(chain: Chain, limit: float, spent: float, adaptive: float | None) -> float | None:
    """Returns what a gate may still charge, None where ε has no bound, or a menu has steps left.

    Args:
        chain: of the domain.
        limit: its ε, which neither way of counting may pass.
        spent: ε by PLD.
        adaptive: ε by its filter, or of its whole menu.
    """
    counted = max(spent, adaptive or 0.0)
    if not math.isfinite(counted):
        return None
    # Whatever ε is allowed later, nothing more is charged to a domain that lost entries.
    if chain.recovered is not None:
        return 0.0
    steps = menu_left(chain)
    if steps is None:
        return max(0.0, limit - counted)
    # A menu gives out steps, not ε: each is paid for as long as the whole is within the limit.
    return None if counted <= limit and any(entry.left for entry in steps) else 0.0


def genesis_fault(chain: Chain, policy: Policy) -> str | None:
    """Returns how a policy departs from what its ledger fixed at genesis, or None.

    A rule that could be changed after seeing releases would protect nothing.
    """
    genesis, domain = chain.genesis, policy.domains.get(chain.domain)
    if genesis is None or domain is None:
        return f"domain {chain.domain!r} has no genesis or no policy"
    if genesis.delta != domain.delta.hex():
        return (
            f"domain {chain.domain!r}: the ledger fixed delta {float.fromhex(genesis.delta)}, the "
            f"policy says {domain.delta}; put it back, or begin another domain on other data"
        )
    rule = fixed_rule(domain)
    free = isinstance(domain.composition, Filter) and domain.composition.order is None
    fixed = genesis.composition
    if fixed.get("rule") != rule["rule"] or not (_has_order(fixed) if free else fixed == rule):
        return (
            f"domain {chain.domain!r}: the ledger fixed another composition rule at genesis than "
            "the policy's; put it back, or begin another domain on other data"
        )
    return None


def _has_order(composition: dict[str, Any]) -> bool:
    # Without an order a filter would ask nothing: PLD alone does not cover adaptive contracts.
    try:
        return Filter.model_validate(composition, strict=True).order is not None
    except ValidationError:
        return False


def check_room(
    chain: Chain, contract: Contract, domain: DomainPolicy, *, round_number: int
) -> None:
    """Returns where an attempt at a round of a contract may be charged to a domain.

    At the first charge the WHOLE contract must fit, evaluations, crashed rounds and all, so that a
    run is refused before it costs anything. Later the same sum is asked for, which is remembered
    unless another run has charged the domain since; then the single round must fit.

    Raises:
        Refusal: with a reason that depends on contract, policy and ledger alone.
    """
    check_kind(chain, contract)
    if chain.recovered is not None:
        raise Refusal(
            Reason.BUDGET_EXHAUSTED,
            f"domain {chain.domain!r} lost entries: its whole epsilon counts as spent",
        )
    spent = chain.attempts[contract.sha256]
    if spent >= contract.max_attempts:
        raise Refusal(Reason.ATTEMPTS_EXHAUSTED, f"{contract.max_attempts} charges were made")
    evaluates = contract.evaluates(round_number)
    if evaluates and chain.evaluated[contract.sha256] >= contract.max_evaluations:
        raise Refusal(
            Reason.ATTEMPTS_EXHAUSTED, f"{contract.max_evaluations} evaluations were charged"
        )
    if contract.privacy.mechanism == "none":
        return
    charged = chain.events
    if accounting.is_unbounded(charged):
        raise Refusal(Reason.DOMAIN_UNBOUNDED, f"domain {chain.domain!r} has no finite epsilon")
    choices = [ahead(chain, contract)]
    if spent:
        choices.append(entries.events_of(contract, rounds=1, evaluations=int(evaluates)))
    if not any(within(chain, (*charged, *events), domain) for events in choices):
        raise Refusal(
            Reason.BUDGET_EXHAUSTED,
            f"{1 if spent else contract.max_attempts} rounds more would pass epsilon "
            f"{domain.epsilon} of the domain {chain.domain!r} "
            f"{_counted(chain, choices[-1], domain)}",
        )


def check_kind(chain: Chain, contract: Contract) -> None:
    """Returns where a ledger is of the kind that a contract's mechanism and unit ask for.

    Raises:
        Refusal: with the reason.
    """
    genesis, privacy = chain.genesis, contract.privacy
    secret = privacy.mechanism == "dp-sgd" and privacy.randomness == "csprng"
    if genesis is None or not (genesis.simulation or secret):
        raise Refusal(Reason.SIMULATION_ONLY, "this ledger is not a simulation's")
    if privacy.mechanism != "none" and genesis.unit != privacy.unit:
        raise Refusal(
            Reason.POLICY_MECHANISM,
            f"the ledger of {chain.domain!r} protects each {genesis.unit}, the contract each "
            f"{privacy.unit}",
        )


def _counted(chain: Chain, more: Iterable[Event], domain: DomainPolicy) -> str:
    if not isinstance(domain.composition, Filter):
        return "or one of its menu's caps"
    # A contract tells its ε by PLD: without this, 3.9 of 4 would seem to fit.
    if (filtered(chain, domain.delta, more) or 0.0) > domain.epsilon:
        counts = "its Rényi filter counts, which can be more than PLD's epsilon"
    else:
        counts = "PLD counts on the gate's grid, which can be more than its Rényi filter's epsilon"
    return f"as {counts}; privacy.ceiling in FEDERATION.toml raises σ until a contract fits"


def worst_case(chain: Chain, policies: Mapping[str, Policy]) -> float:
    """Returns the most that a domain may have cost where entries of its ledger were lost.

    Every charge, lost or not, was kept within the ε of the policy of its time. An ε that was
    lowered since does not make earlier charges smaller.

    Args:
        chain: what is left of the ledger.
        policies: by hash; at the least those that genesis, charges and the last entry name.
    """
    charges = [charge for charges in chain.charges.values() for charge in charges]
    named = {charge.policy for charge in charges}
    named |= {entry.policy for entry in (chain.genesis, chain.recovered) if entry is not None}
    limits = [policies[name].domains[chain.domain] for name in named]
    kept = accounting.epsilon(chain.events_until(chain.length), limits[0].delta)
    return max(kept, *(limit.epsilon for limit in limits))


def ahead(chain: Chain, contract: Contract) -> tuple[Event, ...]:
    """Returns the most that a contract may still charge to a domain."""
    return entries.events_of(
        contract,
        rounds=contract.max_attempts - chain.attempts[contract.sha256],
        evaluations=contract.max_evaluations - chain.evaluated[contract.sha256],
    )


def within(chain: Chain, events: Sequence[Event], domain: DomainPolicy) -> bool:
    """Returns whether events keep to a domain's ε under the rule of the chain's genesis."""
    if not isinstance(domain.composition, Filter):
        whole = [_whole(entry) for entry in domain.composition.classes]
        caps = {(event.sampling_rate, event.noise_multiplier): event.steps for event in whole}
        listed = all(
            isinstance(event, PoissonGaussian)
            and event.steps <= caps.get((event.sampling_rate, event.noise_multiplier), 0)
            for event in merge(events)
        )
        # The whole menu within ε covers every order and every early stop of what is on it.
        events = whole
        if not listed:
            return False
    return accounting.fits(events, limit=domain.epsilon, delta=domain.delta, order=order_of(chain))


def _whole(entry: MenuClass) -> PoissonGaussian:
    return PoissonGaussian(entry.sampling_rate, entry.noise_multiplier, entry.max_steps)
