"""Four hospitals as they are: `bract simulate heart-disease`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bract.shared.data.heart_disease import HOSPITALS, split_files
from bract.shared.errors import UsageError
from bract.simulations import simulation
from bract.simulations.engines import LocalEngine
from bract.simulations.experiment import load

Bract = Callable[..., Any]


def begun(out: Path, hospitals: Path, *settings: str) -> simulation.Simulation:
    experiment = load("heart-disease", model=None, overrides={}, settings=settings)
    experiment = experiment.model_copy(
        update={"data": experiment.data.model_copy(update={"dir": str(hospitals)})}
    )
    return simulation.begin(experiment, out=out, state=None, data_dir=None, workers=1)


def test_the_experiment_reaches_its_accuracy_within_every_hospitals_budget(
    bract: Bract, hospitals: Path
) -> None:
    done = bract(
        "simulate", "heart-disease", "--workers", "1", "--set", f"data.dir={hospitals}",
        "--out", "run", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    text = (resources.files("bract.shared.schemas") / "summary.schema.json").read_text()
    jsonschema.validate(summary, json.loads(text))
    assert tuple(summary["per_site"]) == HOSPITALS
    assert tuple(summary["test_accuracy_by_group"]) == HOSPITALS
    assert tuple(summary["test_auc_by_group"]) == HOSPITALS
    assert all(area > 0.5 for area in summary["test_auc_by_group"].values())
    assert summary["test_accuracy_mean_of_groups"] >= 0.78
    assert summary["auc"] >= 0.85
    assert all(site["epsilon"] <= 3.0 for site in summary["per_site"].values())
    assert summary["delta"] == pytest.approx(1e-4)
    assert sum(map(sum, summary["confusion"])) == 246
    ledgers = sorted(map(str, Path("run/ledgers").glob("*.sqlite")))
    budget = bract("audit", "budget", *ledgers, "--json")
    for domain in json.loads(budget.stdout)["domains"]:
        assert domain["epsilon"] <= domain["epsilon_filter"] <= domain["limit"] == 3.0


def test_the_contract_names_hospitals_with_sizes_of_two_digits(
    hospitals: Path, tmp_path: Path
) -> None:
    with begun(tmp_path / "run", hospitals).prepared() as (_, signed):
        sizes = {site.name: site.nominal_size for site in signed.contract.cohort}
    assert sizes == {"cleveland": 200, "hungarian": 190, "switzerland": 82, "va": 130}


def test_one_hospital_alone_is_a_cohort_of_one(hospitals: Path, tmp_path: Path) -> None:
    settings = ("sites=1", "data.partition.only=['switzerland']", "privacy.batch=50", "rounds=2")
    run = begun(tmp_path / "run", hospitals, *settings)
    with run.prepared() as (_, signed):
        assert [site.name for site in signed.contract.cohort] == ["switzerland"]
        run.run(LocalEngine())
    assert (tmp_path / "run/ledgers/switzerland.sqlite").exists()
    with pytest.raises(UsageError, match="batch 100 is over the mean nominal size 82"):
        begun(tmp_path / "full", hospitals, *settings[:2])


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("sites=5", "makes 4 sites of these data, not 5: set sites to 4"),
        ("data.partition.only=['vaa']", "did you mean 'va'?"),
    ],
    ids=["sites", "only"],
)
def test_other_sites_than_the_hospitals_are_an_error(
    hospitals: Path, tmp_path: Path, setting: str, remedy: str
) -> None:
    with pytest.raises(UsageError) as raised:
        begun(tmp_path / "run", hospitals, setting)
    assert remedy in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_the_server_needs_public_files_alone(hospitals: Path, tmp_path: Path) -> None:
    split_files(hospitals, tmp_path / "sites", tmp_path / "public")
    results = []
    for name, folder in (("one", hospitals), ("other", tmp_path / "public")):
        run = begun(tmp_path / name, hospitals, "rounds=2")
        with run.prepared():
            # The sites' folder is in the plan by now: this is the server's.
            changed = run.begun.model_copy(update={"data_folder": str(folder)})
            replace(run, begun=changed).run(LocalEngine())
        results.append(json.loads((tmp_path / name / "checkpoint/result.json").read_text()))
    for result in results:
        del result["seconds"], result["heads"]
    assert results[0] == results[1]
    assert results[0]["rounds"] == 2
