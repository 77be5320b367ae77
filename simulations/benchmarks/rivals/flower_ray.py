"""Flower's own engine, Ray, whose clients train as Opacus' tutorials do: one local epoch.

Run, in the rivals' environment: python flower_ray.py --network small_cnn --clients 100
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import resource
import time
import warnings
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from networks import NETWORKS
from opacus import PrivacyEngine
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def client_app(network: str, examples: int, batch: int) -> ClientApp:
    """Returns clients with made-up images, which they hold from their first round on."""
    app = ClientApp()
    held: dict[int, TensorDataset] = {}

    def data(client: int) -> TensorDataset:
        if client not in held:
            draw = np.random.default_rng(client)
            images = draw.normal(size=(examples, 1, 28, 28)).astype(np.float32)
            held[client] = TensorDataset(
                torch.from_numpy(images), torch.from_numpy(draw.integers(0, 10, examples))
            )
        return held[client]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        model = NETWORKS[network]()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        private, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data(int(context.node_config["partition-id"])), batch),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(private(images), labels).backward()
            optimizer.step()
        state = {name.removeprefix("_module."): v for name, v in private.state_dict().items()}
        content = RecordDict(
            {
                "arrays": ArrayRecord(state),
                "metrics": MetricRecord({"num-examples": examples}),
            }
        )
        return Message(content, reply_to=message)

    return app


def server_app(network: str, rounds: int, ends: list[float]) -> ServerApp:
    """Returns a server of plain FedAvg, which notes when a round ended."""
    app = ServerApp()

    class Timed(FedAvg):
        def configure_train(self, *arguments: Any, **named: Any) -> Any:
            if not ends:
                ends.append(time.perf_counter())
            return super().configure_train(*arguments, **named)

        def aggregate_train(self, *arguments: Any, **named: Any) -> Any:
            found = super().aggregate_train(*arguments, **named)
            ends.append(time.perf_counter())
            return found

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        Timed(fraction_evaluate=0.0).start(
            grid=grid,
            initial_arrays=ArrayRecord(NETWORKS[network]().state_dict()),
            train_config=ConfigRecord({}),
            num_rounds=rounds,
        )

    return app


def main() -> None:
    """Prints the seconds of every round as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="small_cnn", choices=NETWORKS)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    ends: list[float] = []
    run_simulation(
        server_app=server_app(asked.network, asked.rounds, ends),
        client_app=client_app(asked.network, asked.examples, asked.batch),
        num_supernodes=asked.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False},
        },
    )
    own, workers = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        json.dumps(
            {
                "round_seconds": [b - a for a, b in itertools.pairwise(ends)],
                "clients": asked.clients,
                "cpu_seconds": sum(u.ru_utime + u.ru_stime for u in (own, workers)),
                "versions": {
                    n: importlib.metadata.version(n) for n in ("flwr", "ray", "opacus", "torch")
                },
            }
        )
    )


if __name__ == "__main__":
    main()
