"""Data sets of the Hugging Face hub by flwr-datasets, or files of the same kinds in a folder.

Nothing but data is loaded: no script of a data set runs. Local files are read as a stream, so that
no copy of a site's rows is left in a cache.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bract.shared.data.examples import UNREADABLE, Examples, Splits
from bract.shared.data.images import FORMATS, fitted
from bract.shared.data.options import Options
from bract.shared.data.parts import Reader, whole
from bract.shared.data.shares import share
from bract.shared.errors import UsageError
from bract.shared.preparation import Images, Preparation
from bract.shared.terms import DataTerms, Scalar

KINDS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}
_KNOWN: dict[str, Scalar] = {
    "source": "ylecun/mnist",
    "input": "image",
    "target": "label",
    "shape": "1x28x28",
    "classes": 10,
}


def describe(options: Mapping[str, Scalar], preparation: Preparation | None) -> DataTerms:
    """Returns the terms of a data set by its columns; `source` names it where no folder does.

    Inputs are images, resized to the shape and 0 to 255, or lists of numbers of that shape.

    Raises:
        UsageError: where an option is missing or will not do, or there is a schema.
        UnknownName: for another option.
    """
    given = Options("hub", options, _KNOWN)
    given.refuse(preparation)
    for column in ("input", "target"):
        given.text(column)
    return DataTerms(
        name="hub",
        shape=given.shape(),
        classes=given.whole("classes", least=2),
        options=dict(options),
    )


def load(terms: DataTerms, where: Path | None) -> Splits:
    """Returns the files of a folder, or the training split of the hub's data set, cut in three.

    Raises:
        UsageError: where it cannot be had.
    """
    return FILES.load(terms, where) if where is not None else _fetched(terms)


def load_public(terms: DataTerms, where: Path | None) -> tuple[Examples, Examples]:
    """Returns validation and test; what lies on the hub is public altogether."""
    if where is not None:
        return FILES.load_public(terms, where)
    splits = _fetched(terms)
    return splits.validation, splits.test


def load_part(terms: DataTerms, where: Path | None, part: str) -> Examples:
    """Returns a site's own training file, or its share of the hub's."""
    if where is not None:
        return FILES.load_part(terms, where, part)
    return share(_fetched(terms).train, part)


def check_part(terms: DataTerms, where: Path | None, part: str) -> list[str]:
    """Returns which rows of a site's own file would add nothing."""
    return [] if where is None else FILES.check_part(terms, where, part)


def read(terms: DataTerms, path: Path) -> Examples:
    """Returns the rows of a file; what cannot be read adds nothing.

    Raises:
        UsageError: where there is no such file; never for what is in it.
    """
    return _examples(terms, _rows(path)[0])


def check(terms: DataTerms, path: Path) -> list[str]:
    """Returns which rows of a file would add nothing, by their number, and where it ends early."""
    rows, complete = _rows(path)
    targets = _examples(terms, rows).targets
    faults = [
        f"{path}, row {row + 1}: input or target cannot be read"
        for row in np.flatnonzero(targets == UNREADABLE)
    ]
    if not complete and rows:
        faults.append(f"{path}: nothing after row {len(rows)} can be read; mend the file there")
    return faults or ([] if rows else [f"{path}: no rows that can be read"])


def _rows(path: Path) -> tuple[list[Mapping[str, Any]], bool]:
    """Returns the rows of a file, up to the first that the library cannot take, and if it took all.

    A joined site does not fail on it.
    """
    if not path.is_file() or path.suffix not in KINDS:
        raise UsageError(f"cannot read {path}: it must be a file, {', '.join(KINDS)}")
    if path.suffix == ".jsonl":
        return _lines(path), True
    from datasets import load_dataset  # slow to import

    rows: list[Mapping[str, Any]] = []
    try:
        kind = KINDS[path.suffix]
        found = load_dataset(kind, data_files=str(path), split="train", streaming=True)
        # Without features there is nothing to decode, and it would be an error to ask.
        rows.extend(found if found.features is None else found.decode(False))
    except Exception:
        return rows, False
    return rows, True


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """Returns a row for each line that holds anything; of one that is no JSON object an empty one.

    The library would give up the whole file for it.
    """
    rows: list[Mapping[str, Any]] = []
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            rows.append(found if isinstance(found, dict) else {})
    return rows


def _fetched(terms: DataTerms) -> Splits:
    source = Options("hub", terms.options, _KNOWN).text("source")
    try:
        from flwr_datasets import FederatedDataset  # slow to import

        rows = FederatedDataset(dataset=source, partitioners={"train": 1}).load_split("train")
        found = _examples(terms, rows.with_format(None))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"data set {source!r} cannot be had from the hub ({reason}): correct the option "
            "source, or put its files into a folder as train.parquet, validation.parquet and "
            "test.parquet and name it with --set data.dir=FOLDER"
        ) from error
    return whole(found, Path(source))


def _examples(terms: DataTerms, rows: Iterable[Mapping[str, Any]]) -> Examples:
    column, target = (str(terms.options[name]) for name in ("input", "target"))
    inputs: list[np.ndarray] = []
    targets: list[int] = []
    for row in rows:
        value, label = _input(row.get(column), terms.shape), row.get(target)
        known = isinstance(label, int) and 0 <= label < terms.classes and value is not None
        inputs.append(np.zeros(terms.shape, np.float32) if value is None else value)
        targets.append(int(label) if known and isinstance(label, int) else UNREADABLE)
    return Examples(
        inputs=np.stack(inputs) if inputs else np.zeros((0, *terms.shape), np.float32),
        targets=np.array(targets, dtype=np.int64),
    )


def _input(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns an image or a list of numbers as float32 of a shape, None where it cannot be read."""
    from PIL import Image as pillow  # slow to import

    try:
        if isinstance(value, Mapping):  # an image as it lies in the file; its path is not followed
            with pillow.open(io.BytesIO(value["bytes"]), formats=FORMATS) as image:
                return _image(image, shape)
        if isinstance(value, pillow.Image):
            return _image(value, shape)
        numbers = np.asarray(value, dtype=np.float32).reshape(shape)
        return numbers if np.isfinite(numbers).all() else None
    except Exception:
        return None


def _image(image: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if len(shape) != 3 or shape[0] not in (1, 3):
        return None
    wanted = Images(labels=("0", "1"), height=shape[1], width=shape[2], colour=shape[0] == 3)
    return fitted(image, wanted).astype(np.float32)


FILES = Reader(tuple(KINDS), "--set data.dir=FOLDER", read, check)
