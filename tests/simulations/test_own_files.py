"""`bract simulate` on the user's own files: a table, images, arrays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bract.shared.data import load

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


def test_another_target_over_one_state_moves_rows_where_labels_share_them_out(
    bract: Bract, patients: Path
) -> None:
    schema = SCHEMA.format(target="ward", learned='classes = ["a", "b"]')
    (patients / "other.toml").write_text(schema.replace('name = "ward"', 'name = "ill"', 1))
    common = (*QUICK[:-3], "--set", "policy.epsilon=60", "--state", "state")
    assert bract(*table("classes.toml"), *common, "--out", "a").returncode == 0
    assert bract(*table("other.toml"), *common, "--out", "b").returncode == 0  # the same rows
    labels = ("--set", "data.partition.kind=dirichlet", "--state", "by-label")
    assert bract(*table("classes.toml"), *common, *labels, "--out", "c").returncode == 0
    refused = bract(*table("other.toml"), *common, *labels, "--out", "d")
    assert (refused.returncode, (patients / "d").exists()) == (2, False)
    assert "by-label was begun with rows_sha256" in refused.stderr


def pictures(folder: Path) -> tuple[str, ...]:
    """Lays a folder of images down and returns the words that simulate on it."""
    made_up = np.random.default_rng(1)
    for n in range(240):
        pixels = made_up.integers(0, 90, (10, 12, 3)) + 120 * (n % 2)
        path = folder / ("light" if n % 2 else "dark") / f"{n:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    sides = ("--set", "data.options.height=8", "--set", "data.options.width=8")
    return ("images", "--image-dir", str(folder), *sides, "--set", "privacy.batch=40")


def points(folder: Path) -> tuple[str, ...]:
    """Lays a folder of arrays down and returns the words that simulate on it."""
    made_up = np.random.default_rng(1)
    folder.mkdir()
    for part, count in (("train", 300), ("validation", 30), ("test", 60)):
        targets = made_up.integers(0, 3, count)
        inputs = (made_up.standard_normal((count, 5)) + targets[:, None]).astype(np.float32)
        np.savez(folder / f"{part}.npz", inputs=inputs, targets=targets)
    shape = ("--set", "data.options.shape=5", "--set", "data.options.classes=3")
    named = ("--data", "arrays", "--set", f"data.dir={folder}", "--model", "linear")
    return ("digits", *named, *shape, "--set", "privacy.batch=40")


def reviews(folder: Path) -> tuple[str, ...]:
    """Lays a folder of labelled text down and returns the words that simulate on it."""
    folder.mkdir()
    for part, count in (("train", 120), ("validation", 20), ("test", 40)):
        rows = [{"text": f"{part} {n}", "label": "no" if n % 2 else "yes"} for n in range(count)]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--set", "data.options.tokens=bytes", "--set", "data.options.length=16")
    return ("text", "--set", f"data.dir={folder}", *options, "--set", "privacy.batch=20")


def one_image_more(folder: Path) -> None:
    (folder / "dark/000a.png").write_bytes((folder / "dark/000.png").read_bytes())


def one_point_fewer(folder: Path) -> None:
    with np.load(folder / "train.npz") as stored:
        kept = {name: stored[name][1:] for name in stored}
    np.savez(folder / "train.npz", **kept)


def one_review_moved(folder: Path) -> None:
    train = folder / "train.jsonl"
    first, *rest = train.read_text().splitlines()
    train.write_text("\n".join([*rest, first]))


FOLDERS = [(pictures, one_image_more), (points, one_point_fewer), (reviews, one_review_moved)]
Lay = Callable[[Path], tuple[str, ...]]
Change = Callable[[Path], None]


@pytest.mark.parametrize(("lay", "change"), FOLDERS)
def test_a_folder_of_other_rows_over_one_state_is_another_domain(
    bract: Bract, tmp_path: Path, lay: Lay, change: Change
) -> None:
    """A row paid at two sites, and no ledger added up what it cost."""
    more = ("--set", "policy.epsilon=60", "--state", "state")
    common = ("simulate", *lay(tmp_path / "data"), *QUICK[:-3], *more)
    assert bract(*common, "--out", "a").returncode == 0
    (tmp_path / "data/.DS_Store").write_text("what no data set reads")
    (tmp_path / "data/notes.txt").write_text("what no data set reads")
    again = bract(*common, "--out", "b")
    assert again.returncode == 0, again.stderr
    change(tmp_path / "data")
    load.cache_clear()  # as in a process of its own
    refused = bract(*common, "--out", "c")
    assert (refused.returncode, (tmp_path / "c").exists()) == (2, False)
    assert "state was begun with data_sha256" in refused.stderr


def two_images_fewer(folder: Path) -> None:
    for name in ("000", "002"):
        (folder / f"dark/{name}.png").unlink()


def one_image_renamed(folder: Path) -> None:
    (folder / "dark/000.png").rename(folder / "dark/999.png")


def one_test_point_fewer(folder: Path) -> None:
    (folder / "test.npz").write_bytes((folder / "validation.npz").read_bytes())


@pytest.mark.parametrize(
    ("lay", "change"),
    [
        *FOLDERS,
        (pictures, two_images_fewer),
        (pictures, one_image_renamed),
        (points, one_test_point_fewer),
    ],
)
def test_a_run_is_not_resumed_on_a_folder_of_other_rows(
    bract: Bract, tmp_path: Path, lay: Lay, change: Change
) -> None:
    """Rows that had gone were refused behind the charge, and others came in silence."""
    done = bract("simulate", *lay(tmp_path / "data"), *QUICK)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run/checkpoint/result.json").unlink()  # as if it had been killed
    spent = {path: path.read_bytes() for path in (tmp_path / "run/ledgers").iterdir()}
    kept = shutil.copytree(tmp_path / "data", tmp_path / "kept")
    change(tmp_path / "data")
    load.cache_clear()  # as in a process of its own
    refused = bract("simulate", "--resume", "run")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"bract: {tmp_path}/data has changed since the run in run")
    assert refused.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "run/ledgers").iterdir()} == spent
    shutil.rmtree(tmp_path / "data")
    assert "cannot read" in bract("simulate", "--resume", "run").stderr
    shutil.move(kept, tmp_path / "data")
    load.cache_clear()
    assert bract("simulate", "--resume", "run").returncode == 0


CODE = """
import numpy as np
from bract.shared.data import Examples
from bract.shared.terms import DataTerms

