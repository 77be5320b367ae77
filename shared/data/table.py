"""Tables with named columns: cells become inputs by the public terms of a contract."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bract.shared.data.examples import UNREADABLE, Examples
from bract.shared.data.persons import first_rows, numbered
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Categorical, Column, Numeric, Preparation, Table
from bract.shared.terms import DataTerms, Scalar

FORM = (
    'kind = "table", columns = [{kind = "numeric", name = "age", low = 0, high = 100}, '
    '{kind = "categorical", name = "ward", categories = ["a", "b"]}], '
    'target = {name = "ill", classes = ["no", "yes"]}'
)


@dataclass(frozen=True, slots=True)
class Words:
    """Known words, each at its place; numbers are also met by other ways to write them.

    Example:
        >>> words = Words.of(["1", "2", "x"])
        >>> [words.place(cell) for cell in ("2", "1.0", "x", "y")]
        [1, 0, 2, None]
    """

    texts: Mapping[str, int]
    numbers: Mapping[float, int]

    @classmethod
    def of(cls, words: Iterable[str]) -> Words:
        """Returns words at the places in which they come."""
        texts = {word: place for place, word in reversed(list(enumerate(words)))}
        values = ((number(word), place) for word, place in texts.items())
        return cls(texts, {value: place for value, place in values if math.isfinite(value)})

    def place(self, cell: str) -> int | None:
        """Returns the place of a cell's word, None where it is none."""
        found = self.texts.get(cell)
        return self.numbers.get(number(cell)) if found is None and self.numbers else found


def number(cell: str) -> float:
    """Returns a cell's number, NaN where it is none that is finite."""
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


class Encoder:
    """What a table's terms make of its rows; it takes whatever stands in a cell.

    Args:
        table: the public terms.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.names = [*(column.name for column in table.columns), table.target.name]
        self._missing = [Words.of([*table.missing, *c.missing]) for c in table.columns]
        self._known = [
            Words.of(c.categories if isinstance(c, Categorical) else ()) for c in table.columns
        ]
        self._classes = None if table.target.classes is None else Words.of(table.target.classes)
        self._no_value = Words.of(table.missing)

    def examples(self, rows: Sequence[Sequence[str] | None]) -> Examples:
        """Returns an example for each row of cells in the order of `names`; None cannot be read.

        Inputs: float32 of (rows, width) within [-1, 1]. Targets: int64 places among the classes,
        UNREADABLE where the row cannot be read; or float32 within [-1, 1], then NaN.
        """
        inputs = np.zeros((len(rows), self.table.width), dtype=np.float32)
        kind, nothing = (np.float32, np.nan) if self._classes is None else (np.int64, UNREADABLE)
        targets = np.full(len(rows), nothing, dtype=kind)
        for place, row in enumerate(rows):
            found = None if row is None else self._encoded(row)
            if found is not None:
                inputs[place], targets[place] = found
        return Examples(inputs=inputs, targets=targets)

    def problems(self, row: Sequence[str]) -> Iterator[str]:
        """Yields what an operator should know of a row's cells, by column and never by value.

        First what keeps the row from being read. A category does not: it becomes 'other'.
        """
        *cells, last = (cell.strip() for cell in row)
        if self._target(last) is None:
            fault = "not a number" if self._classes is None else "not a class"
            yield f"column {self.table.target.name}: {_not_text(last) or fault}"
        others: list[str] = []
        for place, (column, cell) in enumerate(zip(self.table.columns, cells, strict=True)):
            if found := _not_text(cell) or self._fault(place, column, cell):
                told = f"column {column.name}: {found}"
                if isinstance(column, Categorical):
                    others.append(told)
                else:
                    yield told
        yield from others

    def reads(self, row: Sequence[str]) -> bool:
        """Returns whether an example can be made of a row's cells."""
        return self._encoded(row) is not None

    def _fault(self, place: int, column: Column, cell: str) -> str | None:
        if self._missing[place].place(cell) is not None:
            return None
        if isinstance(column, Numeric):
            return "not a number" if math.isnan(number(cell)) else None
        return "unknown category" if self._known[place].place(cell) is None else None

    def _encoded(self, row: Sequence[str]) -> tuple[list[float], float] | None:
        """Returns the inputs and the target of a row, None where it cannot be read."""
        *cells, last = (cell.strip() for cell in row)
        target = self._target(last)
        if target is None:
            return None
        inputs: list[float] = []
        for place, (column, cell) in enumerate(zip(self.table.columns, cells, strict=True)):
            missing = self._missing[place].place(cell) is not None
            if isinstance(column, Categorical):
                inputs += _one_hot(column, self._known[place].place(cell), missing)
                continue
            value = number(cell)
            if not missing and math.isnan(value):
                return None
            scaled = 0.0 if missing else _scaled(value, column.low, column.high)
            inputs += [scaled, float(missing)]
        return inputs, target

    def _target(self, cell: str) -> float | None:
        """Returns what is to be learned, None where it cannot be read."""
        bounds = self.table.target.bounds
        if self._classes is not None or bounds is None:
            return None if self._classes is None else self._classes.place(cell)
        value = number(cell)
        if math.isnan(value) or self._no_value.place(cell) is not None:
            return None
        return _scaled(value, *bounds)


