"""The round loop waits for its sites, and not for ever."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from bract.server.rounds import await_nodes
from bract.shared.errors import BractError


class Arriving:
    """A grid to which one more node is connected each time it is asked, up to `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.asked = most, 0

    def get_node_ids(self) -> Iterable[int]:
        self.asked += 1
        return range(min(self.asked - 1, self.most))


def test_the_first_round_waits_for_the_cohort() -> None:
    grid = Arriving(most=3)
    await_nodes(grid, 3, timeout_seconds=30)  # type: ignore[arg-type]
    assert grid.asked == 4


def test_a_missing_site_does_not_hold_the_others_for_ever() -> None:
    await_nodes(Arriving(most=2), 3, timeout_seconds=0.5)  # type: ignore[arg-type]


def test_a_run_that_no_site_joins_fails() -> None:
    with pytest.raises(BractError, match="no site connected"):
        await_nodes(Arriving(most=0), 3, timeout_seconds=0.1)  # type: ignore[arg-type]
