"""A ledger that lost entries: noticed before anything is served, its domain closed for good."""

from __future__ import annotations

from bract.client.book import Book
from bract.shared.errors import UsageError
from bract.shared.privacy import accounting, budget
from bract.shared.privacy.entries import Head
from bract.shared.privacy.transaction import Transaction


def check_ledger(book: Book, transaction: Transaction) -> None:
    """Returns where the ledger holds what was seen of it before, on the policy's terms.

    Raises:
        RolledBack: where an older copy was put back; nothing is trained on it.
        UsageError: where the policy departs from what a domain's first entry fixed.
    """
    for domain in book.policy.domains:
        chain = transaction.chain(book.policy.site, domain, key=book.key.public)
        fault = book.departure(transaction, chain) if chain.genesis else None
        if fault:  # else every order would be refused, and a run's rounds be void
            raise UsageError(fault)


def recover(
    book: Book, transaction: Transaction, domain: str, lost: Head | None, allowed: float
) -> float:
    """Returns the ε that a domain counts as spent, now that its ledger lost entries.

    Its ceiling is the worst case: the gate kept every charge, the lost ones too, within it.

    Args:
        book: of the site.
        transaction: of its ledger.
        domain: whose ledger lost entries.
        lost: the newest entry that is known to be gone, where a head file knew it.
        allowed: the greatest ε that the domain is known to have had, where a head file knew it.

    Raises:
        UsageError: where the domain was recovered before and nothing was lost since.
    """
    policy = book.policy
    chain = book.chain(transaction, domain)
    closed = accounting.lost(chain.events)
    if closed is not None:
        held = lost and transaction.hash_at(chain.site, domain, lost.sequence)
        if lost is None or held == lost.hash:
            raise UsageError(f"domain {domain!r} is closed already: its ε counts as spent")
        return closed  # killed before the head file could say so
    transaction.keep("policy", policy.sha256, policy.to_bytes())
    named = budget.worst_case(chain, book.policies(transaction, chain))
    ceiling = max(named, allowed, policy.domains[domain].epsilon)
    book.close(transaction, chain, ceiling, lost)
    return ceiling