def _one_hot(column: Categorical, place: int | None, missing: bool) -> list[float]:
    inputs = [0.0] * column.width
    inputs[-1 if missing else -2 if place is None else place] = 1.0
    return inputs


def _scaled(value: float, low: float, high: float) -> float:
    clipped = min(max(value, low), high)
    return 2.0 * (clipped - low) / (high - low) - 1.0


def _not_text(cell: str) -> str | None:
    # what is no UTF-8 was read as lone surrogates
    return "not UTF-8" if any("\ud800" <= letter <= "\udfff" for letter in cell) else None


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a file: its line, from 1, and its cells; None: not to be read."""

    number: int
    cells: list[str] | None


def lines(path: Path) -> list[Line]:
    """Returns the rows of a CSV file, its header first, blank lines left out.

    Raises:
        UsageError: where the file cannot be opened; never for what is in it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; name the folder that holds it"
        ) from error
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    each = re.split("\r\n|[\r\n]", text)  # at any end, whichever others there are: no row has a say
    read = (Line(number, _cells(line)) for number, line in enumerate(each, 1))
    return [line for line in read if line.cells != []]


def _cells(line: str) -> list[str] | None:
    """Returns the cells of one line, none where it is blank; None where it is not to be read.

    A line is a row, whatever its quotes: an open one that went on would take others' rows with it,
    and one person more in the file would be many fewer.
    """
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:  # a quote that stays open, or a cell of over 131,072 letters
        return None


def describe(options: Mapping[str, Scalar], preparation: Preparation | None) -> DataTerms:
    """Returns the terms of a table by its schema.

    Raises:
        UsageError: where there is no schema of a table.
        UnknownName: for an option.
    """
    if options:
        raise UnknownName("option of the data set 'table',", min(options), ["(none)"])
    if not isinstance(preparation, Table):
        raise UsageError(f"data set 'table' needs --schema FILE.toml, as in: {FORM}")
    classes = preparation.target.classes
    return DataTerms(
        name="table",
        shape=(preparation.width,),
        classes=1 if classes is None else len(classes),
        task="value" if classes is None else "classes",
        preparation=preparation,
    )


def read(terms: DataTerms, path: Path) -> Examples:
    """Returns the rows of a CSV file as examples; what cannot be read adds nothing.

    Raises:
        UsageError: where the file cannot be opened; never for what is in it.
    """
    table = _table(terms)
    encoder = Encoder(table)
    header, rows = _header_and_rows(path)
    places = _places(encoder, header)
    persons = None
    if table.group is not None:
        everyone = _persons(table.group, header, rows)
        kept = first_rows(everyone, table.rows_per_group or 1)
        rows, persons = [rows[place] for place in kept], everyone[kept]
    found = encoder.examples([_chosen(row, header, places) for row in rows])
    return replace(found, persons=persons)


