"""How far what is left of a budget reaches."""

from __future__ import annotations

from bract.shared.contract import Contract
from bract.shared.policy import DomainPolicy
from bract.shared.privacy import budget, entries
from bract.shared.privacy.chain import Chain

GREATEST = 1_000_000


def more_rounds(chain: Chain, domain: DomainPolicy, contract: Contract | None) -> int | None:
    """Returns how many more rounds of the last run's kind fit, evaluations included.

    Args:
        chain: the domain's.
        domain: its limits.
        contract: of the last charge; None, or one without noise, gives None.
    """
    last = chain.last_charge
    if last is None or contract is None or contract.privacy.mechanism == "none":
        return None
    number, every = last.round, contract.evaluation.every if contract.evaluation else None

    def fits(rounds: int) -> bool:
        ahead = entries.events_of(
            contract,
            rounds=rounds,
            evaluations=(number + rounds) // every - number // every if every else 0,
        )
        return budget.within(chain, (*chain.events, *ahead), domain)

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < GREATEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
