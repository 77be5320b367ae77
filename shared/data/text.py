"""The user's own labelled text: JSON lines, each {"text": …, "label": …}.

In a folder lie train.jsonl, which is a site's, and validation.jsonl and test.jsonl, which are
public. One file is for simulations, which split it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bract.shared.data import labelled, tokens
from bract.shared.data.examples import Examples, Splits
from bract.shared.data.parts import vouched
from bract.shared.data.pretrained import PACKAGED
from bract.shared.data.shares import dealt_rows
from bract.shared.errors import UsageError
from bract.shared.preparation import Preparation, Text
from bract.shared.terms import DataTerms, Scalar

NAME: Final = "text"
UNREADABLE: Final = -1  # no class: such an example adds nothing
OTHERWISE: Final[Mapping[str, Scalar]] = {"tokens": "bytes", "source": PACKAGED, "length": 256}
TRAIN, VALIDATION = 0.8, 0.05
FEWEST: Final = 20
PUBLIC: Final = ("validation.jsonl", "test.jsonl")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a file: its number, from 1, its text and label, and what is wrong with it.

    `label` is None where there is none; what is wrong is told by key, never by value.
    """

    number: int
    text: str
    label: str | None
    problem: str | None = None


def prepare(
    options: Mapping[str, Scalar], preparation: Preparation | None, where: Path | None
) -> Text:
    """Returns how texts become tokens, and the labels.

    Where no schema lists them, the labels are those of the public part: of validation.jsonl and
    test.jsonl, or of what a simulation splits off as validation and test. Joins of bytes are
    learned from that part too.

    Raises:
        UsageError: where neither a schema nor public text tells the labels, or a value will not do.
    """
    if preparation is not None and not isinstance(preparation, Text):
        raise UsageError(
            f"data set {NAME!r} needs a schema of the kind 'text' (got {preparation.kind!r})"
        )
    otherwise: dict[str, Any] = dict(OTHERWISE)
    if preparation is None:
        otherwise["labels"] = _labels_of(_public(where))
    return labelled.complete(
        options,
        preparation,
        name=NAME,
        otherwise=otherwise,
        public_texts=lambda: [row.text for row in _public(where)],
    )


def load_text(terms: DataTerms, where: Path | None) -> Splits:
    """Returns the three parts, of a folder as they lie in it, of a file by one fixed shuffle.

    Of the public parts without what cannot be read.

    Raises:
        UsageError: where a file is missing or nothing in it can be read, or one file is too short
            to be split.
    """
    path = _somewhere(where)
    if not path.is_dir():
        return _split(terms, path)
    train = _vouched(terms, path / "train.jsonl")
    validation, test = load_public_text(terms, path)
    return Splits(train=train, validation=validation, test=test)


def load_public_text(terms: DataTerms, where: Path | None) -> tuple[Examples, Examples]:
    """Returns validation and test, without what cannot be read; of a folder, opens no train.jsonl.

    Raises:
        UsageError: as `load_text` does.
    """
    path = _somewhere(where)
    if not path.is_dir():
        cut = _split(terms, path)
        return cut.validation, cut.test
    validation, test = (_vouched(terms, path / name).readable() for name in PUBLIC)
    return validation, test


def load_part(terms: DataTerms, folder: Path | None, part: str) -> Examples:
    """Returns a site's own examples: of its train.jsonl, which it opens alone, the share "i/n".

    "1/1" is all of it. Never fails for what is in a row, or for how many there are.

    Raises:
        UsageError: where the file is missing, or `part` is no share.
    """
    return _encoded(terms, _own(folder, part)[1])


def check_part(terms: DataTerms, folder: Path | None, part: str) -> list[str]:
    """Returns what is wrong with a site's rows: file, row and key, never a value."""
    return _problems(terms, *_own(folder, part))


def files(folder: Path) -> list[Path]:
    """Returns the files that a simulation reads in a folder."""
    return [folder / f"{part}.jsonl" for part in ("train", "validation", "test")]


def private(folder: Path) -> Path:
    """Returns the file of a site's rows: one that is named itself, or its folder's train.jsonl."""
    return folder if folder.is_file() else folder / "train.jsonl"


def lines(content: bytes) -> list[tuple[int, bytes]]:
    r"""Returns the lines of a file that hold anything, each with its number, from 1.

    A line ends at "\n" alone: within a string JSON may hold what ends lines elsewhere, as U+2028.
    """
    each = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(number, line) for number, line in enumerate(each, 1) if line.strip()]


