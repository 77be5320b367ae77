"""The round loop waits for its sites, and not for ever."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from bract.server.rounds import CohortTooSmall, Patience, RoundLoop
from bract.server.strategy import PublicFedAvg
from bract.server.witnesses import WitnessDesk
from bract.shared.contract import SiteTerms


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
    over.strategy._retired.update({0, 1})
    assert not over._wait_for_sites(grid)
