"""What carries messages between the ServerApp and simulated sites; the apps are the same objects.

Both engines give the same weights: a site's randomness is keyed by its name and round, every
process trains on one thread, and the server averages in the contract's order.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bract.client.app import FACTORY_VARIABLE
from bract.client.app import app as client_app
from bract.server.app import app as server_app
from bract.shared import malloc
from bract.shared.errors import UsageError
from bract.simulations import flower
from bract.simulations.cohort import CohortGrid
from bract.simulations.grid import FIRST_NODE, RUN, SERVER, LocalGrid
from bract.simulations.randomness import SeededRandomness
from bract.simulations.sites import FACTORY, PLAN_VARIABLE, node_config, open_plan


class Engine(Protocol):
    """Runs both apps over the sites of a plan."""

    def run(self, plan: Path, *, sites: int, workers: int, run_config: Mapping[str, Any]) -> int:
        """Returns how many processes could train at once, when the ServerApp has ended."""


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """bract's own grid: this process, or workers forked from it where the device is the CPU."""

    def run(self, plan: Path, *, sites: int, workers: int, run_config: Mapping[str, Any]) -> int:
        """Returns the number of workers, when the ServerApp has ended."""
        malloc.keep_freed()  # of a round's messages and sums, for the next round's
        grid: LocalGrid | CohortGrid
        planned = open_plan(plan)
        # One process serves all sites on a GPU, which it has for itself; and once a process has
        # asked a GPU for a gradient, no fork of it can.
        count = 1 if torch.device(planned.device).type == "cuda" else min(workers, sites)
        if planned.shares_a_file:
            grid = CohortGrid(plan, sites=sites, workers=count)
        else:
            node_configs = [node_config(plan, place) for place in range(sites)]
            grid = LocalGrid(client_app, node_configs, workers=count)
        grid.site_names = {FIRST_NODE + place: planned.name_of(place) for place in range(sites)}
        server = SeededRandomness(planned.seed, "server")
        grid.noise = lambda round_number: server.stream(round_number).normals
        try:
            server_app(
                grid, flower.context(run=RUN, node=SERVER, node_config={}, run_config=run_config)
            )
        finally:
            grid.close()
        return count


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Flower's own engine: actors of a Ray that is started here, or of a cluster that is joined.

    Every machine of a cluster must see the run folder, the state and the data under the same
    paths, and its file system must honour the locks of SQLite, which keep a ledger whole.

    Args:
        address: the cluster's; None starts a Ray of this machine alone.
    """

    address: str | None = None

    def __post_init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UsageError(
                "--engine ray needs Ray, which is not installed: pip install 'bract[ray]'"
            )

    def run(self, plan: Path, *, sites: int, workers: int, run_config: Mapping[str, Any]) -> int:
        """Returns the number of actors, when the ServerApp has ended."""
        torch.set_num_threads(1)
        planned = open_plan(plan)
        device = torch.device(planned.device)
        if device.type == "cuda" and device.index:
            raise UsageError(
                f"device {device} will not do with --engine ray, where each worker sees its own "
                "GPU as cuda:0: use --device cuda:0"
            )
        return flower.run_on_ray(
            server_app,
            client_app,
            sites=[planned.name_of(place) for place in range(sites)],
            run_config=run_config,
            cluster=flower.Cluster(
                address=self.address,
                workers=min(workers, sites),
                gpus=device.type == "cuda",
                environment=_environment(plan),
            ),
        )


def _environment(plan: Path) -> dict[str, str]:
    """Returns what makes a worker process a host of sites: its own configuration, not a message."""
    return {
        FACTORY_VARIABLE: FACTORY,
        PLAN_VARIABLE: str(plan),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # A model of one's own may lie where only this process was told to look.
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
