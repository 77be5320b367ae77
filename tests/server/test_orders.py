"""Open orders: a node fetches and answers its own, once, in time, and within bounds."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bract.server import orders as module
from bract.server.orders import Fault, Orders, Refused

ALPHA, BETA = 1, 2
PARTS = [b"message", b"arrays", b"facts"]


def name_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


NAMES = [name_of(part) for part in PARTS]


@pytest.fixture
def orders() -> Orders:
    opened = Orders(greatest_reply=100)
    opened.open("order-a", ALPHA, ["a", "weights"])
    opened.open("order-b", BETA, ["b", "weights"])
    return opened


def refused(fault: Fault) -> pytest.RaisesContext[Refused]:
    return pytest.raises(Refused, match=f"^{fault.value}$")


def begin(orders: Orders, node: int = ALPHA, message: str = "order-a") -> str:
    return orders.begin_answer(node, message, reply=NAMES[0], parts=NAMES)


def answer(orders: Orders, node: int = ALPHA, message: str = "order-a") -> None:
    session = begin(orders, node, message)
    for part in PARTS:
        orders.upload(node, session, name_of(part), part)


def test_a_node_finds_and_fetches_what_its_open_orders_hold_and_nothing_else(
    orders: Orders,
) -> None:
    assert orders.of(ALPHA) == ["order-a"]
    assert orders.of(3) == []
    for found in ("a", "weights"):
        orders.check_fetch(ALPHA, found)
    for node, object_id in ((ALPHA, "b"), (ALPHA, "unknown"), (BETA, "a"), (3, "weights")):
        with refused(Fault.NOT_YOUR_OBJECT):
            orders.check_fetch(node, object_id)


def test_an_answer_is_whole_when_every_part_is_here_and_not_before(orders: Orders) -> None:
    session = begin(orders)
    for part in PARTS[:-1]:
        orders.upload(ALPHA, session, name_of(part), part)
        assert orders.wait_answered(["order-a", "order-b"], 0.0) == []
        assert orders.of(ALPHA) == ["order-a"]
    orders.upload(ALPHA, session, NAMES[-1], PARTS[-1])
    assert orders.wait_answered(["order-a", "order-b"], 0.0) == ["order-a"]
    assert orders.of(ALPHA) == []
    closed = orders.close("order-a")
    assert closed is not None
    assert closed.contents == dict(zip(NAMES, PARTS, strict=True))
    assert closed.reply == NAMES[0]


def test_an_order_of_another_node_or_none_at_all_cannot_be_answered(orders: Orders) -> None:
    for node, message in ((BETA, "order-a"), (ALPHA, "order-b"), (ALPHA, "unknown"), (3, "")):
        with refused(Fault.NO_SUCH_ORDER):
            begin(orders, node, message)


def test_a_whole_answer_is_final(orders: Orders) -> None:
    answer(orders)
    with refused(Fault.ALREADY_ANSWERED):
        begin(orders)
    assert not orders.reset("order-a")
    assert orders.wait_answered(["order-a"], 0.0) == ["order-a"]


def test_a_late_answer_finds_its_order_closed_at_every_step(orders: Orders) -> None:
    session = begin(orders)
    orders.upload(ALPHA, session, NAMES[0], PARTS[0])
    assert orders.close("order-a") is not None
    assert orders.close("order-a") is None
    with refused(Fault.NOT_YOUR_OBJECT):
        orders.upload(ALPHA, session, NAMES[1], PARTS[1])
    with refused(Fault.NO_SUCH_ORDER):
        begin(orders)
    with refused(Fault.NOT_YOUR_OBJECT):
        orders.check_fetch(ALPHA, "a")
    assert not orders.reset("order-a")
    orders.delivered(ALPHA, "order-a")
    assert orders.of(ALPHA) == []
    assert orders.wait_answered(["order-a"], 0.0) == []
    assert orders.overdue(["order-a"], -1.0) == []


def test_only_what_an_answer_awaits_is_taken_and_only_from_its_node_and_session(
    orders: Orders,
) -> None:
    session = begin(orders)
    other = orders.begin_answer(BETA, "order-b", reply=NAMES[0], parts=NAMES)
    assert other != session
    more = b"something more"
    for node, where, content in (
        (ALPHA, session, more),
        (ALPHA, other, PARTS[0]),
        (BETA, session, PARTS[0]),
        (ALPHA, "", PARTS[0]),
    ):
        with refused(Fault.NOT_YOUR_OBJECT):
            orders.upload(node, where, name_of(content), content)
    with refused(Fault.BAD_REQUEST):
        orders.upload(ALPHA, session, NAMES[0], more)
    orders.upload(ALPHA, session, NAMES[0], PARTS[0])
    with refused(Fault.NOT_YOUR_OBJECT):  # it came already
        orders.upload(ALPHA, session, NAMES[0], PARTS[0])
    assert orders.wait_answered(["order-a", "order-b"], 0.0) == []


def test_an_answer_over_the_bound_is_refused_and_one_at_the_bound_is_not(orders: Orders) -> None:
    whole = [b"x" * 60, b"y" * 40]
    for last, fits in ((b"z" * 41, False), (whole[1], True)):
        parts = [whole[0], last]
        names = [name_of(part) for part in parts]
        session = orders.begin_answer(ALPHA, "order-a", reply=names[0], parts=names)
        orders.upload(ALPHA, session, names[0], parts[0])
        if fits:
            orders.upload(ALPHA, session, names[1], last)
        else:
            with refused(Fault.TOO_LARGE):
                orders.upload(ALPHA, session, names[1], last)
    assert orders.wait_answered(["order-a"], 0.0) == ["order-a"]


def test_an_answer_that_begins_again_forgets_its_half(orders: Orders) -> None:
    first = begin(orders)
    orders.upload(ALPHA, first, NAMES[0], PARTS[0])
    second = begin(orders)
    with refused(Fault.NOT_YOUR_OBJECT):
        orders.upload(ALPHA, first, NAMES[1], PARTS[1])
    for part in PARTS[1:]:
        orders.upload(ALPHA, second, name_of(part), part)
    assert orders.wait_answered(["order-a"], 0.0) == []
    orders.upload(ALPHA, second, NAMES[0], PARTS[0])
    assert orders.wait_answered(["order-a"], 0.0) == ["order-a"]


def test_an_order_that_is_offered_again_starts_anew(orders: Orders) -> None:
    session = begin(orders)
    orders.upload(ALPHA, session, NAMES[0], PARTS[0])
    assert orders.reset("order-a")
    with refused(Fault.NOT_YOUR_OBJECT):
        orders.upload(ALPHA, session, NAMES[1], PARTS[1])
    assert orders.of(ALPHA) == ["order-a"]
    answer(orders)
    assert orders.wait_answered(["order-a"], 0.0) == ["order-a"]
    assert not orders.reset("unknown")


def test_an_order_is_overdue_from_when_it_was_given_out_and_no_longer_when_answered(
    orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    later = iter([now + 50, now + 90, now + 120, now + 120])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(later))
    orders.delivered(ALPHA, "order-a")  # at 50; beta was never given its own
    orders.delivered(BETA, "order-a")
    assert orders.overdue(["order-a", "order-b"], 60.0) == ["order-b"]
    assert orders.overdue(["order-a", "order-b"], 60.0) == ["order-a", "order-b"]
    answer(orders)
    assert orders.overdue(["order-a", "order-b"], 60.0) == ["order-b"]


def test_order_that_is_offered_again_has_its_whole_time_again(
    orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.monotonic() + 50.0
    monkeypatch.setattr(module.time, "monotonic", lambda: clock)
    orders.delivered(ALPHA, "order-a")
    clock += 49.0
    assert orders.overdue(["order-a"], 60.0) == []
    orders.reset("order-a")
    clock += 59.0
    assert orders.overdue(["order-a"], 60.0) == []
    clock += 2.0
    assert orders.overdue(["order-a"], 60.0) == ["order-a"]


def test_who_waits_is_woken_by_the_last_part(orders: Orders) -> None:
    session = begin(orders)
    found: list[list[str]] = []
    waiting = threading.Thread(
        target=lambda: found.append(orders.wait_answered(["order-a", "order-b"], 30.0))
    )
    waiting.start()
    for part in PARTS:
        assert waiting.is_alive()
        orders.upload(ALPHA, session, name_of(part), part)
    waiting.join(timeout=10)
    assert found == [["order-a"]]


def test_many_threads_open_answer_and_close_and_every_answer_is_taken_once() -> None:
    orders, nodes, rounds = Orders(greatest_reply=1000), 8, 30

    def serve(node: int) -> list[str]:
        taken = []
        for number in range(rounds):
            message = f"{node}-{number}"
            orders.open(message, node, [f"object-{message}"])
            orders.check_fetch(node, f"object-{message}")
            with refused(Fault.NO_SUCH_ORDER):
                begin(orders, node + 1, message)
            answer(orders, node, message)
            with refused(Fault.ALREADY_ANSWERED):
                begin(orders, node, message)
            taken += orders.wait_answered([message], 5.0)
            assert orders.close(message) is not None
        return taken

    with ThreadPoolExecutor(max_workers=nodes) as pool:
        found = [name for names in pool.map(serve, range(nodes)) for name in names]
    assert sorted(found) == sorted(f"{n}-{k}" for n in range(nodes) for k in range(rounds))
    assert all(orders.of(node) == [] for node in range(nodes))


def test_of_many_threads_that_send_one_part_it_is_taken_from_one(orders: Orders) -> None:
    session = begin(orders)
    start = threading.Barrier(8)

    def send(_: int) -> bool:
        start.wait()
        try:
            orders.upload(ALPHA, session, NAMES[0], PARTS[0])
        except Refused:
            return False
        return True

    with ThreadPoolExecutor(max_workers=8) as pool:
        assert sum(pool.map(send, range(8))) == 1
