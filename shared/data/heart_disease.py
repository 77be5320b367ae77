"""Heart disease: patients of four hospitals, 13 findings each (Janosi et al. 1988, UCI).

The preprocessing is public: bounds, categories and codes below are medical knowledge and the data
set's own documentation. None is computed from the data, so none has to be paid for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bract.shared import canonical
from bract.shared.data.examples import Examples, Groups, Splits
from bract.shared.data.locations import Source, content, located
from bract.shared.data.table import Encoder, Words, number
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Categorical, Numeric, Table, Target

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
# Of each hospital's patients two thirds train; of the public third a fifth is validation.
TRAIN, VALIDATION = 2 / 3, 1 / 15

SOURCE = Source(
    name="heart-disease",
    base="https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/",
    sha256={
        "processed.cleveland.data": (
            "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8"
        ),
        "processed.hungarian.data": (
            "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796"
        ),
        "processed.switzerland.data": (
            "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314"
        ),
        "processed.va.data": "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
    },
    # The same patients with -9, and 0 in Cleveland's file, where UCI's has a question mark.
    reissued={
        "processed.cleveland.data": (
            "7849bebbf4e963b402b4fc7b44df2c2682262df969f36d2c536cf6391268dec0"
        ),
        "processed.hungarian.data": (
            "8509c892c6c26b0885e071ee880bc1dbe20b4487835be03327e79c70e29bb476"
        ),
        "processed.switzerland.data": (
            "738d3437d935fd4acc2dd7a33b159ce9f5c0cd2e255365fc09b09dd48397515a"
        ),
        "processed.va.data": "174af8088deb9185ca5c2fb90f4925852ef158ff98b95bda78f3eb9813399710",
    },
    suffix="",
)


# In the file's order. Blood pressure and cholesterol of 0 are how these files write 'not taken',
# and so is 0 for thal, whose codes are 3 (normal), 6 (fixed defect) and 7 (reversible defect).
TABLE = Table(
    columns=(
        Numeric(name="age", low=20, high=90),  # years
        Categorical(name="sex", categories=("0", "1")),
        # chest pain: typical, atypical, not anginal, none
        Categorical(name="cp", categories=("1", "2", "3", "4")),
        Numeric(name="trestbps", low=80, high=200, missing=("0",)),  # mmHg at rest
        Numeric(name="chol", low=100, high=400, missing=("0",)),  # mg/dl
        Categorical(name="fbs", categories=("0", "1")),  # fasting blood sugar over 120 mg/dl
        Categorical(name="restecg", categories=("0", "1", "2")),
        Numeric(name="thalach", low=60, high=220),  # highest heart rate, per minute
        Categorical(name="exang", categories=("0", "1")),  # angina when exercising
        Numeric(name="oldpeak", low=-2, high=5),  # ST depression, mm
        Categorical(name="slope", categories=("1", "2", "3")),
        Numeric(name="ca", low=0, high=3),  # vessels coloured by fluoroscopy
        Categorical(name="thal", categories=("3", "6", "7"), missing=("0",)),
    ),
    target=Target(name="num", classes=("0", "1", "2", "3", "4")),  # 0: no vessel narrowed by half
    missing=("", "?", "-9"),
)
ENCODER = Encoder(TABLE)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a file: its number, from 1, and its text."""

    number: int
    text: str


def load_heart_disease(folder: Path | None = None) -> Splits:
    """Returns the four hospitals' patients; in each, two thirds train by one fixed shuffle.

    Args:
        folder: holds the four published files; found or downloaded where it is None.

    Raises:
        UsageError: where a file is missing or is not a published one.
    """
    parts = [_published(folder, hospital) for hospital in HOSPITALS]
    train, validation, test = (_together(of) for of in zip(*parts, strict=True))
    return Splits(train=train, validation=validation, test=test)


def load_public_patients(folder: Path | None = None) -> tuple[Examples, Examples]:
    """Returns the validation and test patients of all hospitals.

    Args:
        folder: holds validation.HOSPITAL.data and test.HOSPITAL.data as `split_files` writes
            them, or the published files.
    """
    if folder is None or not any(folder.glob("test.*.data")):
        splits = load_heart_disease(folder)
        return splits.validation, splits.test
    validation, test = (
        _together([_rows(folder / f"{part}.{hospital}.data") for hospital in HOSPITALS])
        for part in ("validation", "test")
    )
    return validation, test


def load_hospital(folder: Path | None, hospital: str) -> Examples:
    """Returns one hospital's training patients, and opens no other's file.

    Args:
        folder: holds the hospital's own train.HOSPITAL.data, or its published file.
        hospital: its name.

    Raises:
        UnknownName: for another hospital.
        UsageError: where its file is missing.
    """
    return _examples(_training_rows(folder, hospital)[1], _place(hospital))


