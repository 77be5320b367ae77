"""The book: what a site writes in its ledger, each entry of its policy and signed with its key."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from bract.client.permits import Permit
from bract.shared import canonical, versions
from bract.shared.configuration import parse
from bract.shared.contract import Contract
from bract.shared.errors import LedgerError, Reason, Refusal
from bract.shared.keys import SigningKey
from bract.shared.policy import Policy
from bract.shared.privacy import budget, entries, events, sharing
from bract.shared.privacy.chain import Chain, RoundKey
from bract.shared.privacy.entries import (
    NO_PREVIOUS,
    Charge,
    Evaluation,
    Head,
    Joined,
    Recovered,
    Release,
)
from bract.shared.privacy.transaction import Transaction
from bract.shared.terms import SiteTerms, Unit
from bract.shared.updates import ProtectedScore


@dataclass(frozen=True, slots=True, eq=False)
class Book:
    """One site's hand in its ledger.

    Args:
        policy: the site's limits, which every entry names.
        key: signs the entries.
        simulation: whether a chain that is begun here is a simulation's.
    """

    policy: Policy
    key: SigningKey
    simulation: bool

    def chain(
        self,
        transaction: Transaction,
        domain: str,
        unit: Unit = "example",
        *,
        rounds: Collection[RoundKey] | None = None,
    ) -> Chain:
        """Returns a domain's chain, begun where it is new, its fixed terms held to the policy.

        Its entries are held of `rounds`, of all where that is None.

        Raises:
            Refusal: where the ledger is a real site's, and this is a simulation, or the reverse.
            LedgerError: where the policy departs from what the chain fixed.
        """
        key = self.key.public
        chain = transaction.chain(self.policy.site, domain, key=key, rounds=rounds)
        if chain.genesis is None:
            nonce = secrets.token_hex(16)  # a ledger begun anew is another ledger
            body = budget.genesis(
                self.policy, domain, key, nonce=nonce, simulation=self.simulation, unit=unit
            )
            transaction.append(chain, body, self.key)
        elif chain.genesis.simulation != self.simulation:
            raise Refusal(Reason.SIMULATION_ONLY, "a simulation opens no real site's ledger")
        fault = self.departure(transaction, chain)
        if fault:
            raise LedgerError(fault)
        return chain

    def departure(self, transaction: Transaction, chain: Chain) -> str | None:
        """Returns how the policy departs from what a begun chain fixed, or None."""
        last = chain.policies[-1][1]
        parted = None
        if last != self.policy.sha256:  # the one before it was held to its own earlier ones
            before = self._named(transaction, last)
            parted = sharing.parted(chain.domain, before, self.policy)
        return budget.genesis_fault(chain, self.policy) or parted

    def policies(self, transaction: Transaction, chain: Chain) -> dict[str, Policy]:
        """Returns the policies that the entries of a chain name, and the one in force."""
        return {name: self._named(transaction, name) for _, name in chain.policies} | {
            self.policy.sha256: self.policy
        }

    def _named(self, transaction: Transaction, sha256: str) -> Policy:
        text = transaction.document("policy", sha256)
        if text is None:
            raise LedgerError(f"the policy {sha256} that entries name is missing")
        return parse(Policy, canonical.decode(text), source="policy")

    def join(self, transaction: Transaction, chains: Sequence[Chain]) -> list[Chain]:
        """Returns the whole chains of domains that share examples, each counting all charges.

        It is looked for where a contract first charges one of them: only there can domains that
        were charged apart come together.
        """
        whole = [self.chain(transaction, chain.domain) for chain in chains]
        for domain, lacking in sharing.missing(whole).items():
            (chain,) = (chain for chain in whole if chain.domain == domain)
            body = Joined(
                **self.common(chain, 0),
                kind="joined",
                others=sorted(other.domain for other in whole if other is not chain),
                events=[events.encode(event) for event in lacking.events],
                contracts=list(lacking.contracts),
            )
            transaction.append(chain, body, self.key)
        return whole

    def charge(
        self,
        transaction: Transaction,
        chain: Chain,
        contract: Contract,
        terms: SiteTerms,
        round_number: int,
        weights: str,
    ) -> None:
        """Adds the cost of an attempt at a round, and of the evaluation that goes with it."""
        privacy = contract.privacy
        attempt = len(chain.charges.get((contract.sha256, round_number), [])) + 1
        body = Charge(
            **self.common(chain, attempt),
            kind="charge",
            contract=contract.sha256,
            run=contract.run,
            round=round_number,
            primary=terms.domain,
            weights=weights,
            event=entries.event_for(contract),
            clip_norm=privacy.clip_norm.hex(),
            clipping=entries.clipping_for(contract),
            normaliser=contract.normaliser(terms).hex(),
            sampler="poisson",
            mechanism=privacy.mechanism,
            randomness=privacy.randomness,
            versions=versions.installed(),
        )
        transaction.append(chain, body, self.key)
        if contract.evaluation is not None and contract.evaluates(round_number):
            evaluation = Evaluation(
                **self.common(chain, attempt),
                kind="evaluation",
                contract=contract.sha256,
                round=round_number,
                event=entries.evaluation_for(contract.evaluation),
            )
            transaction.append(chain, evaluation, self.key)

    def release(
        self,
        transaction: Transaction,
        chain: Chain,
        permit: Permit,
        update: str,
        score: ProtectedScore | None,
    ) -> Release:
        """Returns the entry, added, of what a permit's attempt lets out of the site."""
        body = Release(
            **self.common(chain, permit.attempt),
            kind="release",
            contract=permit.contract.sha256,
            round=permit.round,
            update=update,
            evaluation=[score.correct.hex(), score.total.hex()] if score else None,
        )
        transaction.append(chain, body, self.key)
        return body

    def close(
        self, transaction: Transaction, chain: Chain, ceiling: float, lost: Head | None
    ) -> None:
        """Adds that a domain lost entries, and counts its ceiling as spent from here on."""
        body = Recovered(
            **self.common(chain, 0),
            kind="recovered",
            event=events.encode(events.Spent(ceiling)),
            lost_sequence=lost.sequence if lost else None,
            lost_hash=lost.hash if lost else None,
        )
        transaction.append(chain, body, self.key)

    def common(self, chain: Chain, attempt: int) -> dict[str, Any]:
        """Returns the fields that every entry has, of the next entry of a chain."""
        return {
            "schema_version": entries.SCHEMA_VERSION,
            "site": self.policy.site,
            "key": self.key.public,
            "domain": chain.domain,
            "sequence": chain.length,
            "previous": chain.head.hash if chain.head else NO_PREVIOUS,
            "genesis": chain.genesis_hash or NO_PREVIOUS,
            "policy": self.policy.sha256,
            "attempt": attempt,
        }
