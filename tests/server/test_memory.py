"""What a large request leaves in a cycle is freed at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from bract.server import memory


class Body:
    """Refers to itself, as a request does through what handles it."""

    def __init__(self) -> None:
        self.cycle = self


@pytest.fixture(autouse=True)
def _only_by_hand() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize(("size", "freed"), [(memory.LARGE_BYTES, True), (100, False)])
def test_a_large_requests_cycle_is_freed_and_a_small_one_is_left(size: int, freed: bool) -> None:
    left = weakref.ref(Body())
    memory.collect(size)
    assert (left() is None) == freed


def test_what_a_settled_process_holds_is_not_looked_at_again() -> None:
    memory.settle()
    assert gc.get_freeze_count() > 10_000
