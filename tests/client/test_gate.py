"""The one door to the data: what it charges, what it refuses, and what a refusal tells."""

from __future__ import annotations

import json
import logging
import sqlite3
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bract.client import cohort
from bract.client.gate import Gate
from bract.client.permits import Permit
from bract.client.site import Site, Trainers
from bract.client.training.execution import Execution
from bract.client.training.randomness import SecureRandomness
from bract.client.updates import UpdateStore
from bract.shared import arrays, keys, wire
from bract.shared.contract import SignedContract
from bract.shared.errors import Reason, Refusal, UsageError, VerificationFailed
from bract.shared.messages import RefusalReply, TrainOrder, TrainReply
from bract.shared.policy import DomainPolicy, Menu, MenuClass
from bract.shared.privacy import accounting, contents, verification
from bract.shared.privacy.events import PoissonGaussian
from bract.shared.privacy.ledger import Ledger
from bract.shared.privacy.orders import best_order
from bract.shared.terms import ModelTerms, PrivacyTerms, TrainingTerms
from bract.shared.updates import ProtectedUpdate, UnprotectedUpdate


def written(world: Any) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Returns the bodies on disk, read by a connection of its own."""
    rows = contents.read(world.ledger_path).rows
    return {name: [json.loads(text) for _, text, _ in stored] for name, stored in rows.items()}


def charges(world: Any, domain: str = "ward") -> list[tuple[int, int]]:
    """Returns (round, attempt) of the charges on disk."""
    bodies = written(world).get(("alpha", domain), [])
    return [(body["round"], body["attempt"]) for body in bodies if body["kind"] == "charge"]


def holds(world: Any) -> bool:
    """Returns whether an auditor accepts what is on disk; raises where not."""
    return bool(
        verification.verify(world.ledger_path, site_keys={"alpha": world.key.public}, anchors={})
    )


def refused(gate: Gate, order: TrainOrder) -> Reason:
    with pytest.raises(Refusal) as refusal:
        gate.admit(order)
    return refusal.value.reason


def site(world: Any, gate: Gate) -> Site:
    return Site(
        name="alpha", gate=gate, randomness=SecureRandomness(), trainers=Trainers(Execution())
    )


def menu(*caps: int, epsilon: float = 8.0) -> DomainPolicy:
    classes = tuple(
        MenuClass(sampling_rate=0.1, noise_multiplier=1.5 + number, max_steps=cap)
        for number, cap in enumerate(caps)
    )
    return DomainPolicy(epsilon=epsilon, delta=1e-5, composition=Menu(classes=classes))


# The charge and the data


def test_a_charge_is_on_disk_before_any_example_is_opened(world: Any) -> None:
    seen: list[list[tuple[int, int]]] = []

    def examples() -> Any:
        seen.append(charges(world))
        return world.examples()

    served = site(world, replace(world.gate(), holdings=world.shelf(examples)))
    signed = world.sign(world.contract())
    for number in (1, 2):
        order = world.order(signed, number)
        assert isinstance(served.train(order), TrainReply)
    assert seen == [[(1, 1)], [(1, 1), (2, 1)]]


def test_a_charge_records_what_the_contract_says_and_nothing_of_the_data(world: Any) -> None:
    agreed = world.contract()
    gate, order = world.gate(), world.order(world.sign(agreed), 2)
    permit = gate.admit(order)
    assert isinstance(permit, Permit)
    assert (permit.round, permit.attempt, permit.terms) == (2, 1, agreed.cohort[0])
    genesis, charge = written(world)["alpha", "ward"]
    assert genesis["simulation"] is False
    assert genesis["delta"] == (1e-5).hex()
    assert genesis["adjacency"] == "add-or-remove-one"
    assert charge["event"] == {
        "type": "poisson-gaussian",
        "sampling_rate": (0.1).hex(),
        "noise_multiplier": (1.5).hex(),
        "steps": 2,
    }
    facts = {
        "contract": agreed.sha256,
        "weights": arrays.digest(order.weights),
        "clip_norm": (1.0).hex(),
        "normaliser": (0.1 * 100).hex(),
        "policy": world.policy().sha256,
        "randomness": "csprng",
    }
    assert {name: charge[name] for name in facts} == facts
    assert world.opened == 0


def test_a_served_run_verifies_and_costs_what_its_rounds_cost(world: Any) -> None:
    gate, signed = world.gate(), world.sign(world.contract())
    for number in range(1, 6):
        reply = world.serve(gate, world.order(signed, number))
        reply.verify(world.key.public)
        assert (reply.receipt.round, reply.receipt.head_domain) == (number, "ward")
    assert holds(world)
    with gate.ledger.transaction() as transaction:
        chain = transaction.chain("alpha", "ward", key=world.key.public)
    assert chain.events == (PoissonGaussian(0.1, 1.5, 10),)
    assert (chain.head.sequence, chain.head.hash) == (
        reply.receipt.head_sequence,
        reply.receipt.head_hash,
    )


# Whom and what it refuses, at no cost


def by_another_coordinator(world: Any) -> SignedContract:
    world.coordinator = keys.generate()
    return world.sign(world.contract())


def altered(world: Any) -> SignedContract:
    signed = world.sign(world.contract())
    return signed.model_copy(update={"contract": world.contract(rounds=6)})


def signed_by_another(world: Any) -> SignedContract:
    signed = world.sign(world.contract())
    other = world.sign(world.contract())
    return signed.model_copy(update={"signature": other.signature})


def of_another_site(world: Any) -> SignedContract:
    agreed = world.contract()
    site = agreed.cohort[0].model_copy(update={"name": "beta"})
    return world.sign(agreed.model_copy(update={"cohort": (site,)}))


def of_another_key(world: Any) -> SignedContract:
    agreed = world.contract()
    site = agreed.cohort[0].model_copy(update={"key": keys.generate().public})
    return world.sign(agreed.model_copy(update={"cohort": (site,)}))


def of_another_domain(world: Any) -> SignedContract:
    agreed = world.contract()
    site = agreed.cohort[0].model_copy(update={"domain": "clinic"})
    return world.sign(agreed.model_copy(update={"cohort": (site,)}))


def terms(**changes: Any) -> Any:
    return lambda world: world.sign(world.contract(**changes))


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (by_another_coordinator, Reason.CONTRACT_UNTRUSTED),
        (altered, Reason.CONTRACT_UNTRUSTED),
        (signed_by_another, Reason.CONTRACT_UNTRUSTED),
        (of_another_site, Reason.NOT_IN_CONTRACT),
        (of_another_key, Reason.NOT_IN_CONTRACT),
        (of_another_domain, Reason.POLICY_DOMAIN),
        (terms(model=ModelTerms(name="os:getcwd")), Reason.POLICY_MODEL),
        (terms(simulation=True, privacy={"mechanism": "none"}), Reason.POLICY_MECHANISM),
        (terms(privacy={"noise_multiplier": 0.29}), Reason.POLICY_NOISE),
        (terms(privacy={"sampling_rate": 0.51}), Reason.POLICY_SAMPLING),
        (terms(simulation=True, privacy={"randomness": "seeded"}), Reason.SIMULATION_ONLY),
        (terms(rounds=200, max_attempts=400), Reason.BUDGET_EXHAUSTED),
        (terms(rounds=1, max_attempts=400), Reason.BUDGET_EXHAUSTED),
        (
            terms(training=TrainingTerms(local_steps=500, learning_rate=0.5)),
            Reason.BUDGET_EXHAUSTED,
        ),
    ],
    ids=lambda value: value.value if isinstance(value, Reason) else "",
)
def test_what_is_not_allowed_is_refused_by_its_reason_and_writes_nothing(
    world: Any, made: Any, reason: Reason
) -> None:
    gate = world.gate(policy=world.policy(max_sampling_rate=0.5))
    signed = made(world)
    order = replace(world.order(world.sign(world.contract())), contract=signed)
    assert refused(gate, order) is reason
    assert written(world) == {}
    assert contents.read(world.ledger_path).documents == {}
    reply = site(world, gate).train(order)
    assert reply == RefusalReply(site="alpha", round=1, reason=reason)
    assert world.opened == 0


def test_a_contract_off_the_menu_is_refused(world: Any) -> None:
    gate = world.gate(policy=world.policy(domains={"ward": menu(100)}))
    for privacy in ({"noise_multiplier": 1.6}, {"sampling_rate": 0.05}):
        signed = world.sign(world.contract(privacy=privacy))
        assert refused(gate, world.order(signed)) is Reason.POLICY_MENU
    assert written(world) == {}


@pytest.mark.parametrize("number", [0, -1, 6, 2**40])
def test_a_round_that_the_contract_does_not_have_is_refused(world: Any, number: int) -> None:
    order = replace(world.order(world.sign(world.contract())), round=number)
    assert refused(world.gate(), order) is Reason.ROUND_OUT_OF_RANGE


def test_what_a_refusal_sends_has_no_number_but_the_round(world: Any) -> None:
    signed = world.sign(world.contract(rounds=200, max_attempts=400))
    reply = site(world, world.gate()).train(world.order(signed, 3))
    assert isinstance(reply, RefusalReply)
    content = wire.encode_refusal(reply)
    assert {name: dict(record) for name, record in content.items()} == {
        "refusal": {"site": "alpha", "round": 3, "reason": "budget-exhausted"}
    }


# Simulations and real sites


def test_a_real_contract_can_be_neither_seeded_nor_without_noise(world: Any) -> None:
    for privacy in ({"randomness": "seeded"}, {"mechanism": "none"}):
        with pytest.raises(ValueError, match="only a simulation"):
            world.contract(privacy=privacy)


@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "begun"])
@pytest.mark.parametrize(
    "privacy", [{"randomness": "seeded"}, {"mechanism": "none"}], ids=["seeded", "none"]
)
def test_a_real_ledger_takes_neither_seeded_nor_unprotected_releases(
    world: Any, privacy: dict[str, str], begun: bool
) -> None:
    if begun:
        world.serve(world.gate(), world.order(world.sign(world.contract())))
    before = written(world) if begun else {}
    # Everything but the ledger agrees: the policy, the contract and the kind of noise.
    policy = world.policy(mechanisms=("dp-sgd", "none"))
    kind = privacy.get("randomness", "csprng")
    signed = world.sign(world.contract(simulation=True, privacy=privacy))
    gates = [world.gate(policy=policy, randomness=kind)]
    if begun:
        gates.append(world.gate(policy=policy, randomness=kind, simulation=True))
    for gate in gates:
        assert refused(gate, world.order(signed)) is Reason.SIMULATION_ONLY
        assert written(world) == before


@pytest.mark.parametrize("simulation", [False, True])
def test_a_simulation_and_a_real_site_never_share_a_ledger(world: Any, simulation: bool) -> None:
    order = world.order(world.sign(world.contract()))
    world.serve(world.gate(simulation=simulation), order)
    later = world.order(world.sign(world.contract()))
    assert refused(world.gate(simulation=not simulation), later) is Reason.SIMULATION_ONLY
    assert isinstance(world.gate(simulation=simulation).admit(later), Permit)


def test_after_an_unprotected_release_a_domain_takes_no_private_contract(world: Any) -> None:
    policy = world.policy(mechanisms=("dp-sgd", "none"))
    gate = world.gate(policy=policy, simulation=True)
    plain = world.sign(world.contract(simulation=True, privacy={"mechanism": "none"}))
    for number in (1, 2):
        permit = gate.admit(world.order(plain, number))
        assert isinstance(permit, Permit)
        reply = gate.release(permit, UnprotectedUpdate({"w": np.zeros(1, np.float32)}))
        assert isinstance(reply.update, UnprotectedUpdate)
    again = gate.admit(world.order(plain, 2))
    assert isinstance(again, TrainReply)
    assert isinstance(again.update, UnprotectedUpdate)
    private = world.sign(world.contract())
    assert refused(gate, world.order(private)) is Reason.DOMAIN_UNBOUNDED
    assert holds(world)


def test_seeded_releases_are_accounted_and_marked(world: Any) -> None:
    gate = world.gate(simulation=True, randomness="seeded")
    signed = world.sign(world.contract(simulation=True, privacy={"randomness": "seeded"}))
    world.serve(gate, world.order(signed))
    (found,) = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    assert found.chain.seeded
    assert found.chain.events == (PoissonGaussian(0.1, 1.5, 2),)


# Rounds that come again


def test_a_round_that_comes_again_is_answered_by_its_stored_bytes_for_nothing(
    world: Any,
) -> None:
    served, signed = site(world, world.gate()), world.sign(world.contract())
    order = world.order(signed)
    first = served.train(order)
    assert isinstance(first, TrainReply)
    before = written(world)
    # a site that was started anew
    for answer in (served, site(world, world.gate())):
        again = answer.train(order)
        assert isinstance(again, TrainReply)
        assert arrays.to_bytes(again.update.arrays) == arrays.to_bytes(first.update.arrays)
        assert (again.receipt, again.signature) == (first.receipt, first.signature)
    assert written(world) == before
    assert world.opened == 1


def test_a_round_that_comes_again_with_other_weights_is_refused_uncharged(world: Any) -> None:
    gate, signed = world.gate(), world.sign(world.contract())
    gate.admit(world.order(signed, 1))
    world.serve(gate, world.order(signed, 2))
    before = written(world)
    for number in (1, 2):
        order = world.order(signed, number, fill=0.5)
        assert refused(gate, order) is Reason.WEIGHTS_CHANGED
    assert written(world) == before


def test_a_charge_is_noted_in_the_sites_own_log_once_it_is_durable(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    signed = world.sign(world.contract())
    with caplog.at_level(logging.INFO, logger="bract.client"):
        world.gate().admit(world.order(signed))  # and then the site crashed
        world.serve(world.gate(), world.order(signed))
        assert isinstance(world.gate().admit(world.order(signed)), TrainReply)  # free: no charge
    told = [record.getMessage() for record in caplog.records if "charged" in record.getMessage()]
    spent = [
        accounting.filter_epsilon([PoissonGaussian(0.1, 1.5, 2)] * count, 1e-5, best_order(8, 1e-5))
        for count in (1, 2)
    ]
    assert told == [
        f"charged attempt {attempt} at round 1 of run 'trial' to domain 'ward': epsilon "
        f"{epsilon:.4f} by its filter, of 8.0"
        for attempt, epsilon in enumerate(spent, 1)
    ]
    assert {record.event for record in caplog.records} == {"charged"}


def test_a_round_before_the_last_is_sent_again_or_refused_and_never_charged(world: Any) -> None:
    """A server whose run folder was lost or put back would lead nowhere: new noise, new weights."""
    gate, signed = world.gate(), world.sign(world.contract())
    for number in (1, 2):
        world.serve(gate, world.order(signed, number))
    gate.admit(world.order(signed, 3))
    before = charges(world)
    assert isinstance(gate.admit(world.order(signed, 1)), TrainReply)
    for path in (world.folder / "updates").glob("*.safetensors"):
        path.unlink()
    for opened in (gate, world.gate()):
        for number in (1, 2):
            assert refused(opened, world.order(signed, number)) is Reason.ROUND_OUT_OF_RANGE
        assert charges(world) == before == [(1, 1), (2, 1), (3, 1)]
    other = world.sign(world.contract())
    assert isinstance(gate.admit(world.order(other, 1)), Permit)
    assert isinstance(gate.admit(world.order(signed, 3)), Permit)


def test_a_crashed_round_is_another_attempt_and_charged_again(world: Any) -> None:
    signed = world.sign(world.contract())
    order = world.order(signed)
    assert isinstance(world.gate().admit(order), Permit)  # and then the site crashed
    permit = world.gate().admit(order)
    assert isinstance(permit, Permit)
    assert permit.attempt == 2
    assert charges(world) == [(1, 1), (1, 2)]
    world.gate().release(permit, ProtectedUpdate(order.weights))
    assert isinstance(world.gate().admit(order), TrainReply)
    assert holds(world)


@pytest.mark.parametrize("damage", ["lost", "changed", "cut"])
def test_a_release_whose_bytes_are_gone_is_trained_and_charged_anew(
    world: Any, damage: str
) -> None:
    gate, order = world.gate(), world.order(world.sign(world.contract()))
    world.serve(gate, order)
    (stored,) = (world.folder / "updates").glob("*.safetensors")
    whole = stored.read_bytes()
    if damage == "lost":
        stored.unlink()
    else:
        stored.write_bytes(whole[:-1] + b"\x01" if damage == "changed" else whole[:20])
    permit = gate.admit(order)
    assert isinstance(permit, Permit)
    assert permit.attempt == 2
    gate.release(permit, ProtectedUpdate(order.weights))
    assert charges(world) == [(1, 1), (1, 2)]
    assert holds(world)


def test_a_permit_is_good_for_one_release(world: Any) -> None:
    gate, order = world.gate(), world.order(world.sign(world.contract()))
    permit = gate.admit(order)
    assert isinstance(permit, Permit)
    gate.release(permit, ProtectedUpdate(order.weights))
    other = {name: value + 1 for name, value in order.weights.items()}
    with pytest.raises(VerificationFailed, match="second release of one charge"):
        gate.release(permit, ProtectedUpdate(other))
    assert holds(world)


def test_a_permit_of_an_attempt_that_was_overtaken_releases_nothing(world: Any) -> None:
    gate, order = world.gate(), world.order(world.sign(world.contract()))
    slow, fast = gate.admit(order), gate.admit(order)
    assert isinstance(slow, Permit)
    assert isinstance(fast, Permit)
    with pytest.raises(VerificationFailed, match="another attempt"):
        gate.release(slow, ProtectedUpdate(order.weights))
    gate.release(fast, ProtectedUpdate(order.weights))
    assert holds(world)


def test_attempts_are_counted_over_all_rounds_and_run_out(world: Any) -> None:
    gate, signed = world.gate(), world.sign(world.contract(rounds=2, max_attempts=3))
    for number in (1, 1, 2):
        assert isinstance(gate.admit(world.order(signed, number)), Permit)
    assert refused(gate, world.order(signed, 2)) is Reason.ATTEMPTS_EXHAUSTED
    assert refused(world.gate(), world.order(signed, 2)) is Reason.ATTEMPTS_EXHAUSTED
    assert charges(world) == [(1, 1), (1, 2), (2, 1)]
    assert holds(world)


# The budget


def test_the_whole_contract_must_fit_before_its_first_charge(world: Any) -> None:
    privacy = PrivacyTerms(sampling_rate=0.1, noise_multiplier=1.5, clip_norm=1.0)
    event = PoissonGaussian(privacy.sampling_rate, privacy.noise_multiplier, 2 * 7)
    # An order of its own, so that ε of the run at that order is the least budget that takes it.
    order = 12
    least = accounting.filter_epsilon([event], 1e-5, order)
    signed = world.sign(world.contract(privacy=privacy.model_dump()))
    domain = {"composition": {"rule": "filter", "order": order}}
    short = world.gate(policy=world.policy(domain={**domain, "epsilon": least * 0.9999}))
    assert refused(short, world.order(signed)) is Reason.BUDGET_EXHAUSTED
    assert written(world) == {}
    enough = world.gate(policy=world.policy(domain={**domain, "epsilon": least * 1.0001}))
    for number in (1, 1, 1, 2, 3, 4, 5):
        assert isinstance(enough.admit(world.order(signed, number)), Permit)
    assert holds(world)
    another = world.sign(world.contract())
    assert refused(enough, world.order(another)) is Reason.BUDGET_EXHAUSTED


@pytest.mark.parametrize(
    ("epsilon", "counts"),
    [(0.6, "its Rényi filter counts"), (0.7, "PLD counts on the gate's grid")],
)
def test_a_refusal_names_the_way_of_counting_that_found_no_room(
    world: Any, epsilon: float, counts: str
) -> None:
    signed = world.sign(
        world.contract(
            privacy={"sampling_rate": 1e-3, "noise_multiplier": 2.0},
            training=TrainingTerms(local_steps=20_000, learning_rate=0.5),
            max_attempts=5,
        )
    )
    # 0.66 by the filter; the grid of PLD counts many steps of small loss as 0.78.
    fixed = {"epsilon": epsilon, "composition": {"rule": "filter", "order": 25}}
    gate = world.gate(policy=world.policy(domain=fixed))
    with pytest.raises(Refusal, match=f"as {counts}, which can be more than") as refusal:
        gate.admit(world.order(signed))
    assert refusal.value.reason is Reason.BUDGET_EXHAUSTED


def test_runs_share_the_budget_of_their_domain(world: Any) -> None:
    gate = world.gate(policy=world.policy(domain={"epsilon": 4.0}))

    def serve_run() -> None:
        signed = world.sign(world.contract(rounds=5, max_attempts=5))
        for number in range(1, 6):
            world.serve(gate, world.order(signed, number))

    def serve_runs() -> None:
        for _ in range(100):
            serve_run()

    with pytest.raises(Refusal) as refusal:
        serve_runs()
    assert refusal.value.reason is Reason.BUDGET_EXHAUSTED
    served = charges(world)
    assert len(served) % 5 == 0  # the last run was refused as a whole, not half-way
    assert len(served) > 5
    with gate.ledger.transaction() as transaction:
        chain = transaction.chain("alpha", "ward", key=world.key.public)
    spent = accounting.filter_epsilon(chain.events, 1e-5, chain.genesis.composition["order"])
    assert spent <= 4.0
    more = PoissonGaussian(0.1, 1.5, 10)
    order = chain.genesis.composition["order"]
    assert accounting.filter_epsilon([*chain.events, more], 1e-5, order) > 4.0
    assert holds(world)


def test_a_menu_is_served_up_to_its_caps_and_no_further(world: Any) -> None:
    gate = world.gate(policy=world.policy(domains={"ward": menu(14, 4)}))
    for noise, rounds, fits in ((1.5, 8, False), (1.5, 7, True), (1.5, 1, False), (2.5, 2, True)):
        agreed = world.contract(
            rounds=rounds, max_attempts=rounds, privacy={"noise_multiplier": noise}
        )
        signed = world.sign(agreed)
        if not fits:
            assert refused(gate, world.order(signed)) is Reason.BUDGET_EXHAUSTED
            continue
        for number in range(1, rounds + 1):
            world.serve(gate, world.order(signed, number))
    assert holds(world)


def test_a_menu_that_is_over_epsilon_as_a_whole_is_not_served_at_all(world: Any) -> None:
    cost = accounting.epsilon(
        [PoissonGaussian(0.1, 1.5, 200), PoissonGaussian(0.1, 2.5, 200)], 1e-5
    )
    signed = world.sign(world.contract())
    over = world.policy(domains={"ward": menu(200, 200, epsilon=cost - 0.01)})
    assert refused(world.gate(policy=over), world.order(signed)) is Reason.BUDGET_EXHAUSTED
    within = world.policy(domains={"ward": menu(200, 200, epsilon=cost + 0.01)})
    assert isinstance(world.gate(policy=within).admit(world.order(signed)), Permit)


# A policy that changes, domains that overlap


def test_the_filters_order_is_fixed_at_genesis_and_survives_another_epsilon(world: Any) -> None:
    signed = world.sign(world.contract())
    world.serve(world.gate(), world.order(signed, 1))
    (order,) = {body["composition"]["order"] for body in written(world)["alpha", "ward"][:1]}
    more = world.policy(domain={"epsilon": 20.0})
    world.serve(world.gate(policy=more), world.order(signed, 2))
    (found,) = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    assert found.policy == more
    assert found.chain.genesis is not None
    assert found.chain.genesis.composition == {"rule": "filter", "order": order}


@pytest.mark.parametrize(
    "domain",
    [
        {"delta": 1e-6},
        {"composition": {"rule": "filter", "order": 3}},
        {"composition": menu(100).composition.model_dump(mode="json")},
    ],
    ids=["delta", "order", "menu"],
)
def test_what_genesis_fixed_cannot_be_changed_by_a_later_policy(
    world: Any, domain: dict[str, Any]
) -> None:
    signed = world.sign(world.contract())
    world.serve(world.gate(), world.order(signed, 1))
    before = written(world)
    changed = world.gate(policy=world.policy(domain=domain))
    with pytest.raises(UsageError, match=r"the ledger fixed .* put it back, or begin another"):
        changed.check_ledger()
    assert refused(changed, world.order(signed, 2)) is Reason.LEDGER_UNAVAILABLE
    assert written(world) == before
    world.gate().check_ledger()
    assert isinstance(world.gate().admit(world.order(signed, 2)), Permit)


def overlapping(world: Any, *, clinic: float = 8.0, overlaps: tuple[str, ...] = ("clinic",)) -> Any:
    domains = {
        "ward": DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=overlaps),
        "clinic": DomainPolicy(epsilon=clinic, delta=1e-5),
    }
    return world.policy(domains=domains)


def test_domains_that_share_examples_are_charged_together(world: Any) -> None:
    gate, signed = world.gate(policy=overlapping(world)), world.sign(world.contract())
    world.serve(gate, world.order(signed, 1))
    gate.admit(world.order(signed, 2))
    gate.admit(world.order(signed, 2))
    assert charges(world, "ward") == charges(world, "clinic") == [(1, 1), (2, 1), (2, 2)]
    assert {body["primary"] for body in written(world)["alpha", "clinic"][1:]} == {"ward"}
    assert holds(world)


def test_a_shared_domain_without_room_refuses_and_neither_is_charged(world: Any) -> None:
    gate = world.gate(policy=overlapping(world, clinic=0.5))
    signed = world.sign(world.contract())
    assert refused(gate, world.order(signed)) is Reason.BUDGET_EXHAUSTED
    assert written(world) == {}


def test_a_stored_reply_writes_nothing_even_where_the_policy_now_shares_a_domain(
    world: Any,
) -> None:
    order = world.order(world.sign(world.contract()))
    world.serve(world.gate(policy=overlapping(world, overlaps=())), order)
    before = written(world)
    assert isinstance(world.gate(policy=overlapping(world)).admit(order), TrainReply)
    assert written(world) == before
    assert holds(world)


# Failures


def test_a_ledger_that_cannot_be_read_refuses_before_the_data(world: Any) -> None:
    gate = world.gate()
    with sqlite3.connect(world.ledger_path) as connection:
        connection.execute("DROP TABLE documents")
    reply = site(world, gate).train(world.order(world.sign(world.contract())))
    assert reply == RefusalReply("alpha", 1, Reason.LEDGER_UNAVAILABLE)
    assert world.opened == 0


def test_a_release_that_a_ledger_does_not_take_is_a_failure_since_it_was_charged(
    world: Any,
) -> None:
    admitted = world.gate().admit(world.order(world.sign(world.contract())))
    spoilt = site(world, world.gate(policy=world.policy(domain={"delta": 1e-6})))
    with spoilt.gate.ledger.transaction() as transaction:
        reply = cohort.release(transaction, spoilt, admitted, "f" * 64, None)
    assert reply == RefusalReply("alpha", 1, Reason.SITE_FAILED)
    assert charges(world) == [(1, 1)]


def test_a_failure_tells_neither_server_nor_log_what_the_exception_said(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def examples() -> Any:
        world.opened += 1
        raise ValueError("secret 42")

    signed = world.sign(world.contract())
    failing = site(world, replace(world.gate(), holdings=world.shelf(examples)))
    with caplog.at_level(logging.INFO):
        reply = failing.train(world.order(signed))
    assert reply == RefusalReply("alpha", 1, Reason.SITE_FAILED)
    assert "secret" not in repr(wire.encode_refusal(reply))
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text
    assert "42" not in caplog.text
    # The data was asked for: the charge stands, and the next attempt is charged again.
    assert world.opened == 1
    assert isinstance(site(world, world.gate()).train(world.order(signed)), TrainReply)
    assert charges(world) == [(1, 1), (1, 2)]
    assert holds(world)


@pytest.mark.parametrize("failure", [MemoryError("secret 42"), KeyError("secret 42")])
def test_any_failure_is_one_reason(world: Any, failure: Exception) -> None:
    def examples() -> Any:
        raise failure

    order = world.order(world.sign(world.contract()))
    reply = site(world, replace(world.gate(), holdings=world.shelf(examples))).train(order)
    assert reply == RefusalReply("alpha", 1, Reason.SITE_FAILED)


def test_a_contract_the_gate_refuses_builds_no_model(world: Any) -> None:
    signed = world.sign(world.contract(model=ModelTerms(name="os:getcwd")))
    served = site(world, world.gate())
    order = TrainOrder(contract=signed, round=1, weights={})
    assert served.train(order) == RefusalReply("alpha", 1, Reason.POLICY_MODEL)
    assert served.trainers._last is None


# The store of updates


def test_only_the_latest_update_is_kept_and_found_by_its_hash(world: Any) -> None:
    store = UpdateStore(world.folder / "store")
    values = [{"w": np.full(3, number, np.float32)} for number in range(2)]
    first, second = (store.keep(value) for value in values)
    assert first == arrays.digest(values[0])
    assert store.find(first) is None
    found = store.find(second)
    assert found is not None
    assert arrays.to_bytes(found) == arrays.to_bytes(values[1])
    (file,) = (world.folder / "store").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_gate_reads_on_after_its_ledger_was_closed_and_opened_by_another(world: Any) -> None:
    signed = world.sign(world.contract())
    one = world.gate()
    other = world.gate(ledger=Ledger(world.ledger_path))
    for number, gate in enumerate((one, other, one, other), start=1):
        world.serve(gate, world.order(signed, number))
    assert [number for number, _ in charges(world)] == [1, 2, 3, 4]
    assert holds(world)


def test_a_real_site_takes_no_update_that_is_noised_at_the_server(world: Any) -> None:
    terms = {"mechanism": "user-level", "unit": "client", "randomness": "csprng"}
    with pytest.raises(ValueError, match="only a simulation"):
        world.contract(privacy=terms)
    allowed = world.policy(mechanisms=("dp-sgd", "user-level"))
    agreed = world.contract(simulation=True, privacy=terms)
    gate = world.gate(policy=allowed)
    with pytest.raises(Refusal) as refusal:
        gate.admit(world.order(world.sign(agreed)))
    assert refusal.value.reason == Reason.SIMULATION_ONLY
    assert world.opened == 0


def test_a_ledger_protects_one_unit(world: Any) -> None:
    gate = world.gate(policy=world.policy(mechanisms=("dp-sgd", "user-level")), simulation=True)
    seeded = world.contract(simulation=True)
    assert isinstance(gate.admit(world.order(world.sign(seeded))), Permit)
    terms = {"mechanism": "user-level", "unit": "client"}
    other = world.contract(simulation=True, privacy=terms)
    with pytest.raises(Refusal) as refusal:
        gate.admit(world.order(world.sign(other)))
    assert refusal.value.reason == Reason.POLICY_MECHANISM
