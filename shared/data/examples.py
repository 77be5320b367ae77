"""Examples as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNREADABLE = -1  # a target that is no class


def native(values: np.ndarray) -> np.ndarray:
    """Returns numbers as torch takes them: in this machine's order of bytes, in 64 bits at most.

    What is no array, and gives its rows as arrays, stays as it is.
    """
    if not isinstance(values, np.ndarray):
        return values
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        return values.astype(np.float64)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Where examples come from, for data sets that know: hospitals, speaking roles.

    `index` names each example's group by its place in `names`.
    """

    names: tuple[str, ...]
    index: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.int64]) -> Groups:
        """Returns the groups of the examples at some rows; the names stay."""
        return Groups(names=self.names, index=self.index[rows])

    def rows(self) -> dict[str, npt.NDArray[np.int64]]:
        """Returns each group's rows, in the order of the names; a group may have none."""
        return {name: np.flatnonzero(self.index == place) for place, name in enumerate(self.names)}


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Inputs with their targets; the first axis is the example's.

    `inputs` are as read (bytes or floats): the contract's constants normalise them batch by batch.
    `targets` are labels as int64, or numbers as floats where a value is learned. UNREADABLE, or
    NaN, marks an example that could not be read: it adds nothing. `persons` tells, where the data
    say so, whose an example is: equal numbers are one person.
    """

    inputs: np.ndarray
    targets: np.ndarray
    groups: Groups | None = None
    persons: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: npt.NDArray[np.int64]) -> Examples:
        """Returns the examples at some rows."""
        return Examples(
            inputs=self.inputs[rows],
            targets=self.targets[rows],
            groups=None if self.groups is None else self.groups.take(rows),
            persons=None if self.persons is None else self.persons[rows],
        )

    def readable(self) -> Examples:
        """Returns the examples that could be read; for public ones alone."""
        if np.issubdtype(self.targets.dtype, np.floating):
            return self.take(np.flatnonzero(np.isfinite(self.targets)))
        return self.take(np.flatnonzero(self.targets != UNREADABLE))


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """What sites train on, and the public parts that the server holds.

    Tuning and stopping look at `validation`; `test` is asked once, at the end.
    """

    train: Examples
    validation: Examples
    test: Examples
