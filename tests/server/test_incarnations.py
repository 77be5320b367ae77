"""Of two processes with one node key the newest speaks, and the older never again."""

from __future__ import annotations

import pytest

from bract.server.incarnations import Incarnations
from bract.server.orders import Fault, Refused

ALPHA, BETA = 1, 2
OLD, NEW, NEWEST = "a" * 32, "b" * 32, "c" * 32


def refused(fault: Fault) -> pytest.RaisesContext[Refused]:
    return pytest.raises(Refused, match=f"^{fault.value}$")


def test_the_process_that_was_activated_speaks_for_its_node_and_for_no_other() -> None:
    known = Incarnations()
    with refused(Fault.NOT_ACTIVE):
        known.check(ALPHA, OLD)
    known.activate(ALPHA, OLD)
    known.check(ALPHA, OLD)
    for node, name in ((BETA, OLD), (ALPHA, NEW), (ALPHA, "")):
        with refused(Fault.NOT_ACTIVE):
            known.check(node, name)


def test_a_process_that_connects_again_is_still_itself() -> None:
    known = Incarnations()
    for _ in range(3):
        known.activate(ALPHA, OLD)
        known.check(ALPHA, OLD)


def test_a_later_process_supersedes_the_earlier_for_good() -> None:
    known = Incarnations()
    for name in (OLD, NEW, NEWEST):
        known.activate(ALPHA, name)
    known.check(ALPHA, NEWEST)
    for name in (OLD, NEW):
        with refused(Fault.SUPERSEDED):
            known.check(ALPHA, name)
        with refused(Fault.SUPERSEDED):
            known.activate(ALPHA, name)
    known.check(ALPHA, NEWEST)


def test_a_process_of_one_node_supersedes_none_of_another() -> None:
    known = Incarnations()
    known.activate(BETA, OLD)
    # Another node's key may sign any name, this one's too.
    known.activate(ALPHA, OLD)
    known.activate(ALPHA, NEW)
    known.check(BETA, OLD)
    known.activate(BETA, OLD)