def demand(terms: DataTerms, path: Path) -> None:
    """Returns where no needed column stands twice, and a person has no more rows than is said.

    For a simulation and for public files: a joined site leaves out what is too much.

    Raises:
        UsageError: naming the column, or where the terms do not say how many rows of a person to
            use.
    """
    table = _table(terms)
    header, rows = _header_and_rows(path)
    twice = next((name for name in _needed(table) if header.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{path}, row 1, column {twice}: there twice: rename or remove one")
    if fault := _several_rows(table, header, rows):
        raise UsageError(f"{path}: {fault}")


def check(terms: DataTerms, path: Path) -> list[str]:
    """Returns what is wrong with a CSV file: by row and column, and no cell.

    First the rows that cannot be read.
    """
    encoder = Encoder(_table(terms))
    header, rows = _header_and_rows(path)
    places = _places(encoder, header)
    if not header and not lines(path):
        return [f"{path} is empty"]
    if places is None and (fault := _other_form(header)):
        return [f"{path}, row 1: {fault}"]
    problems = [
        f"{path}, row 1, column {name}: {'missing' if count == 0 else 'there twice'}"
        for name in _needed(encoder.table)
        if (count := header.count(name)) != 1
    ]
    if fault := _several_rows(encoder.table, header, rows):
        problems.append(f"{path}: {fault}")
    read: list[str] = []
    for row in rows if places else ():
        cells = _chosen(row, header, places)
        faults = [f"not {len(header)} columns"] if cells is None else encoder.problems(cells)
        told = read if cells is not None and encoder.reads(cells) else problems
        told += [f"{path}, row {row.number}, {fault}" for fault in faults]
    return problems + read


def _needed(table: Table) -> list[str]:
    """Returns the names of the columns that a file must have, each once."""
    group = [] if table.group is None else [table.group]
    return [*(column.name for column in table.columns), table.target.name, *group]


def _table(terms: DataTerms) -> Table:
    if not isinstance(terms.preparation, Table):
        raise UsageError(f"data set {terms.name!r} has no schema of a table in its contract")
    return terms.preparation


def _header_and_rows(path: Path) -> tuple[list[str], list[Line]]:
    header, *rows = lines(path) or [Line(1, None)]
    return [cell.strip() for cell in header.cells or ()], rows


def _other_form(header: Sequence[str]) -> str | None:
    """Returns why a file whose columns are not found is no CSV file of ours, None where it is."""
    if not header:
        return "a quote that stays open, or a cell too long: the columns are not known"
    if any(_not_text(cell) or "\0" in cell for cell in header):
        return "not UTF-8: save the file as CSV in UTF-8"
    if len(header) == 1 and any(letter in header[0] for letter in ";\t|"):
        return "one column alone: save the file with commas between columns"
    return None


def _several_rows(table: Table, header: Sequence[str], rows: Sequence[Line]) -> str | None:
    """Returns why it must be said how many rows of a person are used, None where it need not."""
    if table.group is None or table.rows_per_group is not None:
        return None
    persons = _persons(table.group, header, rows)
    if len(np.unique(persons)) == len(persons):
        return None
    return (
        f"column {table.group}: a person has more than one row: say how many of each are used, by "
        "rows_per_group in the schema or --rows-per-group"
    )


def _persons(group: str, header: Sequence[str], rows: Sequence[Line]) -> npt.NDArray[np.int64]:
    """Returns a number for each row, equal where the cells of the column are, and made of them.

    A row without that cell, which cannot be read either, is a person of its own.
    """
    place = header.index(group) if group in header else None
    cells = (
        f"row {row.number}"
        if place is None or row.cells is None or len(row.cells) != len(header)
        else f"cell {row.cells[place].strip()}"
        for row in rows
    )
    return np.array([numbered(cell) for cell in cells], dtype=np.int64)


def _places(encoder: Encoder, header: Sequence[str]) -> list[int] | None:
    """Returns where the terms' columns stand in a file, None where one is missing."""
    if any(name not in header for name in encoder.names):
        return None
    return [header.index(name) for name in encoder.names]


def _chosen(row: Line, header: Sequence[str], places: Sequence[int] | None) -> list[str] | None:
    """Returns a row's cells in the order of the terms, None where it has not its header's."""
    if places is None or row.cells is None or len(row.cells) != len(header):
        return None
    return [row.cells[place] for place in places]
