"""A permit: what a committed charge allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bract.client.holdings import Holdings
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.terms import SiteTerms


@dataclass(frozen=True, slots=True)
class Permit:
    """A committed charge: what it takes to open the data, once, for one attempt at a round."""

    contract: Contract
    terms: SiteTerms
    round: int
    attempt: int
    open_examples: Callable[[], Examples]

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation was charged too, and so must be released."""
        return self.contract.evaluates(self.round)


def permit(
    holdings: Holdings, contract: Contract, terms: SiteTerms, round_number: int, attempt: int
) -> Permit:
    """Returns the permit of a charge that a gate, here or in another process, has committed."""
    return Permit(
        contract=contract,
        terms=terms,
        round=round_number,
        attempt=attempt,
        open_examples=lambda: holdings.open(terms.domain, contract.data),
    )
