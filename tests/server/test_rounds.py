"""The round loop waits for its sites, and not for ever."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MessageType, RecordDict

from bract.client.permits import Permit
from bract.server import checkpoint
from bract.server.rounds import CohortTooSmall, Patience, RoundLoop, initial_state
from bract.server.strategy import PublicFedAvg
from bract.server.witnesses import WitnessDesk
from bract.shared import keys, models, wire
from bract.shared.errors import Refusal
from bract.shared.evaluation import Evaluator
from bract.shared.messages import RefusalReply
from bract.shared.privacy import accounting, contents, entries
from bract.shared.privacy.entries import Head
from bract.shared.privacy.ledger import Ledger
from bract.shared.privacy.witness import Witness
from bract.shared.terms import SiteTerms, TrainingTerms
from bract.shared.updates import ProtectedUpdate
from bract.simulations.grid import FIRST_NODE, LocalGrid


class Arriving:
    """A grid to which one more node is connected each time it is asked, up to `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.asked = most, 0

    def get_node_ids(self) -> Iterable[int]:
        self.asked += 1
        return range(min(self.asked - 1, self.most))


def loop(world: Any, out: Path, **patience: Any) -> RoundLoop:
    cohort = tuple(
        SiteTerms(name=name, key=world.key.public, domain=name, nominal_size=100) for name in "abc"
    )
    agreed = world.contract(cohort=cohort)
    strategy = PublicFedAvg(world.sign(agreed), {}, WitnessDesk(None))
    evaluator: Any = None
    return RoundLoop(
        contract=agreed,
        strategy=strategy,
        evaluator=evaluator,
        validation=world.examples(),
        out=out,
        delta=1e-5,
        patience=Patience(**patience),
    )


def test_the_first_round_waits_for_the_whole_cohort(world: Any, tmp_path: Path) -> None:
    grid: Any = Arriving(most=3)
    loop(world, tmp_path, gather_seconds=30)._gather(grid)
    assert grid.asked == 4


def test_a_missing_site_does_not_hold_the_others_for_ever(world: Any, tmp_path: Path) -> None:
    grid: Any = Arriving(most=2)
    waiting = loop(world, tmp_path, gather_seconds=0.5, minimum_cohort=2, sites_seconds=5)
    waiting._gather(grid)
    assert waiting._wait_for_sites(grid)


@pytest.mark.parametrize("there", [0, 1])
def test_a_run_that_too_few_sites_join_fails(world: Any, tmp_path: Path, there: int) -> None:
    grid: Any = Arriving(most=there)
    with pytest.raises(CohortTooSmall, match=f"{there} of the 2 sites"):
        loop(world, tmp_path, minimum_cohort=2, sites_seconds=0.3)._wait_for_sites(grid)


def test_a_run_is_over_where_too_many_sites_refused_for_good(world: Any, tmp_path: Path) -> None:
    grid: Any = Arriving(most=3)
    over = loop(world, tmp_path, minimum_cohort=2)
    over.strategy._retired.update({0: "", 1: ""})
    assert not over._wait_for_sites(grid)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1.0, 2.5, 4.25, 6.125]), ("linear", [1.0, 2.1625, 3.125, 3.734375])],
)
def test_the_servers_steps_follow_momentum_and_schedule(
    world: Any, tmp_path: Path, schedule: Any, expected: list[float]
) -> None:
    training = TrainingTerms(
        local_steps=1, learning_rate=0.1, server_momentum=0.5, server_schedule=schedule
    )
    agreed = world.contract(training=training, rounds=4)
    rounds = replace(loop(world, tmp_path), contract=agreed)
    one = {"w": np.ones(1, np.float32)}
    state = initial_state(agreed, {"w": np.zeros(1, np.float32)})
    moved = []
    for number in range(1, 5):
        weights, velocity = rounds._step(state, one)
        state = replace(state, weights=weights, velocity=velocity, round=number)
        moved.append(float(weights["w"][0]))
    assert moved == pytest.approx(expected)


# Witnesses and the checkpoint


class Witnessing:
    """A site that notes what its server's checkpoint held when each message came."""

    def __init__(self, world: Any, out: Path) -> None:
        self.gate, self.world, self.out = world.gate(), world, out
        self.failing: set[int] = set()
        self.dying: set[int] = set()
        self.brought: list[tuple[str, Witness | None, dict[str, Head]]] = []

    def saved(self, contract: str) -> dict[str, Head]:
        state = checkpoint.load(self.out / "checkpoint", contract)
        heads = state.heads if state else {}
        return {site: Head(head["sequence"], head["hash"]) for site, head in heads.items()}

    def __call__(self, message: Message, context: Any) -> Message:
        if message.metadata.message_type == MessageType.QUERY:
            close = wire.decode_close(message.content)
            saved = self.saved(close.contract.contract.sha256)
            self.brought.append(("close", close.witness, saved))
            self.gate.keep_witness(close.contract, close.witness)
            return Message(wire.encode_closed("alpha"), reply_to=message)
        order = wire.decode_order(message.content)
        saved = self.saved(order.contract.contract.sha256)
        self.brought.append((f"round {order.round}", order.witness, saved))
        if len(self.brought) in self.dying:
            self.gate.admit(order)  # killed behind its charge, and offered the order again
        admitted = self.gate.admit(order)
        reply = (
            self.gate.release(admitted, ProtectedUpdate(order.weights))
            if isinstance(admitted, Permit)
            else admitted
        )
        if len(self.brought) in self.failing:
            return Message(RecordDict(), reply_to=message)  # lost on its way
        return Message(wire.encode_reply(reply), reply_to=message)


def witnessing(
    world: Any, out: Path, names: dict[int, str] | None = None
) -> tuple[RoundLoop, Witnessing, Any]:
    world.server = getattr(world, "server", None) or keys.generate()
    world.agreed = getattr(world, "agreed", None) or world.contract(witness=world.server.public)
    model = models.build("linear", (1, 8, 8), 10, {})
    desk = WitnessDesk(world.server)
    strategy = PublicFedAvg(world.sign(world.agreed), models.released_shapes(model), desk, names)
    site = Witnessing(world, out)
    rounds = RoundLoop(
        contract=world.agreed,
        strategy=strategy,
        evaluator=Evaluator(model, world.agreed.data),
        validation=world.examples(),
        out=out,
        delta=1e-5,
    )
    grid = LocalGrid(site, [{}], workers=1)  # type: ignore[arg-type]
    return rounds, site, grid


def begun(world: Any) -> Any:
    model = models.build("linear", (1, 8, 8), 10, {})
    zeros = {name: np.zeros(s, np.float32) for name, s in models.released_shapes(model).items()}
    return initial_state(world.agreed, zeros)


@pytest.mark.parametrize("names", [{1000: "alpha"}, None], ids=["known", "learned"])
def test_nothing_newer_than_the_saved_checkpoint_is_ever_countersigned(
    world: Any, tmp_path: Path, names: dict[int, str] | None
) -> None:
    rounds, site, grid = witnessing(world, tmp_path, names)
    site.failing = {2}
    state = rounds.run(grid, begun(world))
    assert (state.round, state.attempts) == (5, 6)
    said = [what for what, _, _ in site.brought]
    assert said == ["round 1", "round 2", "round 2", "round 3", "round 4", "round 5", "close"]
    assert site.brought[0][1] is None
    for _, seen, saved in site.brought[1:]:
        assert seen is not None
        seen.verify(world.server.public)
        assert seen.head == saved["alpha"]
    # What the site released in the void attempt is witnessed once its round is saved.
    assert [seen.sequence for _, seen, _ in site.brought[1:] if seen] == [2, 2, 4, 6, 8, 10]
    held = contents.read(world.ledger_path).witnesses
    (last,) = held.values()
    assert last == site.brought[-1][1].to_bytes()  # type: ignore[union-attr]


class Leaving(LocalGrid):
    """A grid whose node leaves as soon as it was counted for round 1, and comes again."""

    calls = 0

    def get_node_ids(self) -> Iterable[int]:
        self.calls += 1
        return super().get_node_ids() if self.calls not in (3, 4) else []


def test_sites_that_leave_between_being_counted_and_asked_are_waited_for(
    world: Any, tmp_path: Path
) -> None:
    rounds, site, _ = witnessing(world, tmp_path)
    grid = Leaving(site, [{}], workers=1)  # type: ignore[arg-type]
    state = rounds.run(grid, begun(world))
    assert (state.round, state.attempts) == (5, 5)


@pytest.mark.parametrize(
    ("dying", "failing", "charges"),
    [
        (set(), set(), [1, 2, 3, 4, 5]),
        ({2}, set(), [1, 3, 4, 5, 6]),
        ({3}, {2}, [1, 3, 4, 5, 6]),  # the reply of the second try was stored at the first
        ({2}, {2}, [1, 3, 4, 5, 6]),  # two tries, two charges
    ],
)
def test_a_site_killed_behind_its_charge_is_counted_as_its_ledger_counts(
    world: Any, tmp_path: Path, dying: set[int], failing: set[int], charges: list[int]
) -> None:
    world.server = keys.generate()
    world.agreed = world.contract(witness=world.server.public, max_attempts=7)
    rounds, site, grid = witnessing(world, tmp_path)
    site.dying, site.failing = dying, failing
    state = rounds.run(grid, begun(world))
    assert (state.round, state.attempts) == (5, 5 + len(failing))
    assert state.charges == charges[-1]
    for line, count in zip(state.metrics, charges, strict=True):
        spent = entries.events_of_attempts(world.agreed, attempts=count, completed=line["round"])
        assert line["epsilon_run"] == pytest.approx(accounting.epsilon(spent, 1e-5))
    bodies = [text for _, text, _ in contents.read(world.ledger_path).rows["alpha", "ward"]]
    assert sum(b'"kind":"charge"' in text for text in bodies) <= state.charges
    resumed = checkpoint.load(tmp_path / "checkpoint", world.agreed.sha256)
    assert resumed is not None
    assert resumed.charges == state.charges


def test_charges_of_a_round_that_went_on_without_a_site_count_once_it_answers(
    world: Any, tmp_path: Path
) -> None:
    rounds, site, grid = witnessing(world, tmp_path)
    (tmp_path / "checkpoint").mkdir()
    state = rounds._round(grid, begun(world))
    order = world.order(rounds.strategy._signed, 2)
    for _ in range(2):  # killed twice, and away until the others have ended round 2
        site.gate.admit(order)
    state = replace(state, round=2, attempts=2, charges=2)
    for number, charges in ((3, 4), (4, 5)):
        state = rounds._round(grid, state)
        assert (state.round, state.charges) == (number, charges)
        bodies = [text for _, text, _ in contents.read(world.ledger_path).rows["alpha", "ward"]]
        assert sum(b'"kind":"charge"' in text for text in bodies) == charges
        state = checkpoint.load(tmp_path / "checkpoint", world.agreed.sha256)


def test_no_receipt_makes_a_run_cost_more_than_its_contract(world: Any, tmp_path: Path) -> None:
    rounds, _, grid = witnessing(world, tmp_path)
    strategy = rounds.strategy
    inner = strategy.aggregate_train

    def boasting(*args: Any) -> Any:
        found = inner(*args)
        strategy.replied = {k: replace(v, attempt=10**6) for k, v in strategy.replied.items()}
        return found

    strategy.aggregate_train = boasting  # type: ignore[method-assign]
    state = rounds.run(grid, begun(world))
    assert state.round == 5
    assert state.charges == world.agreed.max_attempts
    whole = entries.events_of_attempts(
        world.agreed, attempts=world.agreed.max_attempts, completed=5
    )
    assert state.metrics[-1]["epsilon_run"] == accounting.epsilon(whole, 1e-5)


def test_a_server_killed_before_it_saved_goes_on_with_what_was_saved(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, site, grid = witnessing(world, tmp_path)
    saved = checkpoint.save

    def killed(state: Any, folder: Path) -> None:
        if state.round == 3:
            raise KeyboardInterrupt
        saved(state, folder)

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        rounds.run(grid, begun(world))
    monkeypatch.setattr(checkpoint, "save", saved)
    before = checkpoint.load(tmp_path / "checkpoint", world.agreed.sha256)
    assert before is not None
    assert before.round == 2

    again, site, grid = witnessing(world, tmp_path)
    state = again.run(grid, before)
    # The third round was released before the kill: it is sent again, for nothing.
    assert (state.round, state.attempts, state.refused) == (5, 5, ())
    assert [what for what, _, _ in site.brought][:2] == ["round 3", "round 4"]
    bodies = [text for _, text, _ in contents.read(world.ledger_path).rows["alpha", "ward"]]
    assert sum(b'"kind":"charge"' in text for text in bodies) == 5
    for _, seen, kept in site.brought:
        assert seen is None or seen.head == kept["alpha"]


# Void rounds


class Ailing:
    """A site of which another process holds the ledger when some of its orders come."""

    def __init__(self, world: Any, *held: int, **policy: Any) -> None:
        self.path, self.held, self.orders = world.ledger_path, set(held), 0
        self.lost: set[int] = set()
        impatient = Ledger(world.ledger_path, timeout_seconds=0.01)
        self.gate = world.gate(policy=world.policy(**policy), ledger=impatient)

    def __call__(self, message: Message, context: Any) -> Message:
        if message.metadata.message_type == MessageType.QUERY:
            return Message(wire.encode_closed(self.gate.policy.site), reply_to=message)
        order, self.orders = wire.decode_order(message.content), self.orders + 1
        try:
            with self.taken() if self.orders in self.held else nullcontext():
                admitted = self.gate.admit(order)
        except Refusal as refusal:
            said = RefusalReply(self.gate.policy.site, order.round, refusal.reason)
            return Message(wire.encode_refusal(said), reply_to=message)
        if isinstance(admitted, Permit):
            admitted = self.gate.release(admitted, ProtectedUpdate(order.weights))
        content = RecordDict() if self.orders in self.lost else wire.encode_reply(admitted)
        return Message(content, reply_to=message)

    @contextmanager
    def taken(self) -> Iterator[None]:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            yield

    def charges(self) -> dict[int, int]:
        """Returns how often each round was charged."""
        ((_, rows),) = contents.read(self.path).rows.items()
        bodies = [json.loads(text) for _, text, _ in rows]
        return dict(Counter(body["round"] for body in bodies if body["kind"] == "charge"))


def ailing(
    world: Any, out: Path, sites: list[Ailing], *, asked: int | None = None, **patience: Any
) -> tuple[RoundLoop, LocalGrid, Any]:
    """Returns a loop over sites that share the world's key, with its grid and first state."""
    cohort = tuple(
        SiteTerms(name=site.gate.policy.site, key=world.key.public, domain="ward", nominal_size=100)
        for site in sites
    )
    server = keys.generate()
    world.agreed = world.contract(witness=server.public, cohort=cohort, sites_per_round=asked)
    model = models.build("linear", (1, 8, 8), 10, {})
    rounds = RoundLoop(
        contract=world.agreed,
        strategy=PublicFedAvg(
            world.sign(world.agreed), models.released_shapes(model), WitnessDesk(server)
        ),
        evaluator=Evaluator(model, world.agreed.data),
        validation=world.examples(),
        out=out,
        delta=1e-5,
        patience=Patience(**patience),
    )
    first = FIRST_NODE

    def answer(message: Message, context: Any) -> Message:
        return sites[message.metadata.dst_node_id - first](message, context)

    return rounds, LocalGrid(answer, [{} for _ in sites], workers=1), begun(world)  # type: ignore[arg-type]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which the loop would have slept."""
    seconds: list[float] = []
    clock = SimpleNamespace(sleep=seconds.append, monotonic=time.monotonic)
    monkeypatch.setattr("bract.server.rounds.time", clock)
    return seconds


LONG = {"pause_seconds": 5.0, "sites_seconds": 3600.0}


def test_void_rounds_are_asked_ever_later_and_use_up_no_attempt_that_none_paid(
    world: Any, tmp_path: Path, asked: list[float]
) -> None:
    site = Ailing(world, *range(2, 12), 13, 14)  # ten times in round 2, twice in round 3
    rounds, grid, state = ailing(world, tmp_path, [site], **LONG)
    state = rounds.run(grid, state)
    assert (state.round, state.attempts, state.charges, site.orders) == (5, 5, 5, 17)
    assert asked == [1.0, 2.0, 4.0, *[5.0] * 6, 1.0]
    assert site.charges() == {number: 1 for number in range(1, 6)}
    assert [refused["round"] for refused in state.refused] == [2] * 10 + [3] * 2
    whole = entries.events_of_attempts(world.agreed, attempts=5, completed=5)
    assert state.metrics[-1]["epsilon_run"] == pytest.approx(accounting.epsilon(whole, 1e-5))


def test_another_sites_stored_update_makes_a_void_round_no_attempt_either(
    world: Any, new_world: Any, tmp_path: Path, asked: list[float]
) -> None:
    (tmp_path / "beta").mkdir()
    other = new_world(tmp_path / "beta", coordinator=world.coordinator, key=world.key)
    sites = [Ailing(world), Ailing(other, *range(2, 12), site="beta")]
    rounds, grid, state = ailing(world, tmp_path, sites, minimum_cohort=2, **LONG)
    state = rounds.run(grid, state)
    # Alpha was charged in the first of ten: one attempt of the two that may be void.
    assert (state.round, state.attempts, state.charges) == (5, 6, 6)
    assert sites[0].charges() == sites[1].charges() == {number: 1 for number in range(1, 6)}
    assert len(asked) == 9


def test_a_site_that_was_silent_may_have_charged(
    world: Any, new_world: Any, tmp_path: Path, asked: list[float]
) -> None:
    """Beside one that says that it charged nothing; a grid may give no answer of it at all."""
    (tmp_path / "beta").mkdir()
    other = new_world(tmp_path / "beta", coordinator=world.coordinator, key=world.key)
    sites = [Ailing(world), Ailing(other, *range(2, 20), site="beta")]
    rounds, grid, state = ailing(world, tmp_path, sites, minimum_cohort=2, **LONG)
    whole = grid.send_and_receive

    def deaf(messages: Any, **more: Any) -> Any:
        answers = list(whole(messages, **more))
        return answers if sites[0].orders == 1 else answers[1:]

    grid.send_and_receive = deaf  # type: ignore[method-assign]
    state = rounds.run(grid, state)
    assert (state.round, state.attempts, sites[0].orders) == (1, 7, 7)


def test_a_void_round_that_may_have_been_charged_is_an_attempt(
    world: Any, tmp_path: Path, asked: list[float]
) -> None:
    site = Ailing(world)
    site.lost = set(range(2, 20))
    rounds, grid, state = ailing(world, tmp_path, [site], **LONG)
    state = rounds.run(grid, state)
    assert (state.round, state.attempts, site.orders) == (1, 7, 7)
    assert asked == [1.0, 2.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("patience", "pauses"),
    [({}, []), ({"pause_seconds": 60.0, "sites_seconds": 10.0}, [1.0, 2.0, 4.0, 8.0])],
    ids=["sites in this process", "sites elsewhere"],
)
def test_a_run_whose_sites_cannot_charge_ends_for_now_and_goes_on_later(
    world: Any, tmp_path: Path, asked: list[float], patience: Any, pauses: list[float]
) -> None:
    site = Ailing(world, *range(2, 100))
    rounds, grid, state = ailing(world, tmp_path, [site], **patience)
    with pytest.raises(
        CohortTooSmall, match=r"round 2 was void \d times .* 1 of 1 .* ledger-unavailable \(alpha\)"
    ):
        rounds.run(grid, state)
    assert asked == pauses
    kept = checkpoint.load(tmp_path / "checkpoint", world.agreed.sha256)
    assert kept is not None
    assert (kept.round, kept.attempts) == (1, 1)
    site.held = set()
    state = rounds.run(grid, kept)
    assert (state.round, state.attempts, state.charges) == (5, 5, 5)


def test_a_round_that_was_refused_for_good_is_not_waited_for(
    world: Any, tmp_path: Path, asked: list[float]
) -> None:
    sites = [Ailing(world, site=name, models=("mlp",)) for name in ("alpha", "beta", "gamma")]
    rounds, grid, state = ailing(world, tmp_path, sites, asked=1, **LONG)
    state = rounds.run(grid, state)
    assert (state.round, state.attempts, asked) == (0, 3, [])
