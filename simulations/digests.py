"""Whether a user's own data are still the same: SHA-256 of files, of examples, of sites' rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bract.shared import canonical
from bract.shared.data import Examples, Splits, dataset, load
from bract.shared.errors import BractError, UsageError
from bract.shared.terms import DataTerms

_ROWS_AT_ONCE = 1024


def of_files(terms: DataTerms, where: Path | None) -> str | None:
    """Returns the SHA-256 of a data file, or of the names and contents that a folder's data have.

    None where nothing is named, where the data set's name says what lies there, and where code
    decides what is read.

    Raises:
        UsageError: where one cannot be read.
    """
    if where is None:
        return None
    if not where.is_dir():
        return _of_file(where).hex()
    files = dataset(terms.name).files
    if files is None:
        return None
    names = [(os.fsencode(file.relative_to(where)), file) for file in files(where)]
    each = (part for name, file in sorted(names) for part in (name, _of_file(file)))
    return canonical.tagged("files/1", *each).hex()


def of_examples(terms: DataTerms, where: Path | None) -> str | None:
    """Returns the SHA-256 of examples as they were loaded, where no name and no file tells them.

    They come of code, which may do anything with its options and its folder, or off the hub.

    Raises:
        UsageError: where they cannot be had.
    """
    chosen = dataset(terms.name)
    if chosen.published or (chosen.files is not None and where is not None):
        return None
    splits = load(terms, where)
    try:
        return _of_splits(splits)
    except BractError:
        raise
    except Exception as error:  # the user's own code may give rows one by one
        kind = type(error).__name__
        raise UsageError(
            f"data set {terms.name!r}: reading its rows fails with {kind}; correct it"
        ) from error


def of_rows(parts: Sequence[npt.NDArray[np.int64]]) -> str:
    """Returns the SHA-256 of which rows each site has."""
    return canonical.tagged("rows/1", *(part.astype("<i8").tobytes() for part in parts)).hex()


def _of_file(file: Path) -> bytes:
    """Returns the SHA-256 of a file, which may be larger than the memory."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}; put it back") from error


def _of_splits(splits: Splits) -> str:
    digest = hashlib.sha256(b"bract/examples/1\0")
    for examples in (splits.train, splits.validation, splits.test):
        for name, values in _arrays(examples):
            digest.update(f"{name}{np.dtype(values.dtype).str}{tuple(values.shape)}".encode())
            for start in range(0, len(examples), _ROWS_AT_ONCE):
                rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(examples)))
                digest.update(np.ascontiguousarray(values[rows]).tobytes())
        if examples.groups is not None:
            digest.update(canonical.encode(examples.groups.names))
    return digest.hexdigest()


def _arrays(examples: Examples) -> Iterator[tuple[str, np.ndarray]]:
    yield "inputs", examples.inputs
    yield "targets", examples.targets
    if examples.persons is not None:
        yield "persons", examples.persons
    if examples.groups is not None:
        yield "groups", examples.groups.index
