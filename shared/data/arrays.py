"""Arrays of the user's own: an .npz file with `inputs` and `targets`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bract.shared.data.examples import UNREADABLE, Examples, native
from bract.shared.data.options import Options
from bract.shared.errors import UsageError
from bract.shared.preparation import Preparation
from bract.shared.terms import DataTerms, Scalar


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
    inputs, targets = _arrays(path)
    count = min(len(inputs), len(targets))
    if _fault_of_inputs(inputs, terms) is not None:
        inputs, targets = np.zeros((count, *terms.shape), np.float32), targets[:0]
    return Examples(inputs=inputs[:count], targets=_targets(targets[:count], terms, count))


def check(terms: DataTerms, path: Path) -> list[str]:
    """Returns what is wrong with a file, by array and by example and never by value."""
    inputs, targets = _arrays(path)
    faults = [_fault_of_inputs(inputs, terms), _fault_of_targets(targets)]
    if len(inputs) != len(targets):
        faults.append(f"{len(inputs)} inputs for {len(targets)} targets: the rest is left out")
    found = [f"{path}: {fault}" for fault in faults if fault is not None]
    if any(fault is not None for fault in faults[:2]):
        return found
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


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns both arrays, empty where they cannot be read.

    Raises:
        UsageError: where there is no such file.
    """
    try:
        with path.open("rb") as file:
            return _array(file, "inputs"), _array(file, "targets")
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; name the folder that holds it"
        ) from error


def _array(file: BinaryIO, name: str) -> np.ndarray:
    file.seek(0)
    try:
        with np.load(file, allow_pickle=False) as stored:
            return native(np.atleast_1d(stored[name]))
    except Exception:
        # No archive, no such array, or one of objects: a joined site does not fail on it.
        return np.zeros(0)


def _fault_of_inputs(inputs: np.ndarray, terms: DataTerms) -> str | None:
    if inputs.dtype.kind not in "buif":
        return "inputs are no numbers"
    if inputs.shape[1:] != terms.shape:
        return f"inputs have another shape than (examples, {', '.join(map(str, terms.shape))})"
    return None


def _fault_of_targets(targets: np.ndarray) -> str | None:
    return None if targets.ndim == 1 and targets.dtype.kind in "buif" else "targets are no numbers"


def _targets(targets: np.ndarray, terms: DataTerms, count: int) -> np.ndarray:
    """Returns `count` targets: float32 values, or int64 labels that a whole number gives."""
    if len(targets) != count or _fault_of_targets(targets) is not None:
        targets = np.full(count, np.nan)
    values = targets.astype(np.float64)
    if terms.task == "value":
        return values.astype(np.float32)
    known = np.isfinite(values) & (values >= 0) & (values < terms.classes) & (values % 1 == 0)
    return np.where(known, values, UNREADABLE).astype(np.int64)
