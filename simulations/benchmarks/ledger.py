"""Milliseconds to charge and to release, seconds to verify 10,000 entries.

Run: python -m bract.simulations.benchmarks.ledger
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bract.client.gate import Gate
from bract.client.permits import Permit
from bract.client.training.execution import Execution
from bract.client.training.randomness import SecureRandomness
from bract.client.training.trainer import Trainer
from bract.client.updates import UpdateStore
from bract.shared import contract, keys
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.messages import TrainOrder
from bract.shared.policy import DomainPolicy, Policy
from bract.shared.privacy import verification, witness
from bract.shared.privacy.ledger import Ledger
from bract.shared.terms import DataTerms, ModelTerms, PrivacyTerms, SiteTerms, TrainingTerms

ROUNDS = 5_000


def main() -> None:
    """Prints the medians as one JSON object."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), ROUNDS)))


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Returns the medians over a ledger of `rounds` charges, each with its release."""
    coordinator, key, desk = (keys.generate() for _ in range(3))
    signed = contract.sign(_contract(coordinator, key, desk, rounds), coordinator)
    gate = _gate(folder, coordinator, key)
    weights = {"1.weight": np.zeros((10, 64), np.float32), "1.bias": np.zeros(10, np.float32)}
    update = Trainer(signed.contract, Execution()).train(
        terms=signed.contract.cohort[0],
        examples=gate.holdings.open("ward", signed.contract.data),
        weights=weights,
        stream=SecureRandomness().stream(1),
    )
    charges, releases, seen = list[float](), list[float](), None
    for number in range(1, rounds + 1):
        order = TrainOrder(contract=signed, round=number, weights=weights, witness=seen)
        started = time.perf_counter()
        permit = gate.admit(order)
        charged = time.perf_counter()
        if not isinstance(permit, Permit):
            raise RuntimeError("a new round was taken for an old one")
        reply = gate.release(permit, update)
        charges.append(charged - started)
        releases.append(time.perf_counter() - charged)
        seen = witness.sign("alpha", "ward", reply.receipt.head, desk)  # as a server would
    return {
        "charge_ms": 1e3 * statistics.median(charges),
        "release_ms": 1e3 * statistics.median(releases),
        "entries": 2 * rounds + 1,
        "verify_seconds": statistics.median(_timed(lambda: _verify(gate)) for _ in range(3)),
    }


def _verify(gate: Gate) -> None:
    verification.verify(gate.ledger.path, site_keys={gate.policy.site: gate.key.public}, anchors={})


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _contract(
    coordinator: keys.SigningKey, key: keys.SigningKey, desk: keys.SigningKey, rounds: int
) -> Contract:
    site = SiteTerms(name="alpha", key=key.public, domain="ward", nominal_size=10_000)
    return Contract(
        run="ledger-benchmark",
        nonce=contract.new_nonce(),
        coordinator=coordinator.public,
        witness=desk.public,
        simulation=False,
        rounds=rounds,
        max_attempts=rounds,
        model=ModelTerms(name="linear"),
        data=DataTerms(name="digits", shape=(1, 8, 8), classes=10),
        training=TrainingTerms(local_steps=1, learning_rate=1.0),
        privacy=PrivacyTerms(sampling_rate=0.01, noise_multiplier=2.0, clip_norm=1.0),
        cohort=(site,),
    )


def _gate(folder: Path, coordinator: keys.SigningKey, key: keys.SigningKey) -> Gate:
    return Gate(
        policy=Policy(
            site="alpha",
            coordinators=(coordinator.public,),
            domains={"ward": DomainPolicy(epsilon=20.0, delta=1e-6)},
            models=("linear",),
        ),
        key=key,
        ledger=Ledger(folder / "alpha.sqlite"),
        updates=UpdateStore(folder / "updates"),
        holdings=_Empty(),
        simulation=False,
        randomness="csprng",
    )


class _Empty:
    """A domain without examples: what is timed is the ledger."""

    def check(self, domain: str, data: DataTerms) -> None:
        """Takes every kind of data."""

    def open(self, domain: str, data: DataTerms) -> Examples:
        """Returns no example."""
        return Examples(inputs=np.zeros((0, 1, 8, 8), np.uint8), targets=np.zeros(0, np.int64))


if __name__ == "__main__":
    main()
