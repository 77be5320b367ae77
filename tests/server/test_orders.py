"""Open orders, without a network: what is offered again, and what no longer is."""

from __future__ import annotations

import pytest

from bract.server.orders import Fault, Orders, Refused

NODE = 7


def orders() -> Orders:
    made = Orders(greatest_reply=100)
    made.open("order", NODE, ["order", "weights"])
    return made


def half_answered() -> Orders:
    made = orders()
    made.delivered(NODE, "order")
    made.begin_answer(NODE, "order", reply="reply", session="one", awaited=["a", "b"])
    made.check_upload(NODE, "one", "a", 60)
    made.uploaded(NODE, "one", "a")
    return made


def test_half_an_answer_is_forgotten_when_the_order_is_offered_again() -> None:
    made = half_answered()
    before = made.reset("order")
    assert before is not None
    assert before.reply == "reply"
    made.begin_answer(NODE, "order", reply="other", session="two", awaited=["a"])
    made.uploaded(NODE, "one", "b")  # of the forgotten half
    assert made.wait_answered(["order"], 0.0) == []
    made.check_upload(NODE, "two", "a", 60)  # its bytes are counted from the start
    made.uploaded(NODE, "two", "a")
    assert made.wait_answered(["order"], 0.0) == ["order"]


def test_whole_answer_is_not_forgotten() -> None:
    made = half_answered()
    made.uploaded(NODE, "one", "b")
    assert made.reset("order") is None
    assert made.wait_answered(["order"], 0.0) == ["order"]


def test_closed_order_is_not_offered_again() -> None:
    made = half_answered()
    made.close("order")
    assert made.reset("order") is None
    with pytest.raises(Refused) as refused:
        made.check_answer(NODE, "order")
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
