"""Tables: public terms make inputs of cells, and nothing in a cell fails a site."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bract.shared import data
from bract.shared.data import Examples
from bract.shared.data.choice import read_schema
from bract.shared.data.partitions import Partition, split
from bract.shared.data.table import Encoder, Line, lines
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Categorical, Numeric, Table, Target
from bract.shared.terms import DataTerms

HEADER = "age,note,ward,ill"


def table(**changes: Any) -> Table:
    terms: dict[str, Any] = {
        "columns": (
            Numeric(name="age", low=20, high=80, missing=("-1",)),
            Categorical(name="ward", categories=("a", "7")),
        ),
        "target": Target(name="ill", classes=("no", "yes")),
    }
    return Table(**{**terms, **changes})


def terms(**changes: Any) -> DataTerms:
    return data.describe("table", {}, table(**changes))


STAY = Target(name="ill", low=0, high=10)


def written(
    folder: Path, *rows: str | bytes, name: str = "train.csv", header: str = HEADER
) -> Path:
    lines = [row if isinstance(row, bytes) else row.encode() for row in (header, *rows)]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


def read(folder: Path, *rows: str | bytes, **changes: Any) -> Examples:
    return data.load_part(terms(**changes), written(folder, *rows), "1/1")


def problems(folder: Path, *rows: str | bytes, least: int = 1, **changes: Any) -> list[str]:
    found = data.check_part(terms(**changes), written(folder, *rows), "1/1", least)
    return [problem.removeprefix(f"{folder / 'train.csv'}") for problem in found]


def test_cells_become_scaled_numbers_and_one_input_for_each_category(tmp_path: Path) -> None:
    found = read(tmp_path, "50,x,a,yes", " 35 ,y,7.0,no", "1e9,,b,yes", "?,,NA,no", "-1.0,,,no")
    assert found.inputs.dtype == np.float32
    assert found.targets.dtype == np.int64
    assert found.inputs.tolist() == [
        [0, 0, 1, 0, 0, 0],
        [-0.5, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [0, 1, 0, 0, 0, 1],
        [0, 1, 0, 0, 0, 1],
    ]
    assert found.targets.tolist() == [1, 0, 1, 0, 0]


def test_a_number_to_learn_is_scaled_and_clipped(tmp_path: Path) -> None:
    found = read(tmp_path, "50,,a,2.5", "50,,a,99", "50,,a,?", "50,,a,ten", target=STAY)
    assert found.targets.dtype == np.float32
    np.testing.assert_array_equal(found.targets, np.array([-0.5, 1, np.nan, np.nan], np.float32))
    assert (terms(target=STAY).task, terms(target=STAY).classes) == ("value", 1)


UNREADABLE: dict[str, tuple[str | bytes, str]] = {
    "word": ("7x31,,a,no", "column age: not a number"),
    "infinite": ("1e999,,a,no", "column age: not a number"),
    "class": ("50,,a,7x31", "column ill: not a class"),
    "no-class": ("50,,a,?", "column ill: not a class"),
    "short": ("50,,a", "not 4 columns"),
    "long": ("50,,a,no,7x31", "not 4 columns"),
    "long-cell": ("50," + 200_000 * "7" + ",a,no", "not 4 columns"),
    "not-utf-8": (b"\xff7x31,,a,no", "column age: not UTF-8"),
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_row_that_cannot_be_read_adds_nothing_and_is_named_without_its_cells(
    tmp_path: Path, fault: str
) -> None:
    row, problem = UNREADABLE[fault]
    rows = ("50,,a,no", row, '"50","",a,yes')
    found = read(tmp_path, *rows)
    assert found.targets.tolist() == [0, -1, 1]
    assert not found.inputs[1].any()
    assert problems(tmp_path, *rows) == [f", row 3, {problem}"]


def test_categories_that_are_not_known_are_other_and_reported(tmp_path: Path) -> None:
    rows = ("50,,b,no", b"50,,\xff,no")
    assert read(tmp_path, *rows).inputs[:, 2:].tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]
    assert problems(tmp_path, *rows, least=3) == [
        ", row 2, column ward: unknown category",
        ", row 3, column ward: not UTF-8",
        "table 1/1: fewer rows than the nominal size 3: declare a lower one",
    ]


def test_what_keeps_a_row_from_being_read_is_told_before_what_does_not(tmp_path: Path) -> None:
    rows = ("50,,b,no", "50,,b,maybe", "old,,b,no")
    assert problems(tmp_path, *rows) == [
        ", row 3, column ill: not a class",
        ", row 3, column ward: unknown category",
        ", row 4, column age: not a number",
        ", row 4, column ward: unknown category",
        ", row 2, column ward: unknown category",
    ]
    path = written(tmp_path, *["50,,b,maybe"] * 9, name="all.csv") / "all.csv"
    with pytest.raises(UsageError, match=r"can be read: .*, row 2, column ill: not a class"):
        data.load(terms(), path)


def test_columns_are_found_by_name_and_a_mark_of_byte_order_is_no_part_of_one(
    tmp_path: Path,
) -> None:
    written(tmp_path, "no,a,50", header="﻿ill, ward ,age")
    found = data.load_part(terms(), tmp_path, "1/1")
    assert found.inputs.tolist() == [[0, 0, 1, 0, 0, 0]]
    assert data.check_part(terms(), tmp_path, "1/1", 1) == []


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("age,ward,ill\n50,a,no\n".encode("utf-16"), "not UTF-8: save the file as CSV in UTF-8"),
        ("age,ward,ill\n50,a,no\n".encode("utf-16-le"), "not UTF-8: save the file as CSV in UTF-8"),
        (b"age;ward;ill\n50;a;no\n", "one column alone: save the file with commas between columns"),
        (b'age,"ward,ill\n50,a,no\n', "a quote that stays open, or a cell too long: the columns "),
        (b"age\tward\till\n", "one column alone: save the file with commas between columns"),
    ],
)
def test_file_of_another_form_is_told_as_such(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "train.csv").write_bytes(content)
    (found,) = data.check_part(terms(), tmp_path, "1/1", 0)
    assert found.startswith(f"{tmp_path / 'train.csv'}, row 1: {fault}")


def test_public_examples_that_cannot_be_read_are_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for part in ("validation", "test"):
        (tmp_path / f"{part}.csv").write_text("age,ward,ill\n50,a,no\n60,b,maybe\n")
    found = data.load_public(terms(), tmp_path)
    assert [len(examples) for examples in found] == [1, 1]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{path}: 1 of 2 examples cannot be read and add nothing: correct them or take them out; "
        f"the first: {path}, row 3, column ill: not a class"
        for path in (tmp_path / "validation.csv", tmp_path / "test.csv")
    ]


def test_missing_column_is_named_and_a_joined_site_goes_on_without_effect(tmp_path: Path) -> None:
    written(tmp_path, "50,no", "60,yes", header="age,ill")
    assert data.load_part(terms(), tmp_path, "1/1").targets.tolist() == [-1, -1]
    found = data.check_part(terms(), tmp_path, "1/1", 1)
    assert found == [f"{tmp_path / 'train.csv'}, row 1, column ward: missing"]
    written(tmp_path, "50,50,a,no", header="age,age,ward,ill")
    found = data.check_part(terms(), tmp_path, "1/1", 1)
    assert found == [f"{tmp_path / 'train.csv'}, row 1, column age: there twice"]


def test_a_needed_column_that_is_there_twice_is_refused_where_a_user_can_mend_it(
    tmp_path: Path,
) -> None:
    """Which of both was meant nobody knows."""
    rows = ["50,20,a,no,p"] * 40
    for name in ("train", "validation", "test", "all"):
        written(tmp_path, *rows, name=f"{name}.csv", header="age,age,ward,ill,note")
    for opened in (
        lambda: data.load(terms(), tmp_path / "all.csv"),
        lambda: data.load_public(terms(), tmp_path),
    ):
        with pytest.raises(UsageError, match=r"\.csv, row 1, column age: there twice: rename or"):
            opened()
    # a joined site goes on, and other columns may be called as they like
    assert data.load_part(terms(), tmp_path, "1/1").targets.tolist() == [0] * 40
    path = written(tmp_path, *rows, name="all.csv", header="age,note,ward,ill,note") / "all.csv"
    assert len(data.load(terms(), path).train) == 32
    with pytest.raises(UsageError, match="column note: there twice"):
        data.load(terms(group="note", rows_per_group=1), path)


@pytest.mark.parametrize("content", [b"", b"\n\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_told_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    assert len(data.load_part(terms(), tmp_path, "1/1")) == 0
    assert data.check_part(terms(), tmp_path, "1/1", 0) == [f"{path} is empty"]


def test_lines_end_as_any_system_ends_them(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'age,ill\r50,no\r"5\r60,yes\r\n\r70,no\n80,no')
    assert lines(tmp_path / "rows.csv") == [
        Line(1, ["age", "ill"]),
        Line(2, ["50", "no"]),
        Line(3, None),
        Line(4, ["60", "yes"]),
        Line(6, ["70", "no"]),
        Line(7, ["80", "no"]),
    ]


@given(
    rows=st.lists(
        st.lists(st.text(st.characters(codec="utf-8")), min_size=3, max_size=3), max_size=5
    ),
    number=st.booleans(),
)
def test_whatever_the_cells_inputs_are_exact_in_width_and_within_bounds(
    rows: list[list[str]], number: bool
) -> None:
    encoder = Encoder(table(target=STAY) if number else table())
    found = encoder.examples(rows)
    assert found.inputs.shape == (len(rows), encoder.table.width)
    assert np.abs(found.inputs).max(initial=0) <= 1
    known = found.targets[np.isfinite(found.targets)]
    assert np.abs(known).max(initial=0) <= 1
    faults = [list(encoder.problems(row)) for row in rows]
    cells = {cell.strip() for row in rows for cell in row if len(cell.strip()) > 9}
    assert not any(cell in fault for each in faults for fault in each for cell in cells)


@given(
    low=st.floats(-1e300, 1e300),
    high=st.floats(-1e300, 1e300),
    cell=st.floats().map(str) | st.integers().map(str),
)
def test_any_bounds_keep_a_number_within_one(low: float, high: float, cell: str) -> None:
    if not low < high:
        with pytest.raises(ValidationError, match="must be below high"):
            Numeric(name="x", low=low, high=high)
        return
    encoder = Encoder(table(columns=(Numeric(name="x", low=low, high=high),)))
    assert np.abs(encoder.examples([[cell, "no"]]).inputs).max() <= 1


@given(content=st.binary())
def test_no_file_at_all_fails_a_site(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-table"
    folder.mkdir(exist_ok=True)
    for text in (content, f"{HEADER}\n50,,a,no\n".encode() + content):
        (folder / "train.csv").write_bytes(text)
        found = data.load_part(terms(), folder, "1/1")
        assert np.isfinite(found.inputs).all()
        assert set(found.targets.tolist()) <= {-1, 0, 1}
        data.check_part(terms(), folder, "1/1", 1)


def test_a_file_is_cut_by_a_shuffle_that_looks_at_the_number_of_rows_alone(tmp_path: Path) -> None:
    rows = [f"{20 + n % 61},,a,{'yes' if n % 2 else 'no'}" for n in range(200)]
    path = written(tmp_path, *rows, name="all.csv") / "all.csv"
    splits = data.load(terms(), path)
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part) for part in parts] == [160, 10, 30]
    together = np.concatenate([part.inputs for part in parts]).tolist()
    cells = [[row.split(",")[place] for place in (0, 2, 3)] for row in rows]
    assert sorted(together) == sorted(Encoder(table()).examples(cells).inputs.tolist())
    assert together != Encoder(table()).examples(cells).inputs.tolist()
    changed = written(tmp_path, *["80,,7,no"] * 200, name="other.csv") / "other.csv"
    again = data.load(terms(), changed)
    assert [len(part) for part in (again.train, again.validation, again.test)] == [160, 10, 30]
    public = data.load_public(terms(), path)
    np.testing.assert_array_equal(public[1].inputs, splits.test.inputs)


def test_a_folder_of_parts_is_opened_by_those_who_may(tmp_path: Path) -> None:
    for name, count in (("train", 5), ("validation", 2), ("test", 3)):
        written(tmp_path, *["50,,a,no"] * count, "x,,a,no", name=f"{name}.csv")
    splits = data.load(terms(), tmp_path)
    # public files are rid of what cannot be read; a site's rows stay as many as they are
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [6, 2, 3]
    (tmp_path / "train.csv").unlink()
    assert [len(part) for part in data.load_public(terms(), tmp_path)] == [2, 3]
    with pytest.raises(UsageError, match=r"cannot read .*train\.csv"):
        data.load_part(terms(), tmp_path, "1/1")


def test_a_site_may_hold_a_share(tmp_path: Path) -> None:
    written(tmp_path, *["50,,a,no"] * 7)
    held = [len(data.load_part(terms(), tmp_path, f"{n}/2")) for n in (1, 2)]
    assert sum(held) == 7
    assert len(data.load_part(terms(), tmp_path, "100/100")) <= 7  # too few for all is no error


def test_what_a_simulation_cannot_read_at_all_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = written(tmp_path, "50,no", header="age,ill", name="all.csv") / "all.csv"
    with pytest.raises(UsageError, match=r"no example that can be read: .*column ward: missing"):
        data.load(terms(), path)
    path = written(tmp_path, "50,,a,no", name="all.csv") / "all.csv"
    with pytest.raises(UsageError, match=r"too few examples \(1\) to train, validate and test"):
        data.load(terms(), path)
    with pytest.raises(UsageError, match="name it with --data-file"):
        data.load(terms(), None)


def test_without_a_schema_its_form_is_shown_and_it_is_a_schema(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs --schema FILE\.toml, as in: kind = ") as raised:
        data.describe("table")
    form = str(raised.value).partition("as in: ")[2]
    path = tmp_path / "schema.toml"
    path.write_text(re.sub(r", (?=columns|target)", "\n", form))
    assert isinstance(read_schema(path), Table)
    with pytest.raises(UnknownName, match="unknown option of the data set 'table'"):
        data.describe("table", {"shape": "3"}, table())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": (Numeric(name="ill", low=0, high=1),)}, "'ill' is listed twice"),
        ({"missing": ("a",)}, "column 'ward': 'a' is a category and means missing too"),
        ({"rows_per_group": 2}, "rows_per_group needs the column"),
    ],
)
def test_terms_that_say_two_things_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        table(**changes)


def test_a_contract_fits_by_its_schema_alone() -> None:
    found = data.dataset("table")
    assert found.fits(terms())
    assert found.fits(terms().scaled(1.0, 2.0))
    assert not found.fits(terms().model_copy(update={"shape": (7,)}))
    assert not found.fits(terms().model_copy(update={"preparation": None}))


PERSONS = {"group": "note", "rows_per_group": 2}
VISITS = (
    "30,p,a,no",
    "31,q,a,no",
    "32,p,a,no",
    "33,p,a,yes",
    "34,q,a,no",
    "35,q,a,no",
    "36,r,a,no",
)


def ages(examples: Examples) -> list[int]:
    return [round(30 * value + 50) for value in examples.inputs[:, 0].tolist()]


def test_of_each_person_the_first_rows_are_used_and_no_other_persons_matter(tmp_path: Path) -> None:
    found = read(tmp_path, *VISITS, **PERSONS)
    assert ages(found) == [30, 31, 32, 34, 36]
    assert found.persons is not None
    _, whose = np.unique(found.persons, return_inverse=True)
    assert len({*whose[[0, 2]]}) == len({*whose[[1, 3]]}) == 1
    assert len({*whose}) == 3
    without = read(tmp_path, *(row for row in VISITS if ",q," not in row), **PERSONS)
    assert ages(without) == [30, 32, 36]


def test_several_rows_of_a_person_must_be_said_to_be_so(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, *VISITS, group="note")
    assert problem.startswith(": column note: a person has more than one row: say how many")
    # a joined site never fails on it: one row of each is used
    assert ages(read(tmp_path, *VISITS, group="note")) == [30, 31, 36]
    with pytest.raises(UsageError, match="rows_per_group in the schema or --rows-per-group"):
        data.load(terms(group="note"), written(tmp_path, *VISITS, name="all.csv") / "all.csv")
    assert problems(tmp_path, *VISITS, **PERSONS) == []
    assert terms(group="note").rows_per_person == 1
    assert terms(**PERSONS).rows_per_person == 2
    assert terms().rows_per_person is None


def many_visits(folder: Path) -> Path:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(HEADER.split(","))
    for n in range(300):
        writer.writerow([20 + n % 60, f"p{n % 90}", "a", "yes" if n % 3 else "no"])
    (folder / "all.csv").write_text(text.getvalue())
    return folder / "all.csv"


def test_a_person_is_in_one_part_and_at_one_site(tmp_path: Path) -> None:
    splits = data.load(terms(group="note", rows_per_group=3), many_visits(tmp_path))
    parts = [set(p.persons.tolist()) for p in (splits.train, splits.validation, splits.test)]  # type: ignore[union-attr]
    assert [len(part) for part in parts] == [72, 5, 13]
    assert len(set.union(*parts)) == 90
    train = splits.train
    for kind in ("iid", "dirichlet"):
        partition = Partition(kind=kind, alpha=5.0, min_size=2)  # type: ignore[arg-type]
        rows = split(train.targets, sites=3, partition=partition, seed=1, persons=train.persons)
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(train)))
        held = [set(train.take(own).persons.tolist()) for own in rows]  # type: ignore[union-attr]
        assert sum(len(persons) for persons in held) == 72


def test_a_partition_by_label_of_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="partition 'label' is by label, and these targets"):
        split(np.zeros(100), sites=2, partition=Partition(kind="label"), seed=1)


def test_no_row_takes_another_with_it_whatever_its_quotes(tmp_path: Path) -> None:
    rows = ["a,b", "1,2", '"3,4', "5,6", '7,"8"', "", "9,10\r"]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    found = [(line.number, line.cells) for line in lines(tmp_path / "rows.csv")]
    assert found == [
        (1, ["a", "b"]),
        (2, ["1", "2"]),
        (3, None),
        (4, ["5", "6"]),
        (5, ["7", "8"]),
        (7, ["9", "10"]),
    ]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (('kind = "table"', 'kind = "tabel"'), "kind 'tabel' must be one of table, text, images"),
        (("target = ", "targt = "), r"'targt': did you mean 'target'"),
        (("low = ", "lwo = "), r"'columns.0.numeric.lwo': did you mean 'columns.0.numeric.low'"),
        (("classes", "clases"), r"'target.clases': did you mean 'target.classes'"),
    ],
)
def test_a_misspelt_key_of_a_schema_names_the_nearest(
    tmp_path: Path, changed: tuple[str, str], said: str
) -> None:
    path = tmp_path / "schema.toml"
    text = (
        'kind = "table"\n'
        'columns = [{ kind = "numeric", name = "age", low = 0, high = 100 }]\n'
        'target = { name = "ill", classes = ["no", "yes"] }\n'
    )
    path.write_text(text.replace(*changed))
    with pytest.raises(UsageError, match=said):
        read_schema(path)
