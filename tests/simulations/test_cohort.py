"""Many sites in one process: one transaction for a cohort's charges, sums where updates are made."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bract.shared.errors import BractError
from bract.shared.privacy.ledger import Ledger
from bract.simulations import cohort, simulation, state
from bract.simulations.engines import LocalEngine
from bract.simulations.experiment import Experiment, load

SITES = 12
SETTINGS = (
    "model.name=linear",
    "privacy.batch=40",
    "privacy.noise_multiplier=1.0",
    "policy.epsilon=60.0",
)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SHARED_FILE_FROM", SITES)


def experiment(*more: str, rounds: int = 3) -> Experiment:
    overrides = {"sites": SITES, "rounds": rounds, "seed": 5}
    return load("digits", model=None, overrides=overrides, settings=(*SETTINGS, *more))


def completed(out: Path, *more: str, workers: int = 1) -> Any:
    run = simulation.begin(experiment(*more), out=out, state=None, data_dir=None, workers=workers)
    return run.complete(LocalEngine())


def weights(run: Path) -> dict[str, np.ndarray]:
    return dict(load_file(run / "model.safetensors"))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_shared_ledger_gives_the_weights_and_epsilons_of_ledgers_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    more = f"training.local_steps={steps}"
    apart = completed(tmp_path / "apart", more)
    monkeypatch.setattr(state, "SHARED_FILE_FROM", SITES)
    one = completed(tmp_path / "one", more)
    two = completed(tmp_path / "two", more, workers=2)
    assert [p.name for p in (tmp_path / "one/ledgers").glob("*.sqlite")] == ["all.sqlite"]
    assert len(list((tmp_path / "apart/ledgers").glob("*.sqlite"))) == SITES
    for name, value in weights(tmp_path / "apart").items():
        assert np.abs(weights(tmp_path / "one")[name] - value).max() < 1e-6
        assert np.array_equal(weights(tmp_path / "two")[name], weights(tmp_path / "one")[name])
    for summary in (one, two):
        assert summary.epsilon == apart.epsilon
        assert summary.per_site.keys() == apart.per_site.keys()
        for name, site in summary.per_site.items():
            assert site.charges == 3
            assert site.epsilon == apart.per_site[name].epsilon
