"""Heart disease: public preprocessing, one public split, and who opens which file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.shared import data
from bract.shared.data import Examples
from bract.shared.data.heart_disease import (
    HOSPITALS,
    SOURCE,
    TABLE,
    load_heart_disease,
    split_files,
)
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Numeric

COLUMNS = {column.name: column for column in TABLE.columns}
NAME = "heart-disease"
TERMS = data.describe(NAME)
# age 55 and so on: every measure in the middle of its bounds
PATIENT = {
    "age": "55", "sex": "1", "cp": "2", "trestbps": "140", "chol": "250", "fbs": "0",
    "restecg": "1", "thalach": "140", "exang": "0", "oldpeak": "1.5", "slope": "3", "ca": "1.5",
    "thal": "7", "num": "0",
}  # fmt: skip
MEASURES = [name for name, column in COLUMNS.items() if isinstance(column, Numeric)]
CATEGORIES = [name for name in COLUMNS if name not in MEASURES]


def line(**cells: str) -> str:
    return ",".join({**PATIENT, **cells}.values())


def written(folder: Path, *lines: str) -> Path:
    (folder / "train.va.data").write_text("".join(f"{text}\n" for text in lines))
    return folder


def read(folder: Path, *lines: str) -> Examples:
    return data.load_part(TERMS, written(folder, *lines), "va")


def columns(inputs: np.ndarray) -> dict[str, list[float]]:
    """The inputs of one patient, by column."""
    cuts = np.cumsum([column.width for column in COLUMNS.values()])[:-1]
    return {name: part.tolist() for name, part in zip(COLUMNS, np.split(inputs, cuts), strict=True)}


def test_a_patient_becomes_scaled_measures_and_one_input_for_each_code(tmp_path: Path) -> None:
    examples = read(tmp_path, line())
    assert examples.inputs.dtype == np.float32
    assert examples.inputs.shape == (1, TABLE.width) == (1, *TERMS.shape)
    assert columns(examples.inputs[0]) == {
        "age": [0, 0], "sex": [0, 1, 0, 0], "cp": [0, 1, 0, 0, 0, 0], "trestbps": [0, 0],
        "chol": [0, 0], "fbs": [1, 0, 0, 0], "restecg": [0, 1, 0, 0, 0], "thalach": [0, 0],
        "exang": [1, 0, 0, 0], "oldpeak": [0, 0], "slope": [0, 0, 1, 0, 0], "ca": [0, 0],
        "thal": [0, 0, 1, 0, 0],
    }  # fmt: skip


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_clipped_to_public_bounds(tmp_path: Path, name: str) -> None:
    column = COLUMNS[name]
    assert isinstance(column, Numeric)
    quarter = (3 * column.low + column.high) / 4
    cells = [str(column.low), str(column.high), "-1e30", "1e30", str(quarter)]
    examples = read(tmp_path, *(line(**{name: cell}) for cell in cells))
    assert [columns(row)[name][0] for row in examples.inputs] == [-1, 1, -1, 1, -0.5]


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("cell", ["?", "-9", "-9.0", "", " ? "])
def test_missing_findings_are_the_middle_and_say_so(tmp_path: Path, name: str, cell: str) -> None:
    examples = read(tmp_path, line(**{name: cell}), line())
    missing, whole = (columns(row) for row in examples.inputs)
    assert missing[name] == [0.0] * (COLUMNS[name].width - 1) + [1.0]
    assert {n: v for n, v in missing.items() if n != name} == {
        n: v for n, v in whole.items() if n != name
    }
    assert examples.targets.tolist() == [0, 0]


@pytest.mark.parametrize("name", COLUMNS)
def test_zero_is_missing_only_where_it_cannot_be_measured(tmp_path: Path, name: str) -> None:
    (row,) = read(tmp_path, line(**{name: "0.0"})).inputs
    assert (columns(row)[name][-1] == 1.0) == (name in {"trestbps", "chol", "thal"})


@pytest.mark.parametrize("name", CATEGORIES)
@pytest.mark.parametrize("cell", ["5", "0.5", "-1"])
def test_codes_that_are_not_documented_are_other(tmp_path: Path, name: str, cell: str) -> None:
    folder = written(tmp_path, line(), line(**{name: cell}))
    examples = data.load_part(TERMS, folder, "va")
    assert columns(examples.inputs[1])[name][-2:] == [1.0, 0.0]
    assert sum(columns(examples.inputs[1])[name]) == 1.0
    assert examples.targets[1] == 0
    (problem,) = data.check_part(TERMS, folder, "va", 2)
    assert problem.endswith(f"train.va.data, row 2, column {name}: unknown category")


@pytest.mark.parametrize(("cell", "target"), [("0", 0), ("1", 1), ("2", 1), ("3", 1), ("4.0", 1)])
def test_any_narrowed_vessel_is_the_second_class(tmp_path: Path, cell: str, target: int) -> None:
    assert read(tmp_path, line(num=cell)).targets.tolist() == [target]


CELL = "73219"
UNREADABLE = {
    "word": (line(chol=f"x{CELL}"), "column chol: not a number"),
    "nan": (line(age="nan"), "column age: not a number"),
    "infinite": (line(sex="1e999"), "column sex: not a number"),
    "diagnosis": (line(num=CELL), "column num: not a class"),
    "no-diagnosis": (line(num="?"), "column num: not a class"),
    "short": (line().rsplit(",", 1)[0], "column 13: not 14 columns"),
    "long": (f"{line()},{CELL}", "column 15: not 14 columns"),
    "binary": ("\udcff\x00", "column 1: not 14 columns"),
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_row_that_cannot_be_read_adds_nothing_and_is_named_without_its_values(
    tmp_path: Path, fault: str
) -> None:
    text, problem = UNREADABLE[fault]
    content = f"{line()}\n\n{text}\n{line(num='1')}\n".encode(errors="surrogateescape")
    (tmp_path / "train.va.data").write_bytes(content)
    examples = data.load_part(TERMS, tmp_path, "va")
    assert examples.targets.tolist() == [0, -1, 1]
    assert not examples.inputs[1].any()
    (found,) = data.check_part(TERMS, tmp_path, "va", 3)
    assert found == f"{tmp_path / 'train.va.data'}, row 3, {problem}"
    assert CELL not in found


@given(text=st.text(st.characters(exclude_characters="\n", codec="utf-8"), min_size=1))
def test_no_text_at_all_fails_a_site(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-text"
    folder.mkdir(exist_ok=True)
    (folder / "train.va.data").write_bytes(f"{line()}\n{text}\n".encode())
    examples = data.load_part(TERMS, folder, "va")
    assert np.isfinite(examples.inputs).all()
    assert set(examples.targets) <= {-1, 0, 1}
    assert examples.targets[0] == 0


def test_check_names_every_fault_and_too_few_rows(tmp_path: Path) -> None:
    folder = written(tmp_path, line(chol="x", age="y"), line(cp="9", thal="4"))
    found = [
        re.sub(r".*, row ", "", problem) for problem in data.check_part(TERMS, folder, "va", 3)
    ]
    assert found == [
        "1, column age: not a number",
        "1, column chol: not a number",
        "2, column cp: unknown category",
        "2, column thal: unknown category",
        "heart-disease va: fewer rows than the nominal size 3: declare a lower one",
    ]


def test_each_hospital_keeps_two_thirds_and_the_split_loses_no_patient(hospitals: Path) -> None:
    splits = load_heart_disease(hospitals)
    sizes = {
        part: [len(rows) for rows in grouped(getattr(splits, part)).values()]
        for part in ("train", "validation", "test")
    }
    assert sizes == {
        "train": [202, 196, 82, 133],
        "validation": [20, 20, 8, 13],
        "test": [81, 78, 33, 54],
    }
    sick = sum(int(part.targets.sum()) for part in (splits.train, splits.validation, splits.test))
    assert sick == 139 + 106 + 115 + 149
    for part in (splits.train, splits.validation, splits.test):
        assert set(part.targets) == {0, 1}
        assert np.abs(part.inputs).max() == 1.0


def grouped(examples: Examples) -> dict[str, Any]:
    assert examples.groups is not None
    return examples.groups.rows()


def test_split_is_a_shuffle_that_is_fixed_for_good(hospitals: Path, tmp_path: Path) -> None:
    """The Hungarian file is sorted by diagnosis: a cut without a shuffle would part the sick."""
    train = load_heart_disease(hospitals).train
    rate = train.targets[grouped(train)["hungarian"]].mean()
    assert 0.25 < rate < 0.5
    split_files(hospitals, tmp_path, tmp_path)
    published = (hospitals / "processed.va.data").read_text().splitlines()
    test = (tmp_path / "test.va.data").read_text().splitlines()
    assert [published.index(row) + 1 for row in test[:8]] == [2, 9, 12, 21, 24, 28, 29, 35]


def test_files_of_sites_and_server_give_the_rows_of_a_simulation(
    hospitals: Path, tmp_path: Path
) -> None:
    splits = load_heart_disease(hospitals)
    split_files(hospitals, tmp_path / "sites", tmp_path / "public")
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.data"))
    assert written == sorted(
        [f"sites/{name}/train.{name}.data" for name in HOSPITALS]
        + [f"public/{part}.{name}.data" for part in ("test", "validation") for name in HOSPITALS]
    )
    public = data.load_public(TERMS, tmp_path / "public")
    for one, other in zip(public, (splits.validation, splits.test), strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.targets, other.targets)
        np.testing.assert_array_equal(one.groups.index, other.groups.index)  # type: ignore[union-attr]
    for name, rows in grouped(splits.train).items():
        own = splits.train.take(rows)
        for folder in (tmp_path / "sites" / name, hospitals):
            part = data.load_part(TERMS, folder, name)
            np.testing.assert_array_equal(part.inputs, own.inputs)
            np.testing.assert_array_equal(part.targets, own.targets)
            assert data.check_part(TERMS, folder, name, len(own)) == []


def test_no_patient_lies_both_at_a_site_and_at_the_server(hospitals: Path, tmp_path: Path) -> None:
    split_files(hospitals, tmp_path / "sites", tmp_path / "public")
    for name in HOSPITALS:
        parts = [
            tmp_path / "sites" / name / f"train.{name}.data",
            *(tmp_path / "public" / f"{part}.{name}.data" for part in ("validation", "test")),
        ]
        lines = [row for path in parts for row in path.read_text().splitlines()]
        published = (hospitals / f"processed.{name}.data").read_text().splitlines()
        assert sorted(lines) == sorted(published)


def test_a_site_opens_no_other_hospitals_file(hospitals: Path, tmp_path: Path) -> None:
    split_files(hospitals, tmp_path / "sites", tmp_path / "public")
    own = tmp_path / "sites/va"
    with pytest.raises(UsageError, match=r"no readable processed\.cleveland\.data"):
        data.load_part(TERMS, own, "cleveland")
    with pytest.raises(UnknownName, match="unknown hospital 'vaa': did you mean 'va'"):
        data.load_part(TERMS, own, "vaa")


def test_public_files_that_are_not_all_there_are_named(hospitals: Path, tmp_path: Path) -> None:
    split_files(hospitals, tmp_path / "sites", tmp_path / "public")
    (tmp_path / "public/test.switzerland.data").unlink()
    with pytest.raises(UsageError, match=r"cannot read .*test\.switzerland\.data"):
        data.load_public(TERMS, tmp_path / "public")


def test_file_that_is_not_a_published_one_is_refused(hospitals: Path, tmp_path: Path) -> None:
    for name in SOURCE.sha256:
        (tmp_path / name).write_bytes((hospitals / name).read_bytes())
    path = tmp_path / "processed.switzerland.data"
    path.write_bytes(path.read_bytes().replace(b"32,", b"33,", 1))
    with pytest.raises(UsageError, match=r"processed\.switzerland\.data is not the published file"):
        load_heart_disease(tmp_path)


def uci(name: str, content: bytes) -> bytes:
    """UCI's own edition of a file: question marks where the reissued one has -9 or 0."""
    if "cleveland" not in name:
        return content.replace(b"-9", b"?")
    rows = [text.split(b",") for text in content.splitlines()]
    for row in (167, 193, 288, 303):
        rows[row - 1][list(COLUMNS).index("ca")] = b"?"
    for row in (88, 267):
        rows[row - 1][list(COLUMNS).index("thal")] = b"?"
    return b"".join(b",".join(row) + b"\n" for row in rows)


def test_both_known_editions_give_the_same_patients(hospitals: Path, tmp_path: Path) -> None:
    reissued = load_heart_disease(hospitals)
    for name in SOURCE.sha256:
        content = (hospitals / name).read_bytes()
        (tmp_path / name).write_bytes(uci(name, content) if b"?" not in content else content)
    published = load_heart_disease(tmp_path)  # refuses what has not UCI's SHA-256
    vessels = sum(column.width for column in list(COLUMNS.values())[: list(COLUMNS).index("ca")])
    changed = 0
    for part in ("train", "validation", "test"):
        one, other = getattr(reissued, part), getattr(published, part)
        np.testing.assert_array_equal(one.targets, other.targets)
        differ = one.inputs != other.inputs
        changed += int(differ.any(axis=1).sum())
        assert set(np.flatnonzero(differ.any(axis=0))) <= {vessels, vessels + 1}
    assert changed == 4