def _own(folder: Path | None, part: str) -> tuple[Path, list[Row]]:
    """Returns a site's file and its rows that are of a part."""
    path = private(_somewhere(folder))
    rows = _rows(path)
    keys = (f"{row.label}\0{row.text}".encode(errors="surrogatepass") for row in rows)
    return path, [rows[place] for place in dealt_rows(keys, part)]


def _vouched(terms: DataTerms, path: Path) -> Examples:
    rows = _rows(path)
    return vouched(_encoded(terms, rows), path, partial(_problems, terms, path, rows))


def _split(terms: DataTerms, path: Path) -> Splits:
    everything = _vouched(terms, path)
    train, validation, test = map(everything.take, _cuts(len(everything), path))
    return Splits(train=train, validation=validation.readable(), test=test.readable())


def _cuts(count: int, path: Path) -> list[npt.NDArray[np.int64]]:
    """Returns which rows of one file are train, validation and test: by their number alone."""
    if count < FEWEST:
        raise UsageError(f"{path} has {count} rows: to be split it needs {FEWEST} or more")
    order = np.random.default_rng([805, 15]).permutation(count)
    train, validation = round(TRAIN * count), round(VALIDATION * count)
    return [np.sort(cut) for cut in np.split(order, [train, train + validation])]


def _problems(terms: DataTerms, path: Path, rows: Iterable[Row]) -> list[str]:
    """Returns what is wrong with a file's rows; first what keeps one from being read."""
    known = labelled.of(terms).labels
    return [
        f"{path}, row {row.number}: {problem}"
        for row in sorted(rows, key=lambda row: row.label in known)
        for problem in (_of_label(row, known), row.problem)
        if problem is not None
    ]


def _public(where: Path | None) -> list[Row]:
    path = _somewhere(where)
    if path.is_dir():
        return [row for name in PUBLIC for row in _rows(path / name)]
    rows = _rows(path)
    return [rows[place] for cut in _cuts(len(rows), path)[1:] for place in cut]


def _labels_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Returns the labels that public rows have: numbers by size, else by the alphabet."""
    found = sorted({row.label for row in rows if row.label is not None})
    if len(found) < 2:
        raise UsageError(
            f"the public part of the data has {len(found)} labels, which is too few to learn: list "
            "the labels in a schema, and name it with --schema"
        )
    if all(label.removeprefix("-").isdecimal() for label in found):
        found.sort(key=int)
    return tuple(found)


def _somewhere(where: Path | None) -> Path:
    if where is None:
        raise UsageError(
            f"data set {NAME!r} is your own: name its file with --data-file FILE.jsonl, or its "
            "folder with --set data.dir=FOLDER"
        )
    return where


def _rows(path: Path) -> list[Row]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; it should hold a JSON object a line"
        ) from error
    return [_row(number, line) for number, line in lines(content)]


def _row(number: int, line: bytes) -> Row:
    """Returns a line as it can be understood; whatever it holds is never an error: it would tell.

    Bytes that are not UTF-8 become the mark for that, and the row trains all the same.
    """
    try:
        found = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return Row(number, "", None, "not JSON")
    if not isinstance(found, dict):
        return Row(number, "", None, "not a JSON object")
    text, label = found.get("text"), found.get("label")
    if isinstance(label, int) and not isinstance(label, bool):
        label = _digits(label)
    problem = "; ".join(_faults(line, found, label)) or None
    if not isinstance(text, str) or not isinstance(label, str):
        return Row(number, "", None, problem)
    return Row(number, text, label, problem)


def _digits(label: int) -> str | None:
    # Python refuses to write out a number of thousands of digits.
    return str(label) if -(10**200) < label < 10**200 else None


def _faults(line: bytes, found: Mapping[str, Any], label: Any) -> Iterator[str]:
    for key in ("text", "label"):
        if key not in found:
            yield f"key {key!r} is missing"
    if not isinstance(found.get("text", ""), str):
        yield "key 'text': not a string"
    if "label" in found and not isinstance(label, str):
        yield "key 'label': neither a string nor a whole number"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        yield "not UTF-8"


def _of_label(row: Row, known: Sequence[str]) -> str | None:
    if row.label is None or row.label in known:
        return None
    return "key 'label': not a label of the contract"


def _encoded(terms: DataTerms, rows: Iterable[Row]) -> Examples:
    text, rows = labelled.of(terms), list(rows)
    known = {label: place for place, label in enumerate(text.labels)}
    targets = [UNREADABLE if r.label is None else known.get(r.label, UNREADABLE) for r in rows]
    return Examples(
        inputs=tokens.encode([row.text for row in rows], text),
        targets=np.array(targets, dtype=np.int64),
    )
