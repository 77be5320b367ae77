"""User-level central DP in pfl: a cohort trains, updates are clipped, their sum is noised.

Run, in the rivals' environment: python pfl_cohort.py --clients 50 --examples 50 --batch 10
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from networks import NETWORKS
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from torch.nn import functional


class Rounds(TrainingProcessCallback):
    """Notes when each central iteration ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        """Notes the start."""
        self.ends.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Notes an end."""
        self.ends.append(time.perf_counter())
        return False, Metrics()


def network(name: str) -> torch.nn.Module:
    """Returns a network with the two methods that pfl asks for."""
    built = NETWORKS[name]()

    def loss(x: torch.Tensor, y: torch.Tensor, eval: bool = False) -> torch.Tensor:
        return functional.cross_entropy(built(x), y)

    def metrics(x: torch.Tensor, y: torch.Tensor, eval: bool = True) -> dict[str, Weighted]:
        return {"loss": Weighted(float(loss(x, y)) * len(y), len(y))}

    built.loss, built.metrics = loss, metrics  # type: ignore[assignment]
    return built


def main() -> None:
    """Prints the seconds of every round as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="small_cnn", choices=NETWORKS)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    users = {
        str(client): (
            torch.from_numpy(draw.normal(size=(asked.examples, 1, 28, 28)).astype(np.float32)),
            torch.from_numpy(draw.integers(0, 10, asked.examples)),
        )
        for client in range(asked.clients)
    }
    data = FederatedDataset(
        lambda user: Dataset(raw_data=users[user], user_id=user),
        get_user_sampler("minimize_reuse", list(users)),
    )
    built = network(asked.network)
    model = PyTorchModel(
        model=built,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(built.parameters(), lr=1.0),
    )
    backend = SimulatedBackend(
        training_data=data,
        val_data=data,
        postprocessors=[CentrallyAppliedPrivacyMechanism(GaussianMechanism(1.0, 1.0))],
    )
    rounds = Rounds()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=asked.rounds,
            evaluation_frequency=asked.rounds + 1,
            train_cohort_size=asked.clients,
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=0.1, local_batch_size=asked.batch
        ),
        NNEvalHyperParams(local_batch_size=None),
        [rounds],
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "round_seconds": [b - a for a, b in itertools.pairwise(rounds.ends)],
                "clients": asked.clients,
                "cpu_seconds": used.ru_utime + used.ru_stime,
                "versions": {n: importlib.metadata.version(n) for n in ("pfl", "torch")},
            }
        ),
        file=sys.__stdout__,
    )


if __name__ == "__main__":
    main()
