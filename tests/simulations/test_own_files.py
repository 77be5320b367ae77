"""`bract simulate` on the user's own files: a table, images, arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Bract = Callable[..., Any]
QUICK = ("--rounds", "3", "--sites", "2", "--workers", "1", "--out", "run", "--json")
SCHEMA = """\
kind = "table"
[[columns]]
kind = "numeric"
name = "age"
low = 20
high = 90
[[columns]]
kind = "categorical"
name = "ward"
categories = ["a", "b"]
[target]
name = "{target}"
{learned}
"""
CLASSES = {"target": "ill", "learned": 'classes = ["no", "yes"]'}
VALUE = {"target": "stay", "learned": "low = 0\nhigh = 40"}


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    made_up = np.random.default_rng(1)
    rows = ["patient,age,ward,ill,stay"]
    for n in range(800):
        age, ward = int(made_up.integers(20, 90)), "ab"[int(made_up.integers(2))]
        ill = "yes" if age + 15 * (ward == "a") > 60 else "no"
        rows.append(f"p{n // 2},{age},{ward},{ill},{age / 3:.1f}")
    (tmp_path / "patients.csv").write_text("\n".join(rows))
    (tmp_path / "classes.toml").write_text(SCHEMA.format(**CLASSES))
    (tmp_path / "value.toml").write_text(SCHEMA.format(**VALUE))
    return tmp_path


def table(schema: str) -> tuple[str, ...]:
    return ("simulate", "table", "--data-file", "patients.csv", "--schema", schema)


def test_a_table_of_classes_is_learned(bract: Bract, patients: Path) -> None:
    done = bract(*table("classes.toml"), *QUICK[2:], "--rounds", "20")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["test_accuracy"] > 0.75
    assert (summary["rows_per_person"], summary["epsilon_person"]) == (None, None)
    agreed = json.loads((patients / "run/contract.json").read_text())["contract"]
    assert agreed["data"]["preparation"]["columns"][1]["categories"] == ["a", "b"]


def test_a_number_is_learned(bract: Bract, patients: Path) -> None:
    done = bract(*table("value.toml"), *QUICK)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["test_accuracy"] is None
    assert summary["test_loss"] < 0.2


def test_a_run_is_not_resumed_on_another_data_file(bract: Bract, patients: Path) -> None:
    done = bract(*table("value.toml"), *QUICK)
    assert done.returncode == 0, done.stderr
    before = (patients / "patients.csv").read_text()
    spent = {path: path.read_bytes() for path in (patients / "run/ledgers").iterdir()}
    (patients / "run/checkpoint/result.json").unlink()  # as if it had been killed
    (patients / "patients.csv").write_text(before + "\np999,44,a,yes,14.6")
    refused = bract("simulate", "--resume", "run")
    assert refused.returncode == 2
    assert "patients.csv has changed since the run in run began: put it back" in refused.stderr
    (patients / "patients.csv").unlink()
    assert "cannot read" in bract("simulate", "--resume", "run").stderr
    assert {path: path.read_bytes() for path in (patients / "run/ledgers").iterdir()} == spent
    (patients / "patients.csv").write_text(before)
    assert bract("simulate", "--resume", "run").returncode == 0


def test_other_rows_over_one_state_are_another_domain(bract: Bract, patients: Path) -> None:
    """Another file, other persons, or more rows of each: the sites would hold other examples."""
    persons = ("--group-column", "patient", "--rows-per-group", "2")
    common = (*table("classes.toml"), *QUICK[:-3], "--state", "state")
    assert bract(*common, *persons, "--out", "a").returncode == 0

    def refused(*changed: str) -> str:
        done = bract(*common, *changed, "--out", "b")
        assert (done.returncode, (patients / "b").exists()) == (2, False)
        assert "another partition is another domain" in done.stderr
        return str(done.stderr)

    assert "was begun with group 'patient', this run has None" in refused()
    assert "with rows_per_group 2, this run has 3" in refused(*persons[:3], "3")
    file = patients / "patients.csv"
    file.write_text(file.read_text() + "\np900,44,a,yes,14.6")
    assert "was begun with data_sha256" in refused(*persons)


def test_rows_of_a_person_are_bounded_and_his_epsilon_is_told(bract: Bract, patients: Path) -> None:
    column = ("--group-column", "patient")
    refused = bract(*table("classes.toml"), *column, *QUICK)
    assert refused.returncode == 2
    assert "column patient: a person has more than one row" in refused.stderr
    done = bract(*table("classes.toml"), *column, "--rows-per-group", "2", *QUICK)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rows_per_person"] == 2
    assert summary["epsilon_person"] > 2 * summary["epsilon"]
    assert f"a person with 2 rows: ε ≤ {summary['epsilon_person']:.4f}" in done.stderr
    assert summary["rows_kept"] == 2
    assert summary["epsilon"] < summary["epsilon_replaced"] < summary["epsilon_person"]
    said = "no more than 2 rows; of a person with more, another row takes its place, and by"
    assert f"{said} replace-one ε is {summary['epsilon_replaced']:.4f}" in done.stderr
    alone = bract("simulate", "digits", *column, *QUICK[:-3], "--out", "other")
    assert "need --schema FILE.toml of a table" in alone.stderr


def test_a_folder_of_images_is_learned_by_the_names_of_its_folders(
    bract: Bract, tmp_path: Path
) -> None:
    made_up = np.random.default_rng(1)
    for n in range(240):
        pixels = made_up.integers(0, 90, (10, 12, 3)) + 120 * (n % 2)
        path = tmp_path / "pictures" / ("light" if n % 2 else "dark") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    settings = ("--set", "data.options.height=8", "--set", "data.options.width=8")
    more = ("--set", "privacy.batch=40", "--set", "training.views=2")
    augmented = ("--set", "training.augmentation=shift-flip")
    done = bract(
        "simulate", "images", "--image-dir", "pictures", *settings, *more, *augmented, *QUICK
    )
    assert done.returncode == 0, done.stderr
    agreed = json.loads((tmp_path / "run/contract.json").read_text())["contract"]
    assert agreed["data"]["preparation"]["labels"] == ["dark", "light"]
    assert agreed["data"]["shape"] == [3, 8, 8]
    assert agreed["training"]["views"] == 2


def test_arrays_are_learned(bract: Bract, tmp_path: Path) -> None:
    made_up = np.random.default_rng(1)
    targets = made_up.integers(0, 3, 900)
    inputs = made_up.standard_normal((900, 5)) + targets[:, None]
    np.savez(tmp_path / "points.npz", inputs=inputs.astype(np.float32), targets=targets)
    shape = ("--set", "data.options.shape=5", "--set", "data.options.classes=3")
    done = bract(
        *("simulate", "--data", "arrays", "--data-file", "points.npz", *shape),
        *("--model", "linear", *QUICK),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 3


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("table", "--data-file", "none.csv", "--schema", "classes.toml"), "correct --data-file"),
        (("table", "--data-file", "patients.csv"), "needs --schema FILE.toml, as in: kind ="),
        (("table", "--schema", "classes.toml"), "name it with --data-file FILE.csv"),
        (("images",), "needs --schema FILE.toml"),
        (("images", "--image-dir", "none"), "correct --image-dir"),
        (("digits", "--data", "tabel"), "did you mean 'table'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    bract: Bract, patients: Path, command: tuple[str, ...], words: str
) -> None:
    done = bract("simulate", *command, "--out", "run")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (patients / "run").exists()
