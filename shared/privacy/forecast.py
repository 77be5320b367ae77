"""How far what is left of a budget reaches."""

from __future__ import annotations

from collections.abc import Callable

from bract.shared.contract import Contract
from bract.shared.policy import DomainPolicy
from bract.shared.privacy import accounting, budget, entries
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.events import Event

GREATEST = 1_000_000


def more_rounds(chain: Chain, domain: DomainPolicy, contract: Contract | None) -> int | None:
    """Returns how many more rounds of a contract's kind fit, evaluations included.

    Args:
        chain: the domain's.
        domain: its limits.
        contract: whose rounds; None, or one without noise, gives None.
    """
    if contract is None or contract.privacy.mechanism == "none":
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
    most = _most(may_fit, GREATEST)
    return most if most == 0 or fits(most) else _most(fits, most)


def _most(fits: Callable[[int], bool], greatest: int) -> int:
    """Returns the greatest number up to a bound's order that fits, where fewer always fit too."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < greatest and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
