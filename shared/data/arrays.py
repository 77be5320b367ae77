"""Arrays of the user's own: an .npz file with `inputs` and `targets`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

import numpy as np

from bract.shared.data.examples import UNREADABLE, Examples, native
from bract.shared.data.options import Options
from bract.shared.errors import UsageError
from bract.shared.preparation import Preparation
from bract.shared.terms import DataTerms, Scalar

_FORM = "save it by numpy.savez(FILE, inputs=..., targets=...)"


def describe(options: Mapping[str, Scalar], preparation: Preparation | None) -> DataTerms:
    """Returns the terms of arrays, by `shape` ("1x28x28") and `classes` (1: a number is learned).

    Raises:
        UsageError: where an option is missing or will not do, or there is a schema.
        UnknownName: for another option.
    """
    given = Options("arrays", options, {"shape": "1x28x28", "classes": 10})
    given.refuse(preparation)
    classes = given.whole("classes", least=1)
    return DataTerms(
        name="arrays",
        shape=given.shape(),
        classes=classes,
        task="value" if classes == 1 else "classes",
        options=dict(options),
    )


def read(terms: DataTerms, path: Path) -> Examples:
    """Returns the examples of a file; where its arrays are not as the terms say, unreadable ones.

    Raises:
        UsageError: where there is no such file; never for what is in it.
    """
    stored = _stored(path)
    inputs, targets = stored.inputs, stored.targets
    count = min(len(inputs), len(targets))
    if _fault_of_inputs(inputs, terms) is not None:
        inputs, targets = np.zeros((count, *terms.shape), np.float32), targets[:0]
    return Examples(inputs=inputs[:count], targets=_targets(targets[:count], terms, count))


def check(terms: DataTerms, path: Path) -> list[str]:
    """Returns what is wrong with a file, by array and by example and never by value."""
    stored = _stored(path)
    faults = stored.faults or [
        fault
        for fault in (_fault_of_inputs(stored.inputs, terms), _fault_of_targets(stored.targets))
        if fault is not None
    ]
    if faults:
        return [f"{path}: {fault}" for fault in faults]
    uneven = _uneven(stored)
    found = [] if uneven is None else [f"{path}: {uneven}: the rest is left out"]
    examples = read(terms, path)
    axes = tuple(range(1, examples.inputs.ndim))
    finite = np.isfinite(examples.inputs).all(axis=axes)
    known = np.isfinite(examples.targets) & (terms.task == "value")
    if terms.task == "classes":
        known = (examples.targets >= 0) & (examples.targets < terms.classes)
    for row in np.flatnonzero(~(finite & known)):
        fault = "unknown target" if finite[row] else "input not finite"
        found.append(f"{path}, example {row + 1}: {fault}")
    return found


def demand(terms: DataTerms, path: Path) -> None:
    """Returns where each input has its target: which belong together is else not known.

    For a simulation and for public files: a joined site leaves out what is too much.

    Raises:
        UsageError: where there are more of one than of the other.
    """
    stored = _stored(path)
    uneven = None if stored.faults else _uneven(stored)
    if uneven is not None:
        raise UsageError(f"{path}: {uneven}: give one for each")


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """Both arrays of a file, empty where they cannot be read, and why they cannot."""

    inputs: np.ndarray
    targets: np.ndarray
    faults: list[str]


def _stored(path: Path) -> _Stored:
    """Returns what is in a file; a joined site does not fail on it.

    Raises:
        UsageError: where there is no such file.
    """
    try:
        with path.open("rb") as file:
            fault = _fault_of_archive(file)
            found = [] if fault else [_array(file, name) for name in ("inputs", "targets")]
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; name the folder that holds it"
        ) from error
    faults = [fault] if fault else [one for one in found if isinstance(one, str)]
    inputs, targets = (
        one if isinstance(one, np.ndarray) else np.zeros(0) for one in found or ("", "")
    )
    return _Stored(inputs, targets, faults)


def _fault_of_archive(file: BinaryIO) -> str | None:
    """Returns why a file is no .npz archive, None where it is one."""
    start = file.read(6)
    if not start:
        return "an empty file"
    if start == b"\x93NUMPY":
        return f"one array alone, no .npz archive: {_FORM}"
    if not start.startswith(b"PK"):
        return f"no .npz archive: {_FORM}"
    try:
        ZipFile(file).close()
    except Exception:  # whatever is in it, a joined site does not fail on it
        return "a damaged .npz archive: save or copy it again"
    return None


def _array(file: BinaryIO, name: str) -> np.ndarray | str:
    """Returns an array of an archive, or why it cannot be read."""
    file.seek(0)
    try:
        with np.load(file, allow_pickle=False) as stored:
            if name not in stored:
                return f"no array '{name}': {_FORM}"
            return native(np.atleast_1d(stored[name]))
    except Exception as error:  # a joined site does not fail on this either
        if "allow_pickle" in str(error):
            return f"{name} are objects: save them as numbers"
        return f"{name} are damaged: save or copy the file again"


def _uneven(stored: _Stored) -> str | None:
    inputs, targets = len(stored.inputs), len(stored.targets)
    return None if inputs == targets else f"{inputs} inputs for {targets} targets"


def _fault_of_inputs(inputs: np.ndarray, terms: DataTerms) -> str | None:
    if inputs.dtype.kind not in "buif":
        return "inputs are no numbers"
    if inputs.shape[1:] != terms.shape:
        return f"inputs have another shape than (examples, {', '.join(map(str, terms.shape))})"
    return None


def _fault_of_targets(targets: np.ndarray) -> str | None:
    if targets.dtype.kind not in "buif":
        return "targets are no numbers"
    return None if targets.ndim == 1 else "targets have another shape than (examples,)"


def _targets(targets: np.ndarray, terms: DataTerms, count: int) -> np.ndarray:
    """Returns `count` targets: float32 values, or int64 labels that a whole number gives."""
    if len(targets) != count or _fault_of_targets(targets) is not None:
        targets = np.full(count, np.nan)
    values = targets.astype(np.float64)
    if terms.task == "value":
        return values.astype(np.float32)
    known = np.isfinite(values) & (values >= 0) & (values < terms.classes) & (values % 1 == 0)
    return np.where(known, values, UNREADABLE).astype(np.int64)