class Columns:
    terms = DataTerms(name="columns", shape=(4,), classes=2)

    def train(self, folder):
        inputs = np.loadtxt(folder / "train.txt", dtype=np.float32)
        return Examples(inputs, (inputs[:, 0] > 0).astype(np.int64))

    def public(self, folder):
        made = np.eye(4, dtype=np.float32)
        return (Examples(made, np.array([1, 0, 0, 0])),) * 2

    def part(self, folder, part):
        return self.train(folder)

def columns():
    return Columns()
"""


def test_a_run_is_not_resumed_on_what_code_reads_otherwise(
    bract: Bract, tmp_path: Path, install: Callable[[str, str], None]
) -> None:
    install("own_columns", CODE)
    (tmp_path / "data").mkdir()
    rows = np.random.default_rng(1).standard_normal((200, 4))
    np.savetxt(tmp_path / "data/train.txt", rows)
    data = ("--data", "own_columns:columns", "--set", "data.dir=data", "--model", "linear")
    done = bract("simulate", "digits", *data, "--set", "privacy.batch=40", *QUICK)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run/checkpoint/result.json").unlink()  # as if it had been killed
    np.savetxt(tmp_path / "data/train.txt", rows[1:])
    load.cache_clear()  # as in a process of its own
    refused = bract("simulate", "--resume", "run")
    assert refused.returncode == 2
    what = f"what data set 'own_columns:columns' reads in {tmp_path}/data has changed"
    assert what in refused.stderr
    np.savetxt(tmp_path / "data/train.txt", rows)
    load.cache_clear()
    assert bract("simulate", "--resume", "run").returncode == 0


def test_the_same_images_of_another_size_are_the_same_domain(bract: Bract, tmp_path: Path) -> None:
    more = ("--set", "policy.epsilon=60", "--state", "state")
    common = ("simulate", *pictures(tmp_path / "data"), *QUICK[:-3], *more)
    assert bract(*common, "--out", "a").returncode == 0
    done = bract(*common, "--set", "data.options.height=12", "--out", "b")
    assert done.returncode == 0, done.stderr
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    assert other["epsilon"] > one["epsilon"]


def test_options_of_code_over_one_state_are_another_domain(bract: Bract, tmp_path: Path) -> None:
    rings = ("--data", "bract.simulations.examples.rings:data")
    model = ("--model", "bract.simulations.examples.rings:model", "--set", "privacy.batch=100")
    common = ("simulate", "digits", *rings, *model, *QUICK[:-3], "--state", "state")
    noise = ("--set", "data.options.noise=0.1")
    assert bract(*common, *noise, "--out", "a").returncode == 0
    refused = bract(*common, "--set", "data.options.noise=0.9", "--out", "b")
    assert (refused.returncode, (tmp_path / "b").exists()) == (2, False)
    assert "state was begun with examples_sha256" in refused.stderr
    done = bract(*common, *noise, "--set", "policy.epsilon=60", "--out", "c")
    assert done.returncode == 0, done.stderr


def test_data_that_their_name_tells_keep_their_domain(bract: Bract, tmp_path: Path) -> None:
    """Whatever folder they lie in: their files are looked at by their published hash."""
    done = bract("simulate", "digits", *QUICK, "--state", "state")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "state/private/domain.json").read_text())
    assert sorted(facts) == ["data", "partition", "seed", "sites"]


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
    words = pictures(tmp_path / "pictures")
    augmented = ("--set", "training.views=2", "--set", "training.augmentation=shift-flip")
    done = bract("simulate", *words, *augmented, *QUICK)
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
