"""Domains that share examples: whatever was charged to one of them counts for all, for good."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bract.shared.policy import Policy
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import Charge, event_of, events_joined
from bract.shared.privacy.events import Event, count, merged

# One use of the examples: contract, round, primary domain, policy. The policy says whom it charges.
Use = tuple[str, int, str, str]


@dataclass(frozen=True, slots=True)
class Missing:
    """What a domain does not count of the charges to those that share its examples.

    `events` are merged; `contracts` are the hashes of those that were charged, in order.
    """

    events: tuple[Event, ...]
    contracts: tuple[str, ...]


def uses(chain: Chain) -> Mapping[Use, list[Charge]]:
    """Returns the charges of each use: its attempts, in order."""
    found: dict[Use, list[Charge]] = defaultdict(list)
    for (name, number), charges in chain.charges.items():
        for charge in charges:
            found[name, number, charge.primary, charge.policy].append(charge)
    return found


def missing(chains: Sequence[Chain]) -> dict[str, Missing]:
    """Returns by domain what its chain does not count, nothing of one that counts all.

    A domain that was declared late was not charged when the others were, though some of its
    examples were used. One that was closed counts its whole ceiling, whatever is missing.

    Args:
        chains: of all domains that share examples, each with all its entries.
    """
    held = {chain.domain: uses(chain) for chain in chains}
    most: dict[Use, Chain] = {}
    for chain in chains:
        for use, charges in held[chain.domain].items():
            if use not in most or len(charges) > len(held[most[use].domain][use]):
                most[use] = chain
    found: dict[str, Missing] = {}
    for chain in chains:
        own = held[chain.domain]
        lacking = [
            (other, charge)
            for use, other in most.items()
            for charge in held[other.domain][use][len(own.get(use, ())) :]
        ]
        steps = count(event for other, charge in lacking for event in _costs(other, charge))
        for body in chain.joined:
            steps.subtract(count(events_joined(body)))
        events = merged(steps)
        if events and chain.recovered is None:
            contracts = {charge.contract for _, charge in lacking}
            counted = {name for body in chain.joined for name in body.contracts}
            found[chain.domain] = Missing(events, tuple(sorted(contracts - counted)))
    return found


def parted(domain: str, before: Policy, now: Policy) -> str | None:
    """Returns how a policy parts domains that shared examples under an earlier one, or None.

    What is charged to one would no longer count for the other, and it may share them again later.
    """
    shared = set(now.charged_domains(domain)) if domain in now.domains else set()
    gone = sorted(set(before.charged_domains(domain)) - shared)
    if not gone:
        return None
    return (
        f"domain {domain!r} shared its examples with {gone[0]!r}, and the policy no longer says "
        f"so: put overlaps = [{gone[0]!r}] back; what shared once shares for good"
    )


def _costs(chain: Chain, charge: Charge) -> list[Event]:
    evaluation = chain.evaluations.get(charge.sequence)
    return [event_of(cost) for cost in (charge, evaluation) if cost is not None]
