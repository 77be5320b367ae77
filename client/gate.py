"""The gate: the only door between a message and the data.

Contract signed? Policy kept? Charge committed? Only then are examples opened. The order at a site:
commit the charge → train → one durable write of update and release hash → send.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bract.client.holdings import Holdings
from bract.client.training.randomness import Kind
from bract.client.updates import UpdateStore
from bract.shared import arrays, versions
from bract.shared.contract import ADJACENCY, Contract, SiteTerms
from bract.shared.data import Examples
from bract.shared.errors import LedgerError, Reason, Refusal, VerificationFailed
from bract.shared.keys import SigningKey
from bract.shared.policy import Policy, check
from bract.shared.privacy import budget, entries
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import NO_PREVIOUS, Charge, Genesis, Head, Release
from bract.shared.privacy.ledger import Ledger, Transaction
from bract.shared.updates import ProtectedUpdate, UnprotectedUpdate, Update
from bract.shared.wire import Receipt, TrainOrder, TrainReply


@dataclass(frozen=True, slots=True)
class Permit:
    """A committed charge: what it takes to open the data, once, for one attempt at a round."""

    contract: Contract
    terms: SiteTerms
    round: int
    attempt: int
    open_examples: Callable[[], Examples]


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """One site's gate.

    Args:
        policy: the site's limits.
        key: signs the ledger and the receipts.
        ledger: the site's ledger file.
        updates: where released updates are kept.
        holdings: opens the data of the site; nothing else in a site holds them.
        simulation: whether a ledger that is begun here is a simulation's.
        randomness: the kind of noise this site draws.
    """

    policy: Policy
    key: SigningKey
    ledger: Ledger
    updates: UpdateStore
    holdings: Holdings
    simulation: bool
    randomness: Kind

    def admit(self, order: TrainOrder) -> Permit | TrainReply:
        """Returns a permit whose charge is durable, or the stored reply of the same round.

        Raises:
            Refusal: with a reason; nothing was charged.
        """
        contract, terms = self.check(order)
        weights = arrays.digest(order.weights)
        try:
            with self.ledger.transaction() as transaction:
                return self._decide(transaction, contract, terms, order, weights)
        except (LedgerError, VerificationFailed) as error:
            raise Refusal(Reason.LEDGER_UNAVAILABLE, str(error)) from error

    def release(self, permit: Permit, update: Update) -> TrainReply:
        """Returns the signed reply once the update's bytes and its hash are durable."""
        stored = self.updates.keep(update.arrays)
        with self.ledger.transaction() as transaction:
            chain = self._chain(transaction, permit.terms.domain)
            body = Release(
                **self._common(chain, permit.attempt),
                kind="release",
                contract=permit.contract.sha256,
                round=permit.round,
                update=stored,
            )
            entry = transaction.append(chain, body, self.key)
        head = Head(sequence=entry.body.sequence, hash=entry.hash)
        return self._reply(
            permit.contract, permit.terms, permit.round, permit.attempt, update, head
        )

    def check(self, order: TrainOrder) -> tuple[Contract, SiteTerms]:
        """Returns the contract and this site's terms where signature and policy hold.

        Raises:
            Refusal: with a reason; the ledger is not looked at.
        """
        contract = order.contract.contract
        try:
            if contract.coordinator not in self.policy.coordinators:
                raise VerificationFailed("the coordinator's key is not in the policy")
            order.contract.verify(contract.coordinator)
        except VerificationFailed as error:
            raise Refusal(Reason.CONTRACT_UNTRUSTED, str(error)) from error
        terms = check(self.policy, contract)
        if terms.key != self.key.public:
            raise Refusal(Reason.NOT_IN_CONTRACT, "the contract lists another key for this site")
        if contract.privacy.randomness != self.randomness:
            raise Refusal(Reason.SIMULATION_ONLY, "the contract asks for another kind of noise")
        self.holdings.check(terms.domain, contract.data)
        if not 1 <= order.round <= contract.rounds:
            raise Refusal(Reason.ROUND_OUT_OF_RANGE, f"round {order.round}")
        return contract, terms

    def _decide(
        self,
        transaction: Transaction,
        contract: Contract,
        terms: SiteTerms,
        order: TrainOrder,
        weights: str,
    ) -> Permit | TrainReply:
        first, *shared = self.policy.charged_domains(terms.domain)
        primary, key = self._chain(transaction, first), (contract.sha256, order.round)
        earlier = primary.charges.get(key, [])
        if earlier and earlier[0].weights != weights:
            raise Refusal(Reason.WEIGHTS_CHANGED, f"round {order.round} came with other weights")
        stored = self._stored(primary, contract, terms, order.round)
        if stored is not None:
            return stored  # before other chains are begun: it costs nothing and writes nothing
        chains = [primary, *(self._chain(transaction, domain) for domain in shared)]
        for chain in chains:
            budget.check_room(chain, contract, self.policy.domains[chain.domain])
        transaction.keep("contract", contract.sha256, order.contract.to_bytes())
        transaction.keep("policy", self.policy.sha256, self.policy.to_bytes())
        for chain in chains:
            self._charge(transaction, chain, contract, terms, order.round, weights)
        return Permit(
            contract=contract,
            terms=terms,
            round=order.round,
            attempt=len(primary.charges[key]),
            open_examples=lambda: self.holdings.open(terms.domain),
        )

    def _charge(
        self,
        transaction: Transaction,
        chain: Chain,
        contract: Contract,
        terms: SiteTerms,
        round_number: int,
        weights: str,
    ) -> None:
        privacy = contract.privacy
        attempt = len(chain.charges.get((contract.sha256, round_number), [])) + 1
        body = Charge(
            **self._common(chain, attempt),
            kind="charge",
            contract=contract.sha256,
            run=contract.run,
            round=round_number,
            primary=terms.domain,
            weights=weights,
            event=entries.event_for(contract),
            clip_norm=privacy.clip_norm.hex(),
            clipping="flat-l2" if privacy.mechanism == "dp-sgd" else "none",
            normaliser=contract.normaliser(terms).hex(),
            sampler="poisson",
            mechanism=privacy.mechanism,
            randomness=privacy.randomness,
            versions=versions.installed(),
        )
        transaction.append(chain, body, self.key)

    def _chain(self, transaction: Transaction, domain: str) -> Chain:
        """Returns a domain's chain, begun where it is new, its fixed terms held to the policy."""
        chain = transaction.chain(self.policy.site, domain, key=self.key.public)
        if chain.genesis is None:
            terms = self.policy.domains[domain]
            body = Genesis(
                **self._common(chain, 0),
                kind="genesis",
                nonce=secrets.token_hex(16),  # a ledger begun anew is another ledger
                simulation=self.simulation,
                unit="example",
                adjacency=ADJACENCY,
                delta=terms.delta.hex(),
                composition=budget.fixed_rule(terms),
            )
            transaction.append(chain, body, self.key)
        elif chain.genesis.simulation != self.simulation:
            raise Refusal(Reason.SIMULATION_ONLY, "a simulation opens no real site's ledger")
        fault = budget.genesis_fault(chain, self.policy)
        if fault:
            raise LedgerError(fault)
        return chain

    def _stored(
        self, chain: Chain, contract: Contract, terms: SiteTerms, round_number: int
    ) -> TrainReply | None:
        """Returns the reply of a round that was released before, from its stored bytes."""
        release = chain.releases.get((contract.sha256, round_number))
        values = self.updates.find(release.update) if release else None
        if release is None or values is None or chain.head is None:
            return None
        private = contract.privacy.mechanism == "dp-sgd"
        update = ProtectedUpdate(values) if private else UnprotectedUpdate(values)
        return self._reply(contract, terms, round_number, release.attempt, update, chain.head)

    def _reply(
        self,
        contract: Contract,
        terms: SiteTerms,
        round_number: int,
        attempt: int,
        update: Update,
        head: Head,
    ) -> TrainReply:
        receipt = Receipt(
            contract=contract.sha256,
            site=self.policy.site,
            round=round_number,
            attempt=attempt,
            update=arrays.digest(update.arrays),
            head_domain=terms.domain,
            head_sequence=head.sequence,
            head_hash=head.hash,
        )
        return TrainReply(update=update, receipt=receipt, signature=self.key.sign(receipt.digest()))

    def _common(self, chain: Chain, attempt: int) -> dict[str, Any]:
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
