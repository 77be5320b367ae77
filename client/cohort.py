"""The orders of many sites at once, through the same gates: one transaction for a ledger file.

What one site does by itself, check, charge, commit, train, release, is done here step by step for
all of them, so that a file is made durable once for a cohort's charges and once for its releases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from bract.client.gate import as_refusals
from bract.client.permits import Permit
from bract.client.site import Site
from bract.shared import arrays
from bract.shared.messages import CloseOrder, RefusalReply, SignedReceipt, TrainOrder, TrainReply
from bract.shared.privacy.ledger import Ledger
from bract.shared.privacy.transaction import Transaction
from bract.shared.terms import SiteTerms
from bract.shared.updates import ProtectedScore

T = TypeVar("T")


def admit(asked: Sequence[tuple[Site, TrainOrder]]) -> list[Permit | TrainReply | RefusalReply]:
    """Returns what each site's gate says to its order, once every charge is durable.

    A site that refuses leaves the others' charges as they are.

    Args:
        asked: orders that share their weights share one hash and one look at them.
    """
    weights: dict[int, str] = {}

    def decide(transaction: Transaction, place: int) -> Permit | TrainReply:
        site, order = asked[place]
        return site.gate.decide(transaction, terms[place], order, weights[id(order.weights)])

    def check(place: int) -> SiteTerms:
        site, order = asked[place]
        found = site.gate.check(order)
        site.check_failed(found)
        if id(order.weights) not in weights:
            site.trainers.of(order.contract.contract).check(order.weights)
            weights[id(order.weights)] = arrays.digest(order.weights)
        return found

    answers: dict[int, Permit | TrainReply | RefusalReply] = {}
    terms: dict[int, SiteTerms] = {}
    for place, (site, order) in enumerate(asked):
        try:
            terms[place] = check(place)
        except Exception as error:
            answers[place] = site.refusal(error, order.round)
    answers |= _each(asked, list(terms), decide)
    return [answers[place] for place in range(len(asked))]


def release(
    transaction: Transaction,
    site: Site,
    permit: Permit,
    update: str,
    score: ProtectedScore | None,
) -> SignedReceipt | RefusalReply:
    """Returns the receipt of an update, by its hash; it may leave once the transaction commits."""
    try:
        with transaction.part():
            return site.gate.record(transaction, permit, update, score)
    except Exception as error:  # site-failed: a refusal for the ledger's sake charges nothing
        return site.refusal(error, permit.round)


def close(asked: Sequence[tuple[Site, CloseOrder]]) -> list[str | RefusalReply]:
    """Returns the name of each site that keeps the last witness of a run, or its refusal."""

    def keep(transaction: Transaction, place: int) -> str:
        site, order = asked[place]
        site.gate.add_witness(transaction, order.contract, order.witness)
        return site.name

    answers = _each(asked, range(len(asked)), keep)
    return [answers[place] for place in range(len(asked))]


def _each(
    asked: Sequence[tuple[Site, TrainOrder]] | Sequence[tuple[Site, CloseOrder]],
    places: Sequence[int],
    act: Callable[[Transaction, int], T],
) -> dict[int, T | RefusalReply]:
    """Returns what acting on each site's ledger gives, file by file, each file once."""
    answers: dict[int, T | RefusalReply] = {}
    files: dict[int, tuple[Ledger, list[int]]] = {}
    for place in places:
        ledger = asked[place][0].gate.ledger
        files.setdefault(id(ledger), (ledger, []))[1].append(place)

    def refused(place: int, error: Exception) -> RefusalReply:
        site, order = asked[place]
        return site.refusal(error, getattr(order, "round", 0))

    for ledger, members in files.values():
        try:
            with as_refusals(), ledger.transaction() as transaction:
                for place in members:
                    try:
                        with transaction.part(), as_refusals():
                            answers[place] = act(transaction, place)
                    except Exception as error:
                        answers[place] = refused(place, error)
        except Exception as error:  # the file cannot be written: nothing in it was charged
            answers |= {place: refused(place, error) for place in members}
    return answers
