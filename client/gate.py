"""The gate: the only door between a message and the data.

Contract signed? Policy kept? Charge committed? Only then are examples opened. The order at a site:
commit the charge → train → one durable write of update and release hash → send.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bract.client.holdings import Holdings
from bract.client.training.randomness import Kind
from bract.client.updates import Updates
from bract.shared import arrays, canonical, versions
from bract.shared.configuration import parse
from bract.shared.contract import Contract, SignedContract
from bract.shared.data import Examples
from bract.shared.errors import (
    LedgerError,
    Reason,
    Refusal,
    RolledBack,
    UsageError,
    VerificationFailed,
)
from bract.shared.keys import SigningKey
from bract.shared.messages import SignedReceipt, TrainOrder, TrainReply
from bract.shared.policy import Policy, check
from bract.shared.privacy import accounting, budget, entries, events, sharing, witness
from bract.shared.privacy.chain import Chain, RoundKey
from bract.shared.privacy.entries import (
    NO_PREVIOUS,
    Charge,
    Evaluation,
    Genesis,
    Head,
    Joined,
    Recovered,
    Release,
)
from bract.shared.privacy.ledger import Ledger, Transaction
from bract.shared.privacy.receipts import Receipt
from bract.shared.privacy.witness import Witness
from bract.shared.terms import ADJACENCY, SiteTerms, Unit
from bract.shared.updates import KINDS, ProtectedScore, Update

logger = logging.getLogger("bract.client")


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
            for domain in self.policy.domains:
                chain = transaction.chain(self.policy.site, domain, key=self.key.public)
                fault = self._departure(transaction, chain) if chain.genesis else None
                if fault:  # else every order would be refused, and a run's rounds be void
                    raise UsageError(fault)

    def recover(self, domain: str, lost: Head | None, allowed: float = 0.0) -> float:
        """Returns the ε that a domain counts as spent, now that its ledger lost entries.

        Its ceiling is the worst case: the gate kept every charge, the lost ones too, within it.

        Args:
            domain: whose ledger lost entries.
            lost: the newest entry that is known to be gone, where a head file knew it.
            allowed: the greatest ε that the domain is known to have had, where a head file knew it.

        Raises:
            UsageError: where the domain was recovered before and nothing was lost since.
        """
        with self.ledger.transaction() as transaction:
            chain = self._chain(transaction, domain)
            closed = accounting.lost(chain.events)
            if closed is not None:
                held = lost and transaction.hash_at(chain.site, domain, lost.sequence)
                if lost is None or held == lost.hash:
                    raise UsageError(f"domain {domain!r} is closed already: its ε counts as spent")
                return closed  # killed before the head file could say so
            transaction.keep("policy", self.policy.sha256, self.policy.to_bytes())
            named = budget.worst_case(chain, self._policies(transaction, chain))
            ceiling = max(named, allowed, self.policy.domains[domain].epsilon)
            body = Recovered(
                **self._common(chain, 0),
                kind="recovered",
                event=events.encode(events.Spent(ceiling)),
                lost_sequence=lost.sequence if lost else None,
                lost_hash=lost.hash if lost else None,
            )
            transaction.append(chain, body, self.key)
            return ceiling

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
        chain = self._chain(transaction, terms.domain, rounds=())
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
        chain = self._chain(transaction, permit.terms.domain, rounds=(key,))
        body = Release(
            **self._common(chain, permit.attempt),
            kind="release",
            contract=permit.contract.sha256,
            round=permit.round,
            update=update,
            evaluation=[score.correct.hex(), score.total.hex()] if score else None,
        )
        transaction.append(chain, body, self.key)
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
        primary = self._chain(transaction, first, unit, rounds=(key,))
        if order.witness is not None:
            transaction.keep_witness(order.witness)
        earlier = primary.charges.get(key, [])
        if earlier and earlier[0].weights != weights:
            raise Refusal(Reason.WEIGHTS_CHANGED, f"round {order.round} came with other weights")
        stored = self._stored(transaction, primary, contract, order.round)
        if stored is not None:
            return stored  # before other chains are begun: it costs nothing and writes nothing
        others = (self._chain(transaction, domain, unit, rounds=(key,)) for domain in shared)
        chains = [primary, *others]
        if shared and not all(chain.attempts[contract.sha256] for chain in chains):
            chains = self._join(transaction, chains)
        for chain in chains:
            limits = self.policy.domains[chain.domain]
            budget.check_room(chain, contract, limits, round_number=order.round)
        transaction.keep("contract", contract.sha256, order.contract.to_bytes())
        transaction.keep("policy", self.policy.sha256, self.policy.to_bytes())
        for chain in chains:
            self._charge(transaction, chain, contract, terms, order.round, weights)
            if contract.evaluation is not None and contract.evaluates(order.round):
                self._charge_evaluation(transaction, chain, contract, order.round)
        return permit(self.holdings, contract, terms, order.round, len(chains[0].charges[key]))

    def _join(self, transaction: Transaction, chains: Sequence[Chain]) -> list[Chain]:
        """Returns the whole chains of domains that share examples, each counting all charges.

        It is looked for where a contract first charges one of them: only there can domains that
        were charged apart come together.
        """
        whole = [self._chain(transaction, chain.domain) for chain in chains]
        for domain, lacking in sharing.missing(whole).items():
            (chain,) = (chain for chain in whole if chain.domain == domain)
            body = Joined(
                **self._common(chain, 0),
                kind="joined",
                others=sorted(other.domain for other in whole if other is not chain),
                events=[events.encode(event) for event in lacking.events],
                contracts=list(lacking.contracts),
            )
            transaction.append(chain, body, self.key)
        return whole

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
            clipping=entries.clipping_for(contract),
            normaliser=contract.normaliser(terms).hex(),
            sampler="poisson",
            mechanism=privacy.mechanism,
            randomness=privacy.randomness,
            versions=versions.installed(),
        )
        transaction.append(chain, body, self.key)

    def _charge_evaluation(
        self, transaction: Transaction, chain: Chain, contract: Contract, round_number: int
    ) -> None:
        """Adds the evaluation's cost right after the charge of the same attempt."""
        asked = contract.evaluation
        assert asked is not None  # noqa: S101  the caller asked
        attempt = len(chain.charges[contract.sha256, round_number])
        body = Evaluation(
            **self._common(chain, attempt),
            kind="evaluation",
            contract=contract.sha256,
            round=round_number,
            event=entries.evaluation_for(asked),
        )
        transaction.append(chain, body, self.key)

    def _chain(
        self,
        transaction: Transaction,
        domain: str,
        unit: Unit = "example",
        *,
        rounds: Collection[RoundKey] | None = None,
    ) -> Chain:
        """Returns a domain's chain, begun where it is new, its fixed terms held to the policy.

        Its entries are held of `rounds`, of all where that is None.
        """
        key = self.key.public
        chain = transaction.chain(self.policy.site, domain, key=key, rounds=rounds)
        if chain.genesis is None:
            terms = self.policy.domains[domain]
            body = Genesis(
                **self._common(chain, 0),
                kind="genesis",
                nonce=secrets.token_hex(16),  # a ledger begun anew is another ledger
                simulation=self.simulation,
                unit=unit,
                adjacency=ADJACENCY,
                delta=terms.delta.hex(),
                composition=budget.fixed_rule(terms),
            )
            transaction.append(chain, body, self.key)
        elif chain.genesis.simulation != self.simulation:
            raise Refusal(Reason.SIMULATION_ONLY, "a simulation opens no real site's ledger")
        fault = self._departure(transaction, chain)
        if fault:
            raise LedgerError(fault)
        return chain

    def _departure(self, transaction: Transaction, chain: Chain) -> str | None:
        """Returns how the policy departs from what a begun chain fixed, or None."""
        last = chain.policies[-1][1]
        parted = None
        if last != self.policy.sha256:  # the one before it was held to its own earlier ones
            before = self._policy(transaction, last)
            parted = sharing.parted(chain.domain, before, self.policy)
        return budget.genesis_fault(chain, self.policy) or parted

    def _policies(self, transaction: Transaction, chain: Chain) -> dict[str, Policy]:
        """Returns the policies that the entries of a chain name, and the one in force."""
        return {name: self._policy(transaction, name) for _, name in chain.policies} | {
            self.policy.sha256: self.policy
        }

    def _policy(self, transaction: Transaction, sha256: str) -> Policy:
        text = transaction.document("policy", sha256)
        if text is None:
            raise LedgerError(f"the policy {sha256} that entries name is missing")
        return parse(Policy, canonical.decode(text), source="policy")

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