def check_hospital(folder: Path | None, hospital: str) -> list[str]:
    """Returns what is wrong with a hospital's training rows: file, row and column, no cell."""
    path, rows = _training_rows(folder, hospital)
    return [
        f"{path}, row {row.number}, {problem}" for row in rows for problem in _problems(row.text)
    ]


def split_files(source: Path | None, sites: Path, public: Path) -> None:
    """Writes what each hospital and the server of a real federation would hold.

    `sites`/HOSPITAL/train.HOSPITAL.data has that hospital's training rows alone; `public` has
    validation.HOSPITAL.data and test.HOSPITAL.data of all four.

    Args:
        source: holds the four published files; found or downloaded where it is None.
        sites: made where it is missing; a folder for each hospital.
        public: made where it is missing.
    """
    public.mkdir(parents=True, exist_ok=True)
    for hospital in HOSPITALS:
        own = sites / hospital
        own.mkdir(parents=True, exist_ok=True)
        train, validation, test = _published(source, hospital)
        _write(own / f"train.{hospital}.data", train)
        _write(public / f"validation.{hospital}.data", validation)
        _write(public / f"test.{hospital}.data", test)


def _training_rows(folder: Path | None, hospital: str) -> tuple[str, list[Row]]:
    """Returns a hospital's training rows, and what to call their file."""
    _place(hospital)
    own = None if folder is None else folder / f"train.{hospital}.data"
    if own is not None and own.exists():
        return str(own), _rows(own)
    return f"processed.{hospital}.data", _published(folder, hospital)[0]


def _published(folder: Path | None, hospital: str) -> tuple[list[Row], list[Row], list[Row]]:
    """Returns a hospital's rows that train, validate and test.

    The shuffle looks at nothing but the number of rows, which is public.
    """
    folder = located(SOURCE) if folder is None else folder
    rows = _lines(content(SOURCE, folder, f"processed.{hospital}.data"))
    order = np.random.default_rng([920, _place(hospital)]).permutation(len(rows))
    train, validation = round(TRAIN * len(rows)), round(VALIDATION * len(rows))
    cuts = np.split(order, [train, train + validation])
    one, two, three = ([rows[place] for place in np.sort(cut)] for cut in cuts)
    return one, two, three


def _rows(path: Path) -> list[Row]:
    try:
        return _lines(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; name the folder that holds it"
        ) from error


def _lines(text: bytes) -> list[Row]:
    # Whatever is no text is a cell that is no number, and never an error: it would tell.
    lines = text.decode("utf-8", errors="replace").split("\n")
    return [Row(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _write(path: Path, rows: Sequence[Row]) -> None:
    canonical.write_atomically(path, "".join(f"{row.text}\n" for row in rows).encode())


def _together(parts: Sequence[Sequence[Row]]) -> Examples:
    """Returns the hospitals' examples, one hospital after another."""
    each = [_examples(rows, place) for place, rows in enumerate(parts)]
    return Examples(
        inputs=np.concatenate([part.inputs for part in each]),
        targets=np.concatenate([part.targets for part in each]),
        groups=Groups(HOSPITALS, np.repeat(np.arange(len(each)), [len(part) for part in each])),
    )


def _examples(rows: Sequence[Row], hospital: int) -> Examples:
    """Returns the examples of one hospital, whose classes are healthy and sick."""
    read = ENCODER.examples([None if any(_unreadable(r.text)) else r.text.split(",") for r in rows])
    index = np.full(len(rows), hospital, dtype=np.int64)
    return Examples(
        inputs=read.inputs,
        targets=np.minimum(read.targets, 1),
        groups=Groups(HOSPITALS, index),
    )


def _problems(text: str) -> Iterator[str]:
    """Yields what an operator should know of a row, by column."""
    unreadable = list(_unreadable(text))
    yield from unreadable or ENCODER.problems(text.split(","))


def _unreadable(text: str) -> Iterator[str]:
    """Yields why the cells of a row are not the numbers they must be, by column."""
    cells = text.split(",")
    if len(cells) != len(ENCODER.names):
        place = min(len(cells), len(ENCODER.names) + 1)
        yield f"column {place}: not {len(ENCODER.names)} columns"
        return
    absent = Words.of(TABLE.missing)
    for name, cell in zip(ENCODER.names, cells, strict=True):
        if math.isnan(number(cell)) and absent.place(cell.strip()) is None:
            yield f"column {name}: not a number"


def _place(hospital: str) -> int:
    if hospital not in HOSPITALS:
        raise UnknownName("hospital", hospital, HOSPITALS)
    return HOSPITALS.index(hospital)
