"""The rival's side of the round-time benchmark times what it says, in Flower's own FedAvg."""

from __future__ import annotations

import json
from pathlib import Path

from bract.simulations import flower
from bract.simulations.benchmarks import trivial
from bract.simulations.grid import RUN, SERVER, LocalGrid


def test_the_trivial_server_app_times_every_round(tmp_path: Path) -> None:
    config = {"out": str(tmp_path / "seconds.json"), "rounds": 3, "sites": 2}
    grid = LocalGrid(trivial.client, [{}, {}], workers=1)
    trivial.server(grid, flower.context(run=RUN, node=SERVER, node_config={}, run_config=config))
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert len(seconds) == 3
    assert all(0 < value < 5 for value in seconds)
