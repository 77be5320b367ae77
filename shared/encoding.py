"""A user's files as inputs of a model, by what the contract's data terms say.

The only place that knows kinds of files: .npz of inputs for every contract; .csv of plain numbers
where it prepares nothing; a .csv by its table, .jsonl by its text, image files by its images. Here
everything that cannot be read is an error: the rows are the user's, and nobody else hears of it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from zipfile import BadZipFile

import numpy as np

from bract.shared.data import text as user_text
from bract.shared.data import tokens
from bract.shared.data.images import decoded, fault
from bract.shared.data.table import Encoder
from bract.shared.errors import UsageError
from bract.shared.preparation import Images, Table, Text
from bract.shared.terms import DataTerms

if TYPE_CHECKING:
    from bract.shared.prediction import Answers

IMAGES: Final = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Inputs of (rows, *shape), and what makes a file of the rows with answers beside them."""

    inputs: np.ndarray
    answered: Callable[[Answers], bytes]


def encode(data: DataTerms, paths: Sequence[Path]) -> Rows:
    """Returns what is in a user's files: one file, or images and folders of them.

    Raises:
        UsageError: for another kind of file than the contract's, or a row that cannot be read.
    """
    for path in paths:
        if not path.exists():
            raise UsageError(f"no input {path}")
    rows = _reader(data, paths)()
    _check(rows.inputs, data, paths[0])
    return rows


def table_inputs(table: Table, rows: Sequence[Mapping[str, str]]) -> np.ndarray:
    """Returns the inputs of a table's rows, given as cells by column.

    Raises:
        UsageError: for a cell that should be a number and is none.
    """
    target = table.target  # not looked at: any readable one will do
    blank = target.classes[0] if target.classes else str(target.low)
    cells = [[*(row[column.name] for column in table.columns), blank] for row in rows]
    encoder = Encoder(table)
    for place, row in enumerate(cells, 1):
        for problem in encoder.problems(row):
            if problem.endswith("not a number"):
                raise UsageError(f"row {place}, {problem}: mend it, or leave the cell empty")
    return encoder.examples(cells).inputs


def text_inputs(text: Text, texts: Sequence[str]) -> np.ndarray:
    """Returns the tokens of texts."""
    return tokens.encode(texts, text)


def image_inputs(images: Images, data: DataTerms, paths: Sequence[Path]) -> np.ndarray:
    """Returns the pixels of image files, uint8 of (images, *shape).

    Raises:
        UsageError: for a file that is no image.
    """
    found = [decoded(path, images) for path in paths]
    for path, one in zip(paths, found, strict=True):
        if one is None:
            raise UsageError(f"{path} cannot be read ({fault(path)}): mend it or leave it out")
    pixels = [one[0] for one in found if one is not None]
    return np.stack(pixels) if pixels else np.zeros((0, *data.shape), dtype=np.uint8)


def _reader(data: DataTerms, paths: Sequence[Path]) -> Callable[[], Rows]:
    """Returns what reads these files.

    Raises:
        UsageError: where the contract does not name their kind.
    """
    prepared, first = data.preparation, paths[0]
    pictures = isinstance(prepared, Images) and first.suffix != ".npz"
    if len(paths) > 1 and not pictures:
        raise UsageError(f"{len(paths)} inputs: give one file; only images may be several")
    if first.suffix == ".npz":
        return lambda: _npz(first)
    if isinstance(prepared, Images):
        return lambda: _pictures(prepared, data, paths)
    if isinstance(prepared, Text) and first.suffix == ".jsonl":
        return lambda: _json_lines(prepared, first)
    if isinstance(prepared, Table) and first.suffix == ".csv":
        return lambda: _table(prepared, first)
    if prepared is None and first.suffix == ".csv":
        return lambda: _numbers(data, first)
    other = ".jsonl" if isinstance(prepared, Text) else ".csv"
    raise UsageError(f"cannot read {first}: the data set {data.name!r} takes {other} or .npz")


def _check(inputs: np.ndarray, data: DataTerms, path: Path) -> None:
    """Returns where inputs are what the model takes.

    Raises:
        UsageError: naming both shapes, or the first row that will not do.
    """
    if inputs.shape[1:] != data.shape:
        raise UsageError(
            f"{path}: inputs of shape {list(inputs.shape[1:])} a row, and the model takes "
            f"{list(data.shape)}"
        )
    if not len(inputs):
        raise UsageError(f"{path} holds no rows")
    whole = inputs.dtype.kind in "iu"
    if not whole and (inputs.dtype.kind != "f" or data.vocabulary is not None):
        wanted = "numbers" if data.vocabulary is None else "whole numbers"
        raise UsageError(f"{path}: inputs must be {wanted} (got {inputs.dtype})")
    good = np.isfinite(inputs)
    if data.vocabulary is not None:
        good = (inputs >= 0) & (inputs < data.vocabulary)
    bad = np.flatnonzero(~good.reshape(len(inputs), -1).all(1))
    if len(bad):
        reason = (
            "a number is not finite"
            if data.vocabulary is None
            else f"a token is not from 0 below {data.vocabulary}"
        )
        raise UsageError(f"{path}, row {bad[0] + 1}: {reason}")


