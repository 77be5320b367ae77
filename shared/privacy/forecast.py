"""How far what is left of a budget reaches."""

from __future__ import annotations

from bract.shared.policy import DomainPolicy
from bract.shared.privacy import budget
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import event_of
from bract.shared.privacy.events import PoissonGaussian

GREATEST = 1_000_000


def more_rounds(chain: Chain, domain: DomainPolicy) -> int | None:
    """Returns how many more rounds like the last one fit, None where there was none with noise."""
    last = max(
        (charge for charges in chain.charges.values() for charge in charges),
        key=lambda charge: charge.sequence,
        default=None,
    )
    event = event_of(last) if last is not None else None
    if not isinstance(event, PoissonGaussian):
        return None

    def fits(rounds: int) -> bool:
        ahead = PoissonGaussian(event.sampling_rate, event.noise_multiplier, event.steps * rounds)
        return budget.within(chain, (*chain.events, ahead), domain)

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < GREATEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
