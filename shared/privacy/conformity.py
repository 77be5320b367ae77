"""Do a chain's charges keep to the contracts and policies that they name?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from bract.shared.contract import Contract
from bract.shared.errors import Refusal, VerificationFailed
from bract.shared.policy import Policy, check_charged
from bract.shared.privacy import accounting, budget, entries, sharing
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import Charge, Evaluation

# ε is a float that another version of an accountant may round differently.
TOLERANCE = 1e-6


def check_policies(chain: Chain, policies: Mapping[str, Policy]) -> set[tuple[str, str]]:
    """Returns the policies that a chain's entries name, as a ledger stores them.

    Raises:
        VerificationFailed: where one is missing, is of another domain, departs from what the
            domain's first entry fixed, or was charged over.
    """
    named = {sha256 for _, sha256 in chain.policies}
    for sha256 in sorted(named):
        policy = policies.get(sha256)
        if policy is None:
            raise VerificationFailed(f"the policy {sha256} that entries name is missing")
        if policy.site != chain.site or chain.domain not in policy.domains:
            raise VerificationFailed(f"the policy {sha256} is of another site or domain")
        fault = budget.genesis_fault(chain, policy)
        if fault:
            raise VerificationFailed(fault)
    for (_, before), (entry, now) in pairwise(chain.policies):
        fault = sharing.parted(chain.domain, policies[before], policies[now])
        if fault:
            raise VerificationFailed(f"ledger of {chain.site!r}, entry {entry}: {fault}")
    ceiling = accounting.lost(chain.events)
    if ceiling is not None and ceiling < budget.worst_case(chain, policies) * (1 - TOLERANCE):
        raise VerificationFailed(
            f"ledger of {chain.site!r}, domain {chain.domain!r}: recovered at epsilon {ceiling:g}, "
            "which is under what its policies allowed"
        )
    last_charges: dict[str, int] = {}
    for cost in chain.costs():
        last_charges[cost.policy] = max(cost.sequence, last_charges.get(cost.policy, 0))
    for sha256, last in last_charges.items():
        # Raising a ceiling is the operator's right, but not after it was passed.
        spent, domain = chain.events_until(last), policies[sha256].domains[chain.domain]
        if not accounting.is_unbounded(spent) and not budget.within(chain, spent, domain):
            raise VerificationFailed(
                f"ledger of {chain.site!r}, domain {chain.domain!r}: its charges up to entry "
                f"{last} are over the policy's epsilon {domain.epsilon}"
            )
    return {("policy", sha256) for sha256 in named}


def check_contracts(
    chain: Chain, contracts: Mapping[str, Contract], policies: Mapping[str, Policy]
) -> set[tuple[str, str]]:
    """Returns the contracts that a chain's charges name, as a ledger stores them.

    Raises:
        VerificationFailed: where one is missing, or a charge departs from it or from its policy.
    """
    used = set()
    for charges in chain.charges.values():
        for charge in charges:
            agreed = contracts.get(charge.contract)
            if agreed is None:
                raise VerificationFailed(f"the contract {charge.contract} of a charge is missing")
            fault = _departure(charge, agreed, policies[charge.policy]) or _misjudged(
                charge, chain.evaluations.get(charge.sequence), agreed
            )
            if fault:
                raise VerificationFailed(
                    f"ledger of {chain.site!r}, domain {chain.domain!r}, entry {charge.sequence}: "
                    f"{fault}"
                )
            used.add(("contract", charge.contract))
    for name in {name for body in chain.joined for name in body.contracts}:
        if name not in contracts:
            raise VerificationFailed(f"the contract {name} of charges that were joined is missing")
    for name, attempts in chain.attempts.items():
        if attempts > contracts[name].max_attempts:
            raise VerificationFailed(f"more charges than the contract {name} allows")
        if chain.evaluated[name] > contracts[name].max_evaluations:
            raise VerificationFailed(f"more evaluations than the contract {name} allows")
    return used


def _misjudged(charge: Charge, found: Evaluation | None, agreed: Contract) -> str | None:
    """Returns how the evaluation that stands beside a charge departs from the contract, or None."""
    asked = agreed.evaluation if agreed.evaluates(charge.round) else None
    if asked is None:
        return None if found is None else "an evaluation that the contract does not ask for"
    if found is None:
        return "the contract asks for an evaluation, and none is charged"
    if found.event != entries.evaluation_for(asked):
        return "the evaluation's event is not the contract's"
    return None


def _departure(charge: Charge, agreed: Contract, policy: Policy) -> str | None:
    """Returns how a charge departs from its contract or policy, or None."""
    terms = agreed.site(charge.site)
    if terms is None or terms.key != charge.key or terms.domain != charge.primary:
        return "the contract does not list this site, key and domain"
    if agreed.coordinator not in policy.coordinators:
        return "the contract's coordinator is not in the policy"
    try:
        check_charged(policy, agreed)
    except Refusal as refusal:
        return f"the policy does not allow the contract ({refusal.reason})"
    if charge.domain not in policy.charged_domains(charge.primary):
        return "charges a domain that the policy does not share"
    privacy = agreed.privacy
    expected = {
        "run": agreed.run,
        "event": entries.event_for(agreed),
        "clip_norm": privacy.clip_norm.hex(),
        "clipping": entries.clipping_for(agreed),
        "normaliser": agreed.normaliser(terms).hex(),
        "mechanism": privacy.mechanism,
        "randomness": privacy.randomness,
    }
    different = [name for name, value in expected.items() if getattr(charge, name) != value]
    if different:
        return f"{different[0]} is not the contract's"
    if charge.round > agreed.rounds:
        return f"round {charge.round} is over the contract's {agreed.rounds}"
    return None


def check_overlaps(chains: Mapping[tuple[str, str], Chain], policies: Mapping[str, Policy]) -> None:
    """Returns where every charge stands equally often in its domain and in all that share with it.

    And each of them counts what the others were charged before they shared examples.

    Raises:
        VerificationFailed: naming the entry that lacks its counterpart, or the domain.
    """
    held = {name: sharing.uses(chain) for name, chain in chains.items()}
    together: set[tuple[str, frozenset[str]]] = set()
    for (site, domain), uses in held.items():
        for use, charges in uses.items():
            _, _, primary, policy = use
            for other in policies[policy].charged_domains(primary):
                there = held.get((site, other), {}).get(use, [])
                if len(there) < len(charges):
                    raise VerificationFailed(
                        f"ledger of {site!r}, domain {domain!r}, entry "
                        f"{charges[len(there)].sequence}: has no counterpart in the domain "
                        f"{other!r}"
                    )
        if (last := chains[site, domain].last_charge) is not None:
            shared = policies[last.policy].charged_domains(last.primary)
            together.add((site, frozenset(shared)))
    for site, domains in sorted(together, key=repr):
        for domain in sharing.missing([chains[site, name] for name in sorted(domains)]):
            raise VerificationFailed(
                f"ledger of {site!r}, domain {domain!r}: does not count what the domains that "
                "share its examples were charged before; the next charge of a contract adds it"
            )
