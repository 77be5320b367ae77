"""A real simulated run with both audits beside it, and pages made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bract.shared.report import checks, evidence, folder, page
from bract.simulations import experiment, simulation
from bract.simulations.engines import LocalEngine

MECHANISM: dict[str, Any] = {
    "experiment": "digits",
    "model": "linear",
    "data": "digits",
    "made_up": False,
    "grid": "in-process",
    "passed": True,
    "recovered": {"noise_multiplier": 1.01, "clip_norm": 0.299, "sampling_rate": 0.251, "steps": 4},
    "recovered_error": {
        "noise_multiplier": 0.02,
        "clip_norm": None,
        "sampling_rate": None,
        "steps": None,
    },
    "claimed": {"noise_multiplier": 1.0, "clip_norm": 0.3, "sampling_rate": 0.25, "steps": 4},
    "p_values": {"noise of canaries": 0.41, "rounds correlate": 0.03},
    "checks": [],
    "failed": [],
    "threshold": 1e-5,
    "epsilon_ledger": 11.28,
    "epsilon_claimed": 11.28,
    "epsilon_recovered": 11.1,
    "epsilon_lower": {"one_run": {"0.99": 2.2}, "gaussian": {"0.99": 5.7}},
    "delta": 1e-5,
    "true_positive_rates": [],
    "canaries": 1000,
    "sites": 2,
    "rounds": 20,
    "seed": 1,
    "seconds": 3.0,
    "not_checked": ["the noise of a GPU"],
    "versions": {"torch": "2"},
}


def membership(name: str = "digits") -> dict[str, Any]:
    """What `bract audit membership` leaves behind, made up."""
    area = {"value": 0.61, "low": 0.55, "high": 0.67}
    curve = {
        "auc": area,
        "true_positive_rates": {"0.1": {"value": 0.2, "low": 0.1, "high": 0.3}},
        "roc": [[0.0, 0.0], [0.5, 0.7], [1.0, 1.0]],
    }
    attack = {"attack": "loss", "models": 1, "members": 200, "non_members": 120}
    return {
        "experiment": name,
        "data": "digits",
        "model": "linear",
        "rounds": 3,
        "sites": 3,
        "epsilon": 1.5,
        "delta": 1e-5,
        "attacks": [{**attack, "private": curve, "unprotected": curve}],
        "meaning": "What these attacks reached.",
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rounds of three sites on digits, whose tests copy what they change."""
    out = tmp_path_factory.mktemp("report") / "run"
    settings = ["data.partition.kind=sizes", "training.local_steps=2"]
    chosen = experiment.load(
        "digits", model="linear", overrides={"rounds": 4, "sites": 3}, settings=settings
    )
    begun = simulation.begin(chosen, out=out, state=None, data_dir=None, workers=1)
    begun.complete(LocalEngine())
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    target = tmp_path / "copied-run"
    shutil.copytree(made, target)
    return target


@pytest.fixture
def audited_run(run: Path) -> Path:
    """The run with audits of mechanism and result, and a table of accountants, in its folder."""
    (run / "audit.json").write_text(json.dumps(MECHANISM))
    (run / "membership.json").write_text(json.dumps(membership()))
    rows = [{"sampling_rate": 0.1, "epsilon": 1.25, "epsilon_prv": 1.2534}]
    (run / "agreement.json").write_text(json.dumps({"settings": rows}))
    return run


@pytest.fixture
def render() -> Callable[..., str]:
    """Makes the page of a folder, in this process."""

    def made(root: Path, **options: Path) -> str:
        asked = {"mechanism": None, "membership": None, "agreement": None, **options}
        found = evidence.gather(folder.find(root, **asked))
        return page.page(found, checks.checks(found))

    return made
