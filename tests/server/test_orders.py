"""Open orders, without a network: what is offered again, and what no longer is."""

from __future__ import annotations

import hashlib

import pytest

from bract.server.orders import Fault, Orders, Refused

NODE = 7
A, B = b"a" * 60, b"b" * 30


def named(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def orders() -> Orders:
    made = Orders(greatest_reply=100)
    made.open("order", NODE, ["order", "weights"])
    return made


def half_answered() -> tuple[Orders, str]:
    made = orders()
    made.delivered(NODE, "order")
    session = made.begin_answer(NODE, "order", reply="reply", parts=[named(A), named(B)])
    made.upload(NODE, session, named(A), A)
    return made, session


def test_half_an_answer_is_forgotten_when_the_order_is_offered_again() -> None:
    made, session = half_answered()
    assert made.reset("order")
    again = made.begin_answer(NODE, "order", reply="other", parts=[named(A)])
    with pytest.raises(Refused):  # of the forgotten half
        made.upload(NODE, session, named(B), B)
    assert made.wait_answered(["order"], 0.0) == []
    made.upload(NODE, again, named(A), A)  # its bytes are counted from the start
    assert made.wait_answered(["order"], 0.0) == ["order"]


def test_whole_answer_is_not_forgotten() -> None:
    made, session = half_answered()
    made.upload(NODE, session, named(B), B)
    assert not made.reset("order")
    assert made.wait_answered(["order"], 0.0) == ["order"]


def test_closed_order_is_not_offered_again() -> None:
    made, _ = half_answered()
    made.close("order")
    assert not made.reset("order")
    with pytest.raises(Refused) as refused:
        made.begin_answer(NODE, "order", reply="late", parts=[named(A)])
    assert refused.value.fault is Fault.NO_SUCH_ORDER


def test_order_that_is_offered_again_has_its_whole_time_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 0.0
    monkeypatch.setattr("bract.server.orders.time.monotonic", lambda: clock)
    made = orders()
    clock = 50.0
    made.delivered(NODE, "order")
    clock = 99.0
    assert made.overdue(["order"], 60.0) == []
    made.reset("order")
    assert made.overdue(["order"], 60.0) == []
    clock = 160.0
    assert made.overdue(["order"], 60.0) == ["order"]
