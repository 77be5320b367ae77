"""Local evaluation through the gate: refused by default, charged first, sent again for nothing."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bract.client.gate import Gate
from bract.client.permits import Permit
from bract.client.site import Site, Trainers
from bract.client.training.execution import Execution
from bract.client.training.randomness import SecureRandomness
from bract.shared import wire
from bract.shared.contract import SignedContract
from bract.shared.data import Examples
from bract.shared.errors import Reason, Refusal, VerificationFailed
from bract.shared.messages import RefusalReply, TrainReply
from bract.shared.policy import DomainPolicy, Menu, MenuClass
from bract.shared.privacy import accounting, budget, contents, entries, verification
from bract.shared.privacy.events import PoissonGaussian, merge
from bract.shared.terms import EvaluationTerms
from bract.shared.updates import ProtectedScore, ProtectedUpdate

SIGMA = 4.0
ASKED = EvaluationTerms(every=2, noise_multiplier=SIGMA)
EVENT = PoissonGaussian(1.0, SIGMA, 1)


def asking(world: Any, **changes: Any) -> SignedContract:
    signed: SignedContract = world.sign(world.contract(**{"evaluation": ASKED, **changes}))
    return signed


def allowing(world: Any, **changes: Any) -> Gate:
    gate: Gate = world.gate(policy=world.policy(**{"evaluation": True, **changes}))
    return gate


def site(gate: Gate) -> Site:
    return Site(
        name="alpha", gate=gate, randomness=SecureRandomness(), trainers=Trainers(Execution())
    )


def bodies(world: Any, domain: str = "ward") -> list[dict[str, Any]]:
    rows = contents.read(world.ledger_path).rows.get(("alpha", domain), [])
    return [json.loads(text) for _, text, _ in rows]


def written(world: Any, domain: str = "ward") -> list[tuple[str, int, int]]:
    """Returns (kind, round, attempt) of what is on disk, genesis left out."""
    return [(b["kind"], b["round"], b["attempt"]) for b in bodies(world, domain)[1:]]


def holds(world: Any) -> verification.Verified:
    """Returns what an auditor finds; raises where they do not accept it."""
    found, *_ = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    return found


def refused(gate: Gate, order: Any) -> Reason:
    with pytest.raises(Refusal) as refusal:
        gate.admit(order)
    return refusal.value.reason


def test_a_site_refuses_to_evaluate_unless_its_policy_allows_it(world: Any) -> None:
    signed = asking(world)
    for number in (1, 2):  # the whole contract, and not the evaluated rounds alone
        reply = site(world.gate()).train(world.order(signed, number))
        assert reply == RefusalReply("alpha", number, Reason.POLICY_EVALUATION)
    assert Reason.POLICY_EVALUATION.final
    assert bodies(world) == []
    assert world.opened == 0


def test_an_evaluation_is_charged_right_after_its_round_and_before_any_example_is_opened(
    world: Any,
) -> None:
    seen: list[list[tuple[str, int, int]]] = []

    def examples() -> Examples:
        seen.append(written(world))
        made: Examples = world.examples()
        return made

    served = site(replace(allowing(world), holdings=world.shelf(examples)))
    signed = asking(world)
    for number in (1, 2):
        assert isinstance(served.train(world.order(signed, number)), TrainReply)
    first = [("charge", 1, 1)]
    assert seen == [first, [*first, ("release", 1, 1), ("charge", 2, 1), ("evaluation", 2, 1)]]
    (evaluation,) = (body for body in bodies(world) if body["kind"] == "evaluation")
    assert evaluation["contract"] == signed.contract.sha256
    assert evaluation["event"] == {
        "type": "poisson-gaussian",
        "sampling_rate": (1.0).hex(),
        "noise_multiplier": SIGMA.hex(),
        "steps": 1,
    }
    assert holds(world).chain.events == (PoissonGaussian(0.1, 1.5, 4), EVENT)


def test_two_noised_numbers_leave_and_the_exact_ones_stand_nowhere(
    world: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: list[tuple[int, int]] = []

    def protect(correct: int, total: int, **rest: Any) -> ProtectedScore:
        exact.append((correct, total))
        return ProtectedScore(correct=0.5, total=0.25)

    def examples() -> Examples:
        generator = np.random.default_rng(3)
        return Examples(inputs=generator.random((7919, 64)), targets=np.zeros(7919, dtype=np.int64))

    monkeypatch.setattr("bract.client.training.scoring.protect", protect)
    served = site(replace(allowing(world), holdings=world.shelf(examples)))
    with caplog.at_level(logging.DEBUG):
        reply = served.train(world.order(asking(world), 2))
    assert isinstance(reply, TrainReply)
    assert exact == [(7919, 7919)]
    assert reply.receipt.evaluation == (0.5, 0.25)
    assert bodies(world)[-1]["evaluation"] == [(0.5).hex(), (0.25).hex()]
    receipt = dict(wire.encode_reply(reply)["receipt"])  # type: ignore[call-overload]
    said = (receipt.values(), bodies(world), [record.getMessage() for record in caplog.records])
    assert "7919" not in repr(said)
    assert float(7919).hex() not in repr(said)


def test_a_round_that_is_not_evaluated_says_nothing_of_a_score(world: Any) -> None:
    reply = site(allowing(world)).train(world.order(asking(world), 1))
    assert isinstance(reply, TrainReply)
    assert reply.receipt.evaluation is None
    assert bodies(world)[-1]["evaluation"] is None


def test_an_evaluated_round_that_comes_again_has_the_same_numbers_for_nothing(world: Any) -> None:
    order = world.order(asking(world), 2)
    first = site(allowing(world)).train(order)
    before = bodies(world)
    again = site(allowing(world)).train(order)  # by a site that was started anew
    assert isinstance(first, TrainReply)
    assert isinstance(again, TrainReply)
    assert first.receipt.evaluation is not None
    assert (again.receipt, again.signature) == (first.receipt, first.signature)
    assert bodies(world) == before
    assert world.opened == 1


def test_a_crashed_round_is_charged_again_with_its_evaluation(world: Any) -> None:
    order = world.order(asking(world), 2)
    assert isinstance(allowing(world).admit(order), Permit)  # and then the site crashed
    assert isinstance(site(allowing(world)).train(order), TrainReply)
    paid = [(kind, 2, attempt) for attempt in (1, 2) for kind in ("charge", "evaluation")]
    assert written(world) == [*paid, ("release", 2, 2)]
    assert holds(world).chain.events == (PoissonGaussian(0.1, 1.5, 4), replace(EVENT, steps=2))


@pytest.mark.parametrize(
    ("number", "score"), [(1, ProtectedScore(1.0, 2.0)), (2, None)], ids=["uncharged", "missing"]
)
def test_a_score_is_released_where_it_was_charged_and_nowhere_else(
    world: Any, number: int, score: ProtectedScore | None
) -> None:
    gate, order = allowing(world), world.order(asking(world), number)
    permit = gate.admit(order)
    assert isinstance(permit, Permit)
    before = bodies(world)
    with pytest.raises(VerificationFailed, match="disagree on an evaluation"):
        gate.release(permit, ProtectedUpdate(order.weights), score)
    assert bodies(world) == before


def test_domains_that_share_examples_are_charged_the_evaluation_too(world: Any) -> None:
    domains = {
        "ward": DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=("clinic",)),
        "clinic": DomainPolicy(epsilon=8.0, delta=1e-5),
    }
    gate = allowing(world, domains=domains)
    world.serve(gate, world.order(asking(world), 2))
    charged = [("charge", 2, 1), ("evaluation", 2, 1)]
    assert written(world, "clinic") == charged
    assert written(world) == [*charged, ("release", 2, 1)]
    assert holds(world)


# The budget


def test_the_evaluations_of_the_whole_contract_must_fit_before_its_first_charge(
    world: Any,
) -> None:
    # 5 rounds, 2 of them evaluated, and 2 spare attempts, which may be evaluated too
    whole = [PoissonGaussian(0.1, 1.5, 7 * 2), replace(EVENT, steps=4)]
    least = accounting.filter_epsilon(whole, 1e-5, 12)
    signed = asking(world)
    rule = {"composition": {"rule": "filter", "order": 12}}
    short = allowing(world, domain={**rule, "epsilon": least * 0.9999})
    assert refused(short, world.order(signed)) is Reason.BUDGET_EXHAUSTED
    assert bodies(world) == []
    # without the evaluations it would have fitted
    plain = world.order(world.sign(world.contract()))
    assert isinstance(short.admit(plain), Permit)
    world.ledger_path.unlink()
    enough = allowing(world, domain={**rule, "epsilon": least * 1.0001})
    for number in (1, 2, 2, 2, 3, 4, 5):
        assert isinstance(enough.admit(world.order(signed, number)), Permit)
    assert set(holds(world).chain.events) == set(whole)


def test_a_contract_never_costs_more_than_it_promises_whatever_rounds_are_asked(
    world: Any,
) -> None:
    gate, signed = allowing(world, domain={"epsilon": 20.0}), asking(world)
    promised = entries.events_of_attempts(signed.contract, attempts=7, completed=5)
    for number in (1, 2, 2, 2, 4):
        gate.admit(world.order(signed, number))
    assert refused(gate, world.order(signed, 4)) is Reason.ATTEMPTS_EXHAUSTED
    for number in (5, 5):
        gate.admit(world.order(signed, number))
    assert refused(gate, world.order(signed, 5)) is Reason.ATTEMPTS_EXHAUSTED
    assert set(holds(world).chain.events) == set(promised)


def test_what_was_charged_and_what_lies_ahead_are_always_the_whole_contract(world: Any) -> None:
    gate, signed = allowing(world), asking(world)
    whole = entries.events_of_attempts(signed.contract, attempts=7, completed=5)
    for number in (1, 2, 2, 3, 4, 5):
        gate.admit(world.order(signed, number))
        with gate.ledger.transaction() as transaction:
            chain = transaction.chain("alpha", "ward", key=world.key.public)
            both = (*chain.events, *budget.ahead(chain, signed.contract))
        assert set(merge(both)) == set(whole)


def test_a_single_round_must_fit_with_its_evaluation_once_another_run_took_the_rest(
    world: Any,
) -> None:
    domain = {"composition": {"rule": "filter", "order": 12}}
    signed = asking(world, rounds=5, max_attempts=5)
    whole = entries.events_of_attempts(signed.contract, attempts=5, completed=5)
    limit = accounting.filter_epsilon(whole, 1e-5, 12) * 1.0001
    gate = allowing(world, domain={**domain, "epsilon": limit})
    world.serve(gate, world.order(signed, 1))
    # another run takes what the other rounds need, but for one round without evaluation
    spent = PoissonGaussian(0.1, 1.5, 2)
    for steps in range(1, 40):
        taken = PoissonGaussian(0.1, 1.5, 4 + steps)
        if accounting.filter_epsilon([taken], 1e-5, 12) > limit:
            break
    left = steps - 1
    more = PoissonGaussian(0.1, 1.5, spent.steps + left + 2)
    assert accounting.filter_epsilon([more], 1e-5, 12) <= limit
    assert accounting.filter_epsilon([more, EVENT], 1e-5, 12) > limit
    training = world.contract().training.model_copy(update={"local_steps": left})
    other = world.sign(world.contract(rounds=1, max_attempts=1, training=training))
    world.serve(gate, world.order(other, 1))
    assert refused(gate, world.order(signed, 2)) is Reason.BUDGET_EXHAUSTED
    assert isinstance(gate.admit(world.order(signed, 3)), Permit)
    assert holds(world)


def test_a_menu_lists_evaluations_as_a_class_of_their_own(world: Any) -> None:
    def menu(*, evaluations: int) -> dict[str, DomainPolicy]:
        kinds = ((0.1, 1.5, 14), (1.0, SIGMA, evaluations))
        classes = tuple(
            MenuClass(sampling_rate=rate, noise_multiplier=noise, max_steps=steps)
            for rate, noise, steps in kinds
            if steps
        )
        limits = DomainPolicy(epsilon=8.0, delta=1e-5, composition=Menu(classes=classes))
        return {"ward": limits}

    order = world.order(asking(world), 2)
    for evaluations, reason in ((0, Reason.POLICY_MENU), (3, Reason.BUDGET_EXHAUSTED)):
        gate = allowing(world, domains=menu(evaluations=evaluations))
        assert refused(gate, order) is reason
    world.serve(allowing(world, domains=menu(evaluations=4)), order)
    assert holds(world)