def _npz(path: Path) -> Rows:
    """Returns the array `inputs` of a file; all others go back as they are."""
    try:
        # opened here: of a damaged archive numpy leaves its own file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            held = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:  # damaged, or with objects in it
        raise UsageError(f"cannot read {path}: it must be .npz of plain arrays") from error
    if "inputs" not in held:
        raise UsageError(f"{path} has no array 'inputs': it has {', '.join(held) or 'none'}")

    def answered(answers: Answers) -> bytes:
        added: dict[str, Any] = {"prediction": np.array(answers.predictions)}
        if answers.probability is not None:
            added["probability"] = answers.probability
        if answers.probabilities is not None:
            added["probabilities"] = answers.probabilities
        file = io.BytesIO()
        np.savez(file, **_joined(held, added, path))
        return file.getvalue()

    return Rows(held["inputs"], answered)


def _numbers(data: DataTerms, path: Path) -> Rows:
    """Returns the rows of a CSV whose columns are the inputs, in their order."""
    header, lines = _csv(path)
    width = math.prod(data.shape)
    if len(header) != width:
        raise UsageError(
            f"{path}: {len(header)} columns, and the model takes {width}: the inputs in their "
            "order, under a line of names"
        )
    values = np.empty((len(lines), width), dtype=np.float32 if data.vocabulary is None else int)
    for place, cells in enumerate(lines):
        for column, cell in enumerate(cells):
            try:
                values[place, column] = values.dtype.type(cell)
            except (ValueError, OverflowError) as error:
                raise UsageError(
                    f"{path}, row {place + 2}, column {header[column]}: not a number"
                ) from error
    return Rows(values.reshape(-1, *data.shape), _csv_answered(header, lines, path))


def _table(table: Table, path: Path) -> Rows:
    """Returns the rows of a CSV with the table's columns; the target and others may be there."""
    header, lines = _csv(path)
    for column in table.columns:
        if header.count(column.name) != 1:
            known = "is missing" if column.name not in header else "is there twice"
            raise UsageError(f"{path}: column {column.name!r} {known}")
    rows = [dict(zip(header, cells, strict=True)) for cells in lines]
    return Rows(table_inputs(table, rows), _csv_answered(header, lines, path))


def _json_lines(text: Text, path: Path) -> Rows:
    """Returns the texts of a file of JSON objects, each with the key `text`."""
    rows: list[dict[str, Any]] = []
    for number, line in user_text.lines(_content(path)):
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}, row {number}: not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, row {number}: not JSON") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UsageError(f"{path}, row {number}: no object with a 'text'")
        rows.append(row)

    def answered(answers: Answers) -> bytes:
        lines = []
        for place, row in enumerate(rows):
            added: dict[str, Any] = {"prediction": answers.predictions[place]}
            if answers.probability is not None:
                added["probability"] = float(answers.probability[place])
            if answers.probabilities is not None:
                each = answers.probabilities[place].tolist()
                added["probabilities"] = dict(zip(answers.labels, each, strict=True))
            lines.append(json.dumps(_joined(row, added, path), ensure_ascii=False) + "\n")
        # Half of a surrogate pair, which JSON may hold, has no UTF-8: it goes back as it came.
        return "".join(lines).encode(errors="backslashreplace")

    return Rows(text_inputs(text, [row["text"] for row in rows]), answered)


def _pictures(images: Images, data: DataTerms, paths: Sequence[Path]) -> Rows:
    """Returns images, in the order given and by name within a folder; a CSV goes back."""
    files: list[Path] = []
    for path in paths:
        inner = sorted(one for one in path.rglob("*") if one.suffix.lower() in IMAGES)
        files += inner if path.is_dir() else [path]
    if not files:
        raise UsageError(f"no image in {paths[0]}: it may be {', '.join(IMAGES)}")

    def answered(answers: Answers) -> bytes:
        columns = answers.columns()
        labels = columns.pop("prediction")
        columns = {"file": [str(file) for file in files], "label": labels, **columns}
        return _csv_of(list(columns), zip(*columns.values(), strict=True))

    return Rows(image_inputs(images, data, files), answered)


def _csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Returns the names in the first line, and the cells of the others."""
    try:
        lines = list(csv.reader(io.StringIO(_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise UsageError(f"{path} is not CSV: {error}") from error
    if not lines:
        raise UsageError(f"{path} is empty: its first line must name the columns")
    header, *rows = [[cell.strip() for cell in cells] for cells in lines if cells]
    for number, cells in enumerate(rows, 2):
        if len(cells) != len(header):
            raise UsageError(f"{path}, row {number}: {len(cells)} cells under {len(header)} names")
    return header, rows


def _csv_answered(
    header: Sequence[str], lines: Sequence[Sequence[str]], path: Path
) -> Callable[[Answers], bytes]:
    def answered(answers: Answers) -> bytes:
        added = answers.columns()
        names = _joined(dict.fromkeys(header), dict.fromkeys(added), path)
        beside = zip(*added.values(), strict=True)
        return _csv_of(list(names), ([*c, *more] for c, more in zip(lines, beside, strict=True)))

    return answered


def _csv_of(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue().encode()


def _joined(held: Mapping[str, Any], added: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns both, what was there first.

    Raises:
        UsageError: where a name is taken.
    """
    taken = next((name for name in added if name in held), None)
    if taken is not None:
        raise UsageError(f"{path} has {taken!r} already: rename it")
    return {**held, **added}


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def _text(path: Path) -> str:
    try:
        return _content(path).removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8") from error
