"""What the server takes of a local evaluation, and the one number that it makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from bract.client.gate import Gate
from bract.server import fairness
from bract.server.strategy import INVALID_UPDATE, PublicFedAvg
from bract.server.witnesses import WitnessDesk
from bract.shared import keys, wire
from bract.shared.contract import Contract, SignedContract
from bract.shared.errors import VerificationFailed
from bract.shared.messages import TrainReply
from bract.shared.privacy.receipts import Receipt
from bract.shared.reports.runs import LocalAccuracy
from bract.shared.terms import EvaluationTerms, SiteTerms
from bract.simulations.grid import LocalGrid

WITNESS = keys.generate()
SHAPES = {"1.weight": (10, 64), "1.bias": (10,)}


@pytest.fixture
def signed(world: Any) -> SignedContract:
    asked = EvaluationTerms(every=2, noise_multiplier=4.0)
    made: SignedContract = world.sign(world.contract(evaluation=asked, witness=WITNESS.public))
    return made


@pytest.fixture
def gate(world: Any) -> Gate:
    made: Gate = world.gate(policy=world.policy(evaluation=True))
    return made


def with_evaluation(world: Any, reply: TrainReply, pair: Any) -> TrainReply:
    """Returns a reply that a dishonest site signed, with other numbers."""
    receipt = replace(reply.receipt, evaluation=pair)
    return replace(reply, receipt=receipt, signature=world.key.sign(receipt.digest()))


def taken(
    signed: SignedContract, content: RecordDict, number: int, key: keys.SigningKey | None = WITNESS
) -> PublicFedAvg:
    """Returns a strategy that has heard of this one answer, over the grid."""

    def client(message: Message, context: Any) -> Message:
        return Message(content, reply_to=message)

    grid = LocalGrid(client, [{}], workers=1)  # type: ignore[arg-type]
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(key))
    sent = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
    strategy.aggregate_train(number, grid.send_and_receive(sent))
    return strategy


def test_the_pair_arrives_as_the_site_signed_it(
    world: Any, signed: SignedContract, gate: Gate
) -> None:
    reply = world.serve(gate, world.order(signed, 2))
    strategy = taken(signed, wire.encode_reply(reply), 2)
    assert strategy.refused == []
    assert strategy.replied["alpha"].evaluation == (70.25, 101.5)


@pytest.mark.parametrize(
    ("number", "pair"),
    [(1, (70.0, 100.0)), (2, None), (2, (70.25, 101.0)), (2, (101.5, 70.25))],
    ids=["not asked", "missing", "not the ledger's", "exchanged"],
)
def test_an_evaluation_unlike_contract_or_ledger_is_not_used(
    world: Any, signed: SignedContract, gate: Gate, number: int, pair: Any
) -> None:
    reply = with_evaluation(world, world.serve(gate, world.order(signed, number)), pair)
    strategy = taken(signed, wire.encode_reply(reply), number)
    assert [reason for _, reason in strategy.refused] == [INVALID_UPDATE]
    assert strategy.replied == {}


@pytest.mark.parametrize(("number", "pair"), [(1, (70.0, 100.0)), (2, None)])
def test_contract_and_round_decide_where_no_ledger_is_witnessed(
    world: Any, signed: SignedContract, gate: Gate, number: int, pair: Any
) -> None:
    reply = with_evaluation(world, world.serve(gate, world.order(signed, number)), pair)
    strategy = taken(signed, wire.encode_reply(reply), number, key=None)
    assert [reason for _, reason in strategy.refused] == [INVALID_UPDATE]


@pytest.mark.parametrize(
    "pair",
    [[math.nan, 1.0], [1.0, math.inf], [-math.inf, 1.0], [1e300, 1.0], [1.0], [1.0] * 3, [1, 2],
     ["1", "2"], 1.0, b""],
    ids=str,
)  # fmt: skip
def test_what_is_no_pair_of_counts_is_refused_at_the_wire(
    world: Any, signed: SignedContract, gate: Gate, pair: Any
) -> None:
    content = wire.encode_reply(world.serve(gate, world.order(signed, 2)))
    content["receipt"] = ConfigRecord({**dict(content["receipt"]), "evaluation": pair})  # type: ignore[call-overload]
    with pytest.raises(VerificationFailed):
        wire.decode_reply(content)
    assert [reason for _, reason in taken(signed, content, 2).refused] == [INVALID_UPDATE]


@pytest.mark.parametrize("pair", [None, (3.5, -2.25), (0.0, 0.0)])
def test_a_pair_or_none_survives_the_wire_and_is_covered_by_the_signature(
    world: Any, signed: SignedContract, gate: Gate, pair: Any
) -> None:
    reply = with_evaluation(world, world.serve(gate, world.order(signed, 2)), pair)
    again = wire.decode_reply(wire.encode_reply(reply))
    assert isinstance(again, TrainReply)
    assert again.receipt == reply.receipt
    again.verify(world.key.public)
    other = replace(again.receipt, evaluation=(3.5, -2.0))
    with pytest.raises(VerificationFailed):
        replace(again, receipt=other).verify(world.key.public)


def test_a_release_counts_only_where_its_evaluation_was_charged(
    world: Any, signed: SignedContract, gate: Gate
) -> None:
    reply = world.serve(gate, world.order(signed, 2))
    WitnessDesk(WITNESS).check(reply, "ward", signed.contract)
    # the evaluation's entry, behind its hash alone
    links = list(reply.ledger.links)
    (place,) = (i for i, link in enumerate(links) if b'"kind":"evaluation"' in link.body)
    links[place] = replace(links[place], body=b"")
    hidden = replace(reply, ledger=replace(reply.ledger, links=tuple(links)))
    with pytest.raises(VerificationFailed, match="no charge stands before"):
        WitnessDesk(WITNESS).check(hidden, "ward", signed.contract)
    # an evaluation that was charged at another price than the contract's
    dearer = signed.contract.evaluation.model_copy(update={"noise_multiplier": 0.5})
    agreed = signed.contract.model_copy(update={"evaluation": dearer})
    with pytest.raises(VerificationFailed, match="no charge stands before"):
        WitnessDesk(WITNESS).check(reply, "ward", agreed)


def receipts(*pairs: tuple[float, float] | None) -> dict[str, Receipt]:
    """Returns the receipts of site-0, site-1 and on."""
    names = [f"site-{place}" for place in range(len(pairs))]
    facts: Callable[[Any], Receipt] = lambda pair: Receipt(  # noqa: E731
        contract="c" * 64,
        site="alpha",
        round=2,
        attempt=1,
        update="0" * 64,
        head_domain="ward",
        head_sequence=1,
        head_hash="0" * 64,
        evaluation=pair,
    )
    return {name: facts(pair) for name, pair in zip(names, pairs, strict=True)}


def agreed(world: Any, *sizes: int) -> Contract:
    """Returns a contract of σ 4 with site-0, site-1 and on, of these nominal sizes."""
    cohort = tuple(
        SiteTerms(name=f"site-{place}", key=world.key.public, domain="ward", nominal_size=size)
        for place, size in enumerate(sizes)
    )
    asked = EvaluationTerms(every=2, noise_multiplier=4.0)
    made: Contract = world.contract(evaluation=asked, cohort=cohort)
    return made


@pytest.mark.parametrize(
    ("pairs", "accuracy"),
    [
        ([(30.0, 40.0), (10.0, 60.0)], 0.4),
        ([(30.0, 40.0), None], 0.75),
        ([(50.0, 40.0)], 1.0),
        ([(-1.0, 40.0)], 0.0),
        ([(1.0, -40.0)], None),
        ([(1.0, 0.0)], None),
        ([None], None),
        ([], None),
        ([(2.0**53, 2.0**53)] * 9, 1.0),
    ],
)
def test_local_accuracy_is_the_ratio_of_the_sums_within_0_and_1(
    world: Any, pairs: Any, accuracy: float | None
) -> None:
    found = fairness.of_round(receipts(*pairs), agreed(world, *[100] * max(len(pairs), 1)))
    assert found.local_accuracy == accuracy


def test_the_worst_site_is_named_with_the_error_that_its_noise_gives(world: Any) -> None:
    pairs = [(90.0, 100.0), (130.0, 200.0), (9.0, -3.0), (60.0, 50.0), None]
    found = fairness.of_round(receipts(*pairs), agreed(world, 100, 200, 10, 50, 100))
    assert (found.local_accuracy_worst_site, found.local_accuracy_worst) == ("site-1", 0.65)
    by_site = {"site-0": 0.9, "site-1": 0.65, "site-2": None, "site-3": 1.0}
    assert found.local_accuracy_by_site == by_site
    assert found.local_accuracy_error_by_site == {
        "site-0": 0.08,
        "site-1": 0.04,
        "site-2": 0.8,
        "site-3": 0.16,
    }


@pytest.mark.parametrize("pairs", [[(9.0, -3.0), (1.0, 0.0)], [None, None]])
def test_no_site_is_the_worst_where_noise_or_contract_left_none(world: Any, pairs: Any) -> None:
    found = fairness.of_round(receipts(*pairs), agreed(world, 100, 100))
    assert found.local_accuracy_worst is None
    assert found.local_accuracy_worst_site is None


def test_a_summary_takes_the_last_round_that_asked() -> None:
    nothing: dict[str, Any] = LocalAccuracy().model_dump()
    asked = {**nothing, "local_accuracy": 0.5, "local_accuracy_by_site": {"alpha": 0.5}}
    lines = [{"round": 1, **asked}, {"round": 2, **asked}, {"round": 3, **nothing}, {"round": 4}]
    assert fairness.last(lines) == {**asked, "local_accuracy_round": 2}
    assert fairness.last(lines[2:]) == {}
