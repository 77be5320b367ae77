"""What training and evaluation yield: a type says whether it may leave as private.

Only `bract.client.training` makes these; a test holds that. Each update is the difference of the
weights after a round and before, by parameter name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bract.shared.arrays import Arrays


@dataclass(frozen=True, slots=True, eq=False)
class ProtectedUpdate:
    """A difference of weights whose every step was clipped and noised."""

    arrays: Arrays


@dataclass(frozen=True, slots=True, eq=False)
class ClippedUpdate:
    """A difference of weights, clipped as a whole: private only once a sum of many is noised.

    Only a simulation's ledger admits it.
    """

    arrays: Arrays


@dataclass(frozen=True, slots=True, eq=False)
class UnprotectedUpdate:
    """A difference of weights without any privacy; only a simulation's ledger admits it."""

    arrays: Arrays


@dataclass(frozen=True, slots=True)
class ProtectedScore:
    """How many examples the received weights got right, and how many there are, both noised."""

    correct: float
    total: float


Update = ProtectedUpdate | ClippedUpdate | UnprotectedUpdate
KINDS: Final[dict[str, type[Update]]] = {
    "dp-sgd": ProtectedUpdate,
    "user-level": ClippedUpdate,
    "none": UnprotectedUpdate,
}
