"""What a server told an auditor, and whether it holds: chains, countersignatures, receipts.

It trusts no one: what is checked needs the contract alone, and whoever can pins its coordinator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bract.shared.contract import Contract
from bract.shared.errors import VerificationFailed
from bract.shared.privacy import entries, receipts, witness
from bract.shared.privacy.entries import Head
from bract.shared.privacy.receipts import Received, Trace
from bract.shared.privacy.witness import Extension, Witness
from bract.shared.terms import SiteTerms


@dataclass(frozen=True, slots=True)
class Shown:
    """What a server shows of one site: its witnessed head, what leads to it, and updates."""

    head: Witness
    ledger: Extension
    updates: tuple[Received, ...]


@dataclass(frozen=True, slots=True)
class Followed:
    """A site whose links lead to its witnessed head: each entry's hash by its number.

    `paid` counts the updates that stand behind a charge, `shown` the entries whose body is seen.
    """

    heads: Mapping[int, str] = field(repr=False)
    paid: int
    shown: int


def check_witness(seen: Witness, agreed: Contract) -> None:
    """Returns where a head is of a site of the contract, countersigned by its witness.

    Raises:
        VerificationFailed: otherwise.
    """
    terms = agreed.site(seen.site)
    if terms is None or terms.domain != seen.domain:
        raise VerificationFailed(f"a head of {seen.site!r}, which the contract does not list")
    if agreed.witness is None:
        raise VerificationFailed("the contract names no witness, so that no head binds anyone")
    seen.verify(agreed.witness)


def check(shown: Shown, agreed: Contract) -> Followed:
    """Returns what a site's links lead to, where all that a server shows of it holds.

    Raises:
        VerificationFailed: naming the site and the fault.
    """
    site = shown.head.site
    try:
        check_witness(shown.head, agreed)
        terms = agreed.site(site)
        assert terms is not None  # noqa: S101  check_witness asked
        heads, bodies = _follow(shown, agreed)
        for one in shown.updates:
            check_update(one, agreed, terms)
            _check_history(one, heads)
        _check_order(shown.updates)
    except VerificationFailed as error:
        raise VerificationFailed(f"what the server shows of {site!r}: {error}") from error
    return Followed(heads=heads, paid=len(shown.updates), shown=bodies)


def check_update(one: Received, agreed: Contract, terms: SiteTerms) -> Trace:
    """Returns where an update's links lead, where its site signed it and charged for it.

    Raises:
        VerificationFailed: naming the update's round and the fault.
    """
    receipt = one.receipt
    which = f"the update of round {receipt.round}"
    one.verify(terms.key)
    if (receipt.contract, receipt.site, receipt.head_domain) != (
        agreed.sha256,
        terms.name,
        terms.domain,
    ):
        raise VerificationFailed(f"{which} is of another run, site or domain")
    since = one.ledger.since
    if since is not None:
        check_witness(since, agreed)
        if since.site != terms.name:
            raise VerificationFailed(f"{which} came with another site's links")
    found = receipts.trace(receipt, one.ledger, agreed)
    if not found.paid:
        raise VerificationFailed(f"{which} stands behind no charge")
    return found


def check_consistent(first: Witness, second: Witness, links: Sequence[tuple[int, bytes]]) -> None:
    """Returns where links lead from one witnessed head to a later one.

    Args:
        first: the earlier head.
        second: the later head, of the same chain.
        links: the number and the body's hash of each entry after the first.

    Raises:
        VerificationFailed: where they lead elsewhere: entries were taken back.
    """
    reached = first.head
    for number, hashed in links:
        if number != reached.sequence + 1:
            raise VerificationFailed(f"entry {number} does not follow entry {reached.sequence}")
        reached = Head(number, entries.link(reached.hash, hashed))
    if reached != second.head:
        raise VerificationFailed(
            f"the head of {first.site!r}, domain {first.domain!r}, does not extend the one that "
            "was pulled before: entries were taken back"
        )


def _follow(shown: Shown, agreed: Contract) -> tuple[dict[int, str], int]:
    since, heads, bodies = shown.ledger.since, {}, 0
    if since is not None:
        if (since.site, since.domain) != (shown.head.site, shown.head.domain):
            raise VerificationFailed("its links begin at another ledger's head")
        since.verify(shown.head.key)
        heads[since.sequence] = since.hash
    for head, body in witness.follow(shown.ledger):
        heads[head.sequence] = head.hash
        if body is not None:
            bodies += 1
            terms = agreed.site(body.site)
            named = (body.site, body.domain, getattr(body, "contract", agreed.sha256))
            if named != (shown.head.site, shown.head.domain, agreed.sha256) or (
                terms is None or body.key != terms.key
            ):
                raise VerificationFailed(f"entry {head.sequence} is of another run or ledger")
    if heads.get(shown.head.sequence) != shown.head.hash:
        raise VerificationFailed("its links do not lead to the head that was countersigned")
    return heads, bodies


def _check_history(one: Received, heads: Mapping[int, str]) -> None:
    receipt = one.receipt
    # A void round's may go on beyond the head that was witnessed.
    if one.counted and heads.get(receipt.head_sequence, receipt.head_hash) != receipt.head_hash:
        raise VerificationFailed(
            f"the update of round {receipt.round} is of another history than the head"
        )


def _check_order(updates: Sequence[Received]) -> None:
    rounds = [one.receipt.round for one in updates if one.counted]
    if rounds != sorted(set(rounds)):
        raise VerificationFailed("a round is counted twice, or out of order")
