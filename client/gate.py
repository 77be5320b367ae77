"""The gate: the only door between a message and the data.

Contract signed? Policy kept? Charge committed? Only then are examples opened. The order at a site:
commit the charge → train → one durable write of update and release hash → send.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bract.client import recovery
from bract.client.book import Book
from bract.client.holdings import Holdings
from bract.client.permits import Permit, permit
from bract.client.training.randomness import Kind
from bract.client.updates import Updates
from bract.shared import arrays
from bract.shared.contract import Contract, SignedContract
from bract.shared.errors import LedgerError, Reason, Refusal, RolledBack, VerificationFailed
from bract.shared.keys import SigningKey
from bract.shared.messages import SignedReceipt, TrainOrder, TrainReply
from bract.shared.policy import Policy, check
from bract.shared.privacy import budget, witness
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import Head, Release
from bract.shared.privacy.ledger import Ledger
from bract.shared.privacy.receipts import Receipt
from bract.shared.privacy.transaction import Transaction
from bract.shared.privacy.witness import Witness
from bract.shared.terms import SiteTerms
from bract.shared.updates import KINDS, ProtectedScore, Update

logger = logging.getLogger("bract.client")


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
    updates: Updates
    holdings: Holdings
    simulation: bool
    randomness: Kind

    @property
    def book(self) -> Book:
        """What writes in the ledger."""
        return Book(self.policy, self.key, self.simulation)

    def admit(self, order: TrainOrder) -> Permit | TrainReply:
        """Returns a permit whose charge is durable, or the stored reply of the same round.

        Raises:
            Refusal: with a reason; nothing was charged.
        """
        terms, weights = self.check(order), arrays.digest(order.weights)
        with as_refusals(), self.ledger.transaction() as transaction:
            answer = self.decide(transaction, terms, order, weights)
            chain = transaction.chain(
                self.policy.site, terms.domain, key=self.key.public, rounds=()
            )
        if isinstance(answer, Permit) and logger.isEnabledFor(logging.INFO):
            self._tell(answer, chain)
        return answer

    def _tell(self, permit: Permit, chain: Chain) -> None:
        """Notes a durable charge in the site's own log."""
        limits = self.policy.domains[chain.domain]
        spent = budget.filtered(chain, limits.delta)
        counted = "by a menu" if spent is None else f"epsilon {spent:.4f} by its filter"
        logger.info(
            "charged attempt %d at round %d of run %r to domain %r: %s, of %s",
            permit.attempt,
            permit.round,
            permit.contract.run,
            chain.domain,
            counted,
            limits.epsilon,
            extra={"event": "charged", "site": self.policy.site, "round": permit.round},
        )

    def check_ledger(self) -> None:
        """Returns where the ledger holds what was seen of it before, on the policy's terms.

        Raises:
            RolledBack: where an older copy was put back; nothing is trained on it.
            UsageError: where the policy departs from what a domain's first entry fixed.
        """
        with self.ledger.transaction() as transaction:
            recovery.check_ledger(self.book, transaction)

    def recover(self, domain: str, lost: Head | None, allowed: float = 0.0) -> float:
        """Returns the ε that a domain counts as spent, now that its ledger lost entries.

        Args:
            domain: whose ledger lost entries.
            lost: the newest entry that is known to be gone, where a head file knew it.
            allowed: the greatest ε that the domain is known to have had, where a head file knew it.

        Raises:
            UsageError: where the domain was recovered before and nothing was lost since.
        """
        with self.ledger.transaction() as transaction:
            return recovery.recover(self.book, transaction, domain, lost, allowed)

    def keep_witness(self, signed: SignedContract, seen: Witness) -> None:
        """Stores the last witness of a run.

        Raises:
            Refusal: where contract or witness is not trusted, the contract charged nothing here,
                or what was seen is not in the chain.
        """
        with as_refusals(), self.ledger.transaction() as transaction:
            self.add_witness(transaction, signed, seen)

    def add_witness(self, transaction: Transaction, signed: SignedContract, seen: Witness) -> None:
        """Stores the last witness of a run within a transaction; raises as `keep_witness` does."""
        terms = self._trusted(signed)
        self._check_witness(signed.contract, terms, seen)
        chain = self.book.chain(transaction, terms.domain, rounds=())
        transaction.keep_witness(seen)
        if not chain.attempts[signed.contract.sha256]:
            # An auditor refuses a witness whose key no contract in the ledger names.
            raise Refusal(Reason.WITNESS_INVALID, "of a contract that charged nothing")

    def release(
        self, permit: Permit, update: Update, score: ProtectedScore | None = None
    ) -> TrainReply:
        """Returns the signed reply once the update's bytes, its hash and the score are durable.

        Raises:
            VerificationFailed: where a score was not charged, or was charged and is missing.
        """
        stored = self.updates.keep(update.arrays)
        with self.ledger.transaction() as transaction:
            return _with_update(self.record(transaction, permit, stored, score), update)

    def record(
        self, transaction: Transaction, permit: Permit, update: str, score: ProtectedScore | None
    ) -> SignedReceipt:
        """Returns the receipt of an update, by its hash, whose release is added to the ledger.

        It may leave once the transaction is committed.

        Raises:
            VerificationFailed: where a score was not charged, or was charged and is missing.
        """
        key = (permit.contract.sha256, permit.round)
        chain = self.book.chain(transaction, permit.terms.domain, rounds=(key,))
        body = self.book.release(transaction, chain, permit, update, score)
        return self._receipt(transaction, chain, permit.contract, body)

    def check(self, order: TrainOrder) -> SiteTerms:
        """Returns this site's terms where the contract's signature and the policy hold.

        Raises:
            Refusal: with a reason; the ledger is not looked at.
        """
        contract, terms = order.contract.contract, self._trusted(order.contract)
        if contract.privacy.randomness != self.randomness:
            raise Refusal(Reason.SIMULATION_ONLY, "the contract asks for another kind of noise")
        self.holdings.check(terms.domain, contract.data)
        if not 1 <= order.round <= contract.rounds:
            raise Refusal(Reason.ROUND_OUT_OF_RANGE, f"round {order.round}")
        if order.witness is not None:
            self._check_witness(contract, terms, order.witness)
        return terms

    def _trusted(self, signed: SignedContract) -> SiteTerms:
        contract = signed.contract
        try:
            if contract.coordinator not in self.policy.coordinators:
                raise VerificationFailed("the coordinator's key is not in the policy")
            signed.verify(contract.coordinator)
        except VerificationFailed as error:
            raise Refusal(Reason.CONTRACT_UNTRUSTED, str(error)) from error
        terms = check(self.policy, contract)
        if terms.key != self.key.public:
            raise Refusal(Reason.NOT_IN_CONTRACT, "the contract lists another key for this site")
        return terms

    def _check_witness(self, contract: Contract, terms: SiteTerms, seen: Witness) -> None:
        try:
            seen.verify(contract.witness or "")
        except VerificationFailed as error:
            raise Refusal(Reason.WITNESS_INVALID, str(error)) from error
        if (seen.site, seen.domain) != (self.policy.site, terms.domain):
            raise Refusal(Reason.WITNESS_INVALID, "a witness of another ledger")

    def decide(
        self, transaction: Transaction, terms: SiteTerms, order: TrainOrder, weights: str
    ) -> Permit | TrainReply:
        """Returns what `admit` does for a checked order, within a transaction.

        Args:
            transaction: of this gate's ledger; what is permitted holds once it is committed.
            terms: as `check` returned them.
            order: what is asked.
            weights: the hash of the order's.

        Raises:
            Refusal: where the budget does not hold it.
            LedgerError, VerificationFailed: where the ledger itself is at fault.
        """
        contract = order.contract.contract
        first, *shared = self.policy.charged_domains(terms.domain)
        unit, key = contract.privacy.unit, (contract.sha256, order.round)
        primary = self.book.chain(transaction, first, unit, rounds=(key,))
        if order.witness is not None:
            transaction.keep_witness(order.witness)
        earlier = primary.charges.get(key, [])
        if earlier and earlier[0].weights != weights:
            raise Refusal(Reason.WEIGHTS_CHANGED, f"round {order.round} came with other weights")
        stored = self._stored(transaction, primary, contract, order.round)
        if stored is not None:
            return stored  # before other chains are begun: it costs nothing and writes nothing
        led_to = primary.led_to.get(contract.sha256, 0)
        if order.round < led_to:
            # Its noise would be new, and so the weights of every later round, which are refused.
            raise Refusal(
                Reason.ROUND_OUT_OF_RANGE,
                f"round {order.round} of a contract that has come to round {led_to} here: the "
                "coordinator's newest run folder must be put back; nothing was charged",
            )
        others = (self.book.chain(transaction, domain, unit, rounds=(key,)) for domain in shared)
        chains = [primary, *others]
        if shared and not all(chain.attempts[contract.sha256] for chain in chains):
            chains = self.book.join(transaction, chains)
        for chain in chains:
            limits = self.policy.domains[chain.domain]
            budget.check_room(chain, contract, limits, round_number=order.round)
        transaction.keep("contract", contract.sha256, order.contract.to_bytes())
        transaction.keep("policy", self.policy.sha256, self.policy.to_bytes())
        for chain in chains:
            self.book.charge(transaction, chain, contract, terms, order.round, weights)
        return permit(self.holdings, contract, terms, order.round, len(chains[0].charges[key]))

    def _stored(
        self, transaction: Transaction, chain: Chain, contract: Contract, round_number: int
    ) -> TrainReply | None:
        """Returns the reply of a round that was released before, from its stored bytes."""
        release = chain.releases.get((contract.sha256, round_number))
        values = self.updates.find(release.update) if release else None
        if release is None or values is None:
            return None
        update = KINDS[contract.privacy.mechanism](values)
        return _with_update(self._receipt(transaction, chain, contract, release), update)

    def _receipt(
        self, transaction: Transaction, chain: Chain, contract: Contract, release: Release
    ) -> SignedReceipt:
        head, site = chain.head, self.policy.site
        assert head is not None  # noqa: S101  something was released
        since = (
            transaction.witness(site, chain.domain, contract.witness) if contract.witness else None
        )
        after = transaction.bodies_after(site, chain.domain, since.sequence if since else -1)
        receipt = Receipt(
            contract=contract.sha256,
            site=site,
            round=release.round,
            attempt=release.attempt,
            update=release.update,
            head_domain=chain.domain,
            head_sequence=head.sequence,
            head_hash=head.hash,
            evaluation=_numbers(release.evaluation),
        )
        return SignedReceipt(
            receipt=receipt,
            signature=self.key.sign(receipt.digest()),
            ledger=witness.show(since, after, contract=contract.sha256),
        )


@contextmanager
def as_refusals() -> Iterator[None]:
    """Turns what is wrong with a ledger into what may leave the site."""
    try:
        yield
    except RolledBack as error:
        raise Refusal(Reason.LEDGER_ROLLED_BACK, str(error)) from error
    except (LedgerError, VerificationFailed) as error:
        raise Refusal(Reason.LEDGER_UNAVAILABLE, str(error)) from error


def _with_update(signed: SignedReceipt, update: Update) -> TrainReply:
    return TrainReply(signed.receipt, signed.signature, signed.ledger, update=update)


def _numbers(pair: list[str] | None) -> tuple[float, float] | None:
    return (float.fromhex(pair[0]), float.fromhex(pair[1])) if pair else None
