"""The apps of the round-time benchmark: FedAvg over nodes that return the arrays they get."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from bract.shared import canonical

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Returns the arrays as they came."""
    arrays = message.content["arrays"]
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Writes the seconds of each round to `out`, a file on the server's machine."""
    rounds, sites = int(context.run_config["rounds"]), int(context.run_config["sites"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    while len(list(grid.get_node_ids())) < sites:
        time.sleep(0.2)  # else the first round would time the sites' start
    stamps: list[float] = []

    def stamp(round_number: int, arrays: ArrayRecord) -> None:
        stamps.append(time.perf_counter())  # called before round 1 and after every round

    # As many parameters as `linear` has for digits.
    weights = {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}
    strategy.start(
        grid,
        ArrayRecord({name: Array(value) for name, value in weights.items()}),
        num_rounds=rounds,
        evaluate_fn=stamp,
    )
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    canonical.write_atomically(Path(str(context.run_config["out"])), json.dumps(seconds).encode())
