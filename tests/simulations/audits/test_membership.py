"""`bract audit membership` on real runs, and the data that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from bract.shared import contract, trained
from bract.shared.errors import BractError
from bract.simulations import experiment, simulation
from bract.simulations.audits import membership, references
from bract.simulations.engines import LocalEngine

Bract = Callable[..., Any]
SHORT = ("--set", "rounds=1", "--workers", "1")


def reported(done: Any) -> Any:
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    schema = resources.files("bract.shared.schemas") / "audit-membership.schema.json"
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    jsonschema.validate(found, json.loads(schema.read_text()))
    return found


def test_both_attacks_on_both_kinds_are_reported_with_their_intervals(
    bract: Bract, hospitals: Path, tmp_path: Path
) -> None:
    out = tmp_path / "audits"
    root = ("--data-dir", str(hospitals.parent))
    command = ("audit", "membership", "heart-disease", "--models", "8", "--out", str(out))
    done = bract(*command, *SHORT, *root, "--json")
    found = reported(done)
    assert json.loads((out / "membership.json").read_bytes()) == found
    assert (found["experiment"], found["rounds"], found["sites"]) == ("heart-disease", 1, 4)
    assert 0 < found["epsilon"] <= 3
    by_loss, by_references = found["attacks"]
    assert (by_loss["attack"], by_loss["members"], by_loss["non_members"]) == ("loss", 613, 307)
    assert (by_references["attack"], by_references["models"]) == ("reference models", 8)
    for attack in found["attacks"]:
        for kind in ("private", "unprotected"):
            area = attack[kind]["auc"]
            assert 0 <= area["low"] <= area["value"] <= area["high"] <= 1
            for rate, one in attack[kind]["true_positive_rates"].items():
                assert float(rate) * attack["non_members"] >= 10
                assert one["low"] <= one["value"] <= one["high"]
    assert "nor that the model is private" in found["meaning"].replace("neither that others", "")
    assert bract(*command, *SHORT, *root).returncode == 2, "nothing is overwritten"


def test_a_model_that_learns_by_heart_is_found_out(hospitals: Path) -> None:
    """The negative control of the audit: many long steps of a wide model, without privacy."""
    wide = ("model.name=mlp", "model.options={hidden=256}", "privacy.mechanism=none", "rounds=6")
    steps = ("training.local_steps=60", "training.learning_rate=0.5")
    chosen = experiment.load("heart-disease", model=None, overrides={}, settings=[*wide, *steps])
    pool = references.pooled(chosen, hospitals.parent)
    made, _ = references.audited(chosen, hospitals.parent)
    assert membership._by_loss(pool, made, made).unprotected.auc.low > 0.5


def test_references_train_on_the_rows_that_they_are_given_and_no_others(hospitals: Path) -> None:
    chosen = experiment.load(
        "heart-disease", model=None, overrides={"rounds": 1}, settings=["privacy.mechanism=none"]
    )
    pool = references.pooled(chosen, hospitals.parent)
    coins = np.random.default_rng(1).integers(0, 2, (2, len(pool.rows))).astype(bool)
    how: dict[str, Any] = {"data_dir": hospitals.parent, "workers": 1, "told": lambda: None}
    first = references.confidences(chosen, pool, coins, **how)
    again = references.confidences(chosen, pool, coins, **how)
    assert (first == again).all()
    # Another member moves the model that had it, and the other not at all.
    moved = coins.copy()
    moved[0, 5] = ~moved[0, 5]
    other = references.confidences(chosen, pool, moved, **how)
    assert (other[1] == first[1]).all()
    assert not (other[0] == first[0]).all()


def test_halves_are_sampled_and_noised_at_the_rate_of_the_whole(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = experiment.load("heart-disease", model=None, overrides={"rounds": 1}, settings=[])
    pool = references.pooled(chosen, hospitals.parent)
    whole = simulation.begin(
        chosen, out=tmp_path / "run", state=None, data_dir=hospitals.parent, workers=1
    )
    whole.complete(LocalEngine())
    agreed = contract.read(tmp_path / "run/contract.json").contract.privacy
    seen = []
    read = trained.read
    monkeypatch.setattr(trained, "read", lambda out: seen.append(read(out)) or seen[-1])
    coins = np.random.default_rng(2).integers(0, 2, (1, len(pool.rows))).astype(bool)
    references.confidences(
        chosen, pool, coins, data_dir=hospitals.parent, workers=1, told=lambda: None
    )
    (half,) = seen
    assert sum(site.nominal_size for site in half.contract.cohort) < 0.6 * len(pool.rows)
    assert half.contract.privacy.sampling_rate == pytest.approx(agreed.sampling_rate)
    assert half.contract.privacy.noise_multiplier == agreed.noise_multiplier


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("table", (), "not known to be public"),
        ("images", (), "not known to be public"),
        ("digits", ("--set", "data.name=made_up:rings"), "not known to be public"),
        ("digits", ("--set", "privacy.mechanism=none"), "no privacy to audit"),
        ("digits", ("--models", "3"), "8 at the least"),
        ("digits", ("--workers", "0"), "at least 1"),
        ("nowhere", (), "unknown experiment"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_one_line(
    bract: Bract, name: str, more: tuple[str, ...], says: str
) -> None:
    done = bract("audit", "membership", name, *more)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_the_folder_of_a_run_is_refused_whatever_it_holds(bract: Bract, tmp_path: Path) -> None:
    done = bract("audit", "membership", str(tmp_path))
    assert done.returncode == 2
    assert "exact statistic of private examples" in done.stderr
    assert str(tmp_path) in done.stderr


def test_a_reference_model_that_cannot_be_trained_is_told(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = experiment.load("heart-disease", model=None, overrides={"rounds": 1}, settings=[])
    pool = references.pooled(chosen, hospitals.parent)

    def fail(*arguments: Any, **more: Any) -> None:
        raise BractError("no room")

    monkeypatch.setattr(references, "_begun", fail)
    with pytest.raises(BractError, match="reference model 1: no room"):
        references.confidences(
            chosen,
            pool,
            np.ones((1, len(pool.rows)), dtype=bool),
            data_dir=hospitals.parent,
            workers=1,
            told=lambda: None,
        )
