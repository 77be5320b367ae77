"""Examples as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Inputs with their targets; the first axis is the example's.

    `inputs` are as read (bytes or floats): the contract's constants normalise them batch by batch.
    """

    inputs: np.ndarray
    targets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: npt.NDArray[np.int64]) -> Examples:
        """Returns the examples at some rows."""
        return Examples(inputs=self.inputs[rows], targets=self.targets[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """What sites train on, and the public parts that the server holds.

    Tuning and stopping look at `validation`; `test` is asked once, at the end.
    """

    train: Examples
    validation: Examples
    test: Examples
