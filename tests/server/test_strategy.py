"""The server's average: public weights, the contract's order, and only what a receipt covers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from bract.server.strategy import INVALID_UPDATE, PublicFedAvg
from bract.server.witnesses import WitnessDesk
from bract.shared import arrays, contract, keys, packing, wire
from bract.shared.contract import SignedContract
from bract.shared.errors import BractError, Reason
from bract.shared.messages import (
    CloseOrder,
    RefusalReply,
    SignedReceipt,
    SummedReply,
    TrainOrder,
    TrainReply,
)
from bract.shared.privacy.receipts import Receipt
from bract.shared.terms import SiteTerms, TrainingTerms
from bract.shared.updates import ProtectedUpdate, UnprotectedUpdate
from bract.simulations.grid import LocalGrid

NAMES, SIZES = ("alpha", "beta", "gamma"), (100, 300, 600)
SHAPES = {"1.weight": (10, 64), "1.bias": (10,)}


@pytest.fixture
def site_keys() -> dict[str, keys.SigningKey]:
    return {name: keys.generate() for name in NAMES}


@pytest.fixture
def signed(world: Any, site_keys: dict[str, keys.SigningKey]) -> SignedContract:
    cohort = tuple(
        SiteTerms(name=name, key=site_keys[name].public, domain="ward", nominal_size=size)
        for name, size in zip(NAMES, SIZES, strict=True)
    )
    # The steps are long, so that the values here lie within what the contract can reach.
    training = TrainingTerms(local_steps=2, learning_rate=50.0)
    signed: SignedContract = world.sign(world.contract(cohort=cohort, training=training))
    return signed


def values(fill: float) -> dict[str, Any]:
    return {name: np.full(shape, fill, dtype=np.float32) for name, shape in SHAPES.items()}


def reply(
    name: str, signed: SignedContract, key: keys.SigningKey, sent: Any, **changes: Any
) -> TrainReply:
    facts = {"contract": signed.contract.sha256, "site": name, "round": 1, "attempt": 1,
             "update": arrays.digest(sent.arrays), "head_domain": "ward", "head_sequence": 2,
             "head_hash": "0" * 64}  # fmt: skip
    receipt = Receipt(**{**facts, **changes})
    return TrainReply(update=sent, receipt=receipt, signature=key.sign(receipt.digest()))


@pytest.fixture
def carry(signed: SignedContract) -> Callable[[dict[int, RecordDict]], list[Message]]:
    """Carries contents as real replies of real nodes over the grid."""

    def run(contents: dict[int, RecordDict]) -> list[Message]:
        def client(message: Message, context: Any) -> Message:
            return Message(contents[context.node_id], reply_to=message)

        grid = LocalGrid(client, [{}] * len(contents), workers=1)  # type: ignore[arg-type]
        strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None))
        sent = strategy.configure_train(1, packing.pack(values(0.0)), ConfigRecord(), grid)
        return list(grid.send_and_receive(sent))

    return run


def test_weights_are_the_contracts_whatever_order_replies_come_in(
    signed: SignedContract, site_keys: dict[str, keys.SigningKey], carry: Any
) -> None:
    generator = np.random.default_rng(5)
    sent = [
        {n: generator.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
        for _ in NAMES
    ]
    averages = []
    for order in permutations(range(3)):
        contents = {
            1000 + place: wire.encode_reply(
                reply(NAMES[i], signed, site_keys[NAMES[i]], ProtectedUpdate(sent[i]))
            )
            for place, i in enumerate(order)
        }
        average, _ = PublicFedAvg(signed, SHAPES, WitnessDesk(None)).aggregate_train(
            1, carry(contents)
        )
        averages.append(packing.unpack(average))
    expected = sum(
        w * s["1.weight"].astype(float) for w, s in zip((0.1, 0.3, 0.6), sent, strict=True)
    )
    np.testing.assert_allclose(averages[0]["1.weight"], expected, atol=1e-6)
    assert all(arrays.digest(a) == arrays.digest(averages[0]) for a in averages)


def _changed(name: str, value: Any) -> dict[str, Any]:
    return {**values(1.0), name: value}


BAD: dict[str, Any] = {
    "not a number": ProtectedUpdate(_changed("1.bias", np.full(10, np.nan, dtype=np.float32))),
    "other shape": ProtectedUpdate(_changed("1.bias", np.ones(11, dtype=np.float32))),
    "extra array": ProtectedUpdate(_changed("running_mean", np.ones(3, dtype=np.float32))),
    "missing array": ProtectedUpdate({"1.bias": np.ones(10, dtype=np.float32)}),
    "unprotected": UnprotectedUpdate(values(1.0)),
}
FORGED: dict[str, dict[str, Any]] = {
    "another round": {"round": 2},
    "another contract": {"contract": "f" * 64},
    "a site not listed": {"site": "delta"},
    "another site's name": {"site": "beta"},
    "another update's hash": {"update": "f" * 64},
}


@pytest.mark.parametrize("case", [*BAD, *FORGED, "no signature", "a second from one site"])
def test_a_bad_update_is_left_out_and_the_round_goes_on(
    case: str, signed: SignedContract, site_keys: dict[str, keys.SigningKey], carry: Any
) -> None:
    good = reply("gamma", signed, site_keys["gamma"], ProtectedUpdate(values(2.0)))
    bad = reply(
        "alpha",
        signed,
        site_keys["alpha"],
        BAD.get(case, ProtectedUpdate(values(1.0))),
        **FORGED.get(case, {}),
    )
    if case == "no signature":
        bad = replace(bad, signature=bytes(64))
    if case == "a second from one site":
        bad = good
    contents = {1000: wire.encode_reply(good), 1001: wire.encode_reply(bad)}
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None))
    average, _ = strategy.aggregate_train(1, carry(contents))
    np.testing.assert_array_equal(packing.unpack(average)["1.bias"], np.full(10, 2.0))
    assert [reason for _, reason in strategy.refused] == [INVALID_UPDATE]
    assert set(strategy.replied) == {"gamma"}


def test_a_final_refusal_is_not_asked_again_and_a_passing_one_is(
    signed: SignedContract, carry: Any
) -> None:
    refusals = {1000: Reason.BUDGET_EXHAUSTED, 1001: Reason.LEDGER_UNAVAILABLE}
    contents = {
        node: wire.encode_refusal(RefusalReply(site=f"s{node}", round=1, reason=reason))
        for node, reason in refusals.items()
    }
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None))
    average, _ = strategy.aggregate_train(1, carry(contents))
    assert average is None
    grid = LocalGrid(lambda m, c: m, [{}, {}], workers=1)  # type: ignore[arg-type, return-value]
    again = strategy.configure_train(1, packing.pack(values(0.0)), ConfigRecord(), grid)
    assert [message.metadata.dst_node_id for message in again] == [1001]


@pytest.mark.parametrize(
    ("reasons", "may_pass", "uncharged"),
    [
        ([Reason.LEDGER_UNAVAILABLE], True, True),
        ([Reason.LEDGER_UNAVAILABLE, Reason.SITE_FAILED], True, False),
        ([Reason.LEDGER_UNAVAILABLE, None], True, False),
        ([Reason.SITE_FAILED], True, False),  # it may have come behind a charge
        ([Reason.WEIGHTS_INVALID], True, False),  # the same however often they are sent
        ([None], True, False),
        ([Reason.BUDGET_EXHAUSTED, Reason.POLICY_NOISE], False, False),
        ([], False, False),
    ],
)
def test_what_refusals_say_of_asking_again(
    signed: SignedContract,
    carry: Any,
    reasons: list[Reason | None],
    may_pass: bool,
    uncharged: bool,
) -> None:
    contents = {
        node: wire.encode_refusal(RefusalReply(site=f"s{node}", round=1, reason=reason))
        if reason
        else RecordDict()
        for node, reason in enumerate(reasons, 1000)
    }
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None))
    strategy.aggregate_train(1, carry(contents))
    assert (strategy.may_pass, strategy.uncharged) == (may_pass, uncharged)


def test_a_message_of_another_form_is_a_bad_update(signed: SignedContract, carry: Any) -> None:
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None))
    contents = {1000: RecordDict({"arrays": packing.pack(values(1.0))})}
    average, _ = strategy.aggregate_train(1, carry(contents))
    assert average is None
    assert strategy.refused == [("node 1000", INVALID_UPDATE)]


def test_contract_module_is_what_travels(signed: SignedContract, carry: Any) -> None:
    seen = []

    def client(message: Message, context: Any) -> Message:
        seen.append(wire.decode_order(message.content))
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(client, [{}], workers=1)  # type: ignore[arg-type]
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None))
    grid.push_messages(strategy.configure_train(1, packing.pack(values(3.0)), ConfigRecord(), grid))
    assert contract.from_bytes(seen[0].contract.to_bytes()) == signed
    assert seen[0].round == 1
    assert arrays.digest(seen[0].weights) == arrays.digest(values(3.0))


class Town:
    """A grid of nodes by number; what is sent to it is kept."""

    def __init__(self, *nodes: int) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> tuple[int, ...]:
        return self.nodes


def orders_of(strategy: PublicFedAvg, grid: Any, number: int = 1) -> dict[int, TrainOrder]:
    sent = strategy.configure_train(number, packing.pack(values(0.0)), ConfigRecord(), grid)
    return {m.metadata.dst_node_id: wire.decode_order(m.content) for m in sent}


@pytest.mark.parametrize("nodes", [(1000, 1001, 1002), (-3, 7, -8), (5, -1, 2)])
def test_a_simulations_draw_is_of_sites_whatever_numbers_their_nodes_have(
    world: Any, signed: SignedContract, nodes: tuple[int, ...]
) -> None:
    some = world.sign(
        world.contract(cohort=signed.contract.cohort, simulation=True, sites_per_round=2)
    )
    names = dict(zip(nodes, NAMES, strict=True))
    strategy = PublicFedAvg(some, SHAPES, WitnessDesk(None), names, seed=7)
    town: Any = Town(*nodes)
    asked = [{names[node] for node in strategy.chosen(town, number)} for number in (1, 2, 3)]
    assert asked == [{"alpha", "gamma"}, {"alpha", "gamma"}, {"beta", "gamma"}]


def test_no_site_is_asked_for_a_sum_that_the_grid_cannot_noise(
    world: Any, signed: SignedContract
) -> None:
    of_clients = {"mechanism": "user-level", "unit": "client", "randomness": "seeded"}
    agreed = world.sign(
        world.contract(cohort=signed.contract.cohort, simulation=True, privacy=of_clients)
    )
    strategy = PublicFedAvg(agreed, SHAPES, WitnessDesk(None), NODES)
    with pytest.raises(BractError, match="no noise for the mechanism 'user-level': use --engine"):
        orders_of(strategy, Town(*NODES))


NODES = {1000: "alpha", 1001: "beta"}


def test_a_node_that_is_known_refuses_for_itself_alone(signed: SignedContract, carry: Any) -> None:
    refusal = RefusalReply(site="beta", round=1, reason=Reason.BUDGET_EXHAUSTED)
    for names, blamed in ((NODES, "alpha"), (None, "beta")):
        strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None), names)
        strategy.aggregate_train(1, carry({1000: wire.encode_refusal(refusal)}))
        assert strategy.refused == [(blamed, "budget-exhausted")]


def test_a_node_that_is_known_brings_no_update_of_another_site(
    signed: SignedContract, site_keys: dict[str, keys.SigningKey], carry: Any
) -> None:
    update = reply("beta", signed, site_keys["beta"], ProtectedUpdate(values(0.25)))
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None), NODES)
    average, _ = strategy.aggregate_train(1, carry({1000: wire.encode_reply(update)}))
    assert average is None
    assert strategy.refused == [("alpha", INVALID_UPDATE)]
    average, _ = strategy.aggregate_train(
        1, carry({1000: RecordDict(), 1001: wire.encode_reply(update)})
    )
    assert average is not None
    assert set(strategy.replied) == {"beta"}


@pytest.fixture
def witnessed(world: Any, site_keys: dict[str, keys.SigningKey]) -> tuple[Any, WitnessDesk]:
    """A contract whose witness has seen the ledgers of two sites."""
    server = keys.generate()
    cohort = tuple(
        SiteTerms(name=name, key=site_keys[name].public, domain=f"{name}-ward", nominal_size=100)
        for name in NAMES
    )
    desk = WitnessDesk(server)
    desk.remember(
        {
            name: {"domain": f"{name}-ward", "sequence": place, "hash": "ab" * 32}
            for place, name in enumerate(("alpha", "beta"))
        }
    )
    return world.sign(world.contract(cohort=cohort, witness=server.public)), desk


def test_each_site_is_given_its_own_witness_and_a_stranger_none(
    witnessed: tuple[Any, WitnessDesk],
) -> None:
    signed, desk = witnessed
    grid = Town(1000, 1001, 1002, 1003)
    names = {**NODES, 1002: "gamma"}  # gamma's ledger was never seen, 1003 is not known
    strategy = PublicFedAvg(signed, SHAPES, desk, names)
    for sent in (orders_of(strategy, grid), closing(strategy, grid)):
        seen = {node: order.witness for node, order in sent.items()}
        for node, name in NODES.items():
            assert seen[node] == desk.witness(name)
            assert (seen[node].site, seen[node].domain) == (name, f"{name}-ward")
    assert orders_of(strategy, grid)[1002].witness is None
    assert orders_of(strategy, grid)[1003].witness is None
    assert set(closing(strategy, grid)) == set(NODES)
    # Where the grid names no nodes, nobody is given anything before a receipt names its site.
    blind = PublicFedAvg(signed, SHAPES, desk)
    assert {order.witness for order in orders_of(blind, grid).values()} == {None}
    assert closing(blind, grid) == {}


def closing(strategy: PublicFedAvg, grid: Any) -> dict[int, CloseOrder]:
    sent = strategy.configure_close(grid)
    return {m.metadata.dst_node_id: wire.decode_close(m.content) for m in sent}


def test_a_site_whose_ledger_was_put_back_is_not_made_to_pay_for_nothing(
    world: Any, tmp_path: Any
) -> None:
    """Asked again, it would charge its data every round for an update that is never used."""
    server = keys.generate()
    signed = world.sign(world.contract(witness=server.public))
    desk = WitnessDesk(server)
    served = world.serve(world.gate(), world.order(signed))
    head = {"domain": "ward", "sequence": 40, "hash": "ab" * 32}
    strategy = PublicFedAvg(signed, SHAPES, desk)

    def client(message: Message, context: Any) -> Message:
        return Message(wire.encode_reply(served), reply_to=message)

    grid = LocalGrid(client, [{}], workers=1)  # type: ignore[arg-type]
    for seen, reason in (({}, []), ({"alpha": head}, [Reason.LEDGER_ROLLED_BACK.value])):
        desk.remember(seen)
        sent = strategy.configure_train(1, packing.pack(values(0.0)), ConfigRecord(), grid)
        strategy.aggregate_train(1, grid.send_and_receive(sent))
        assert [reason for _, reason in strategy.refused] == reason
        assert len(strategy.retired(grid)) == len(reason)
    assert strategy.available(grid) == []


def test_who_refused_for_good_is_asked_again_once_its_client_was_started_anew(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    signed = world.sign(world.contract())
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None), {1000: "alpha"})

    class Grid(LocalGrid):
        process = "first"

        def process_of(self, node: int) -> str:
            return self.process

    def client(message: Message, context: Any) -> Message:
        refused = RefusalReply("alpha", 1, Reason.POLICY_NOISE)
        return Message(wire.encode_refusal(refused), reply_to=message)

    grid = Grid(client, [{}], workers=1)  # type: ignore[arg-type]
    for process in ("first", "second"):
        grid.process = process
        assert strategy.available(grid) == [1000]
        sent = strategy.configure_train(1, packing.pack(values(0.0)), ConfigRecord(), grid)
        strategy.aggregate_train(1, grid.send_and_receive(sent))
        assert strategy.refused == [("alpha", "policy-noise")]
        assert (strategy.available(grid), strategy.retired(grid)) == ([], {1000})
    said = [record.getMessage() for record in caplog.records if "asked again" in record.message]
    assert (
        said == ["alpha is not asked again before it is mended, and its client started again"] * 2
    )


def test_whatever_a_reply_makes_its_reader_raise_the_round_goes_on(
    signed: SignedContract, site_keys: dict[str, keys.SigningKey], carry: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    good = reply("gamma", signed, site_keys["gamma"], ProtectedUpdate(values(0.5)))
    messages = carry({1000: RecordDict(), 1001: wire.encode_reply(good)})
    whole = wire.decode_reply

    def raising(content: RecordDict) -> Any:
        if not content:
            raise RecursionError("secret 42")
        return whole(content)

    monkeypatch.setattr(wire, "decode_reply", raising)
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None))
    average, _ = strategy.aggregate_train(1, messages)
    assert average is not None
    assert strategy.refused == [("node 1000", INVALID_UPDATE)]


def summed(
    signed: SignedContract, site_keys: dict[str, keys.SigningKey], **changes: Any
) -> RecordDict:
    """The one message of two sites whose updates were added up, and what it should come to."""
    replies = [
        reply(name, signed, site_keys[name], ProtectedUpdate(values(fill)), **changes)
        for name, fill in (("alpha", 1.0), ("beta", 2.0))
    ]
    receipts = {
        1000 + place: SignedReceipt(one.receipt, one.signature) for place, one in enumerate(replies)
    }
    total = {name: np.full(shape, 100 * 1.0 + 300 * 2.0) for name, shape in SHAPES.items()}
    return wire.encode_summed(SummedReply(0, receipts, total))


class AddsUp(LocalGrid):
    adds_up = True


def averaged(signed: SignedContract, grid: type[LocalGrid], content: RecordDict) -> Any:
    def client(message: Message, context: Any) -> Message:
        return Message(content, reply_to=message)

    carrier = grid(client, [{}], workers=1)  # type: ignore[arg-type]
    strategy = PublicFedAvg(signed, SHAPES, WitnessDesk(None))
    sent = strategy.configure_train(1, packing.pack(values(0.0)), ConfigRecord(), carrier)
    average, _ = strategy.aggregate_train(1, carrier.send_and_receive(sent))
    return average, strategy


def test_a_sum_is_taken_from_a_grid_that_adds_up_in_this_process_and_from_no_other(
    signed: SignedContract, site_keys: dict[str, keys.SigningKey]
) -> None:
    average, strategy = averaged(signed, AddsUp, summed(signed, site_keys))
    assert list(strategy.replied) == ["alpha", "beta"]
    for name, value in packing.unpack(average).items():
        np.testing.assert_allclose(value, np.full(SHAPES[name], 1.75), rtol=1e-6)
    average, strategy = averaged(signed, LocalGrid, summed(signed, site_keys))
    assert average is None
    assert [reason for _, reason in strategy.refused] == [INVALID_UPDATE]


def test_a_sum_that_holds_a_refused_update_is_not_used(
    signed: SignedContract, site_keys: dict[str, keys.SigningKey]
) -> None:
    forged = {**site_keys, "beta": keys.generate()}
    average, strategy = averaged(signed, AddsUp, summed(signed, forged))
    assert average is None
    assert sorted(site for site, _ in strategy.refused) == ["alpha", "node 1001"]
    assert not strategy.replied
