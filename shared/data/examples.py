"""Examples as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
    A target that is no class marks an example that could not be read: it adds nothing.
    """

    inputs: np.ndarray
    targets: npt.NDArray[np.int64]
    groups: Groups | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: npt.NDArray[np.int64]) -> Examples:
        """Returns the examples at some rows."""
        groups = None if self.groups is None else self.groups.take(rows)
        return Examples(inputs=self.inputs[rows], targets=self.targets[rows], groups=groups)


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """What sites train on, and the public parts that the server holds.

    Tuning and stopping look at `validation`; `test` is asked once, at the end.
    """

    train: Examples
    validation: Examples
    test: Examples
