"""Whose an example is: equal numbers are one person, whose examples stay together."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import numpy.typing as npt


def numbered(name: str) -> int:
    """Returns a person's number of 63 bits, which no other person's rows have a say in."""
    text = name.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def first_rows(persons: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """Returns the places of each person's first rows, `most` at the most, in their order.

    Which they are depends on that person's rows alone.

    Example:
        >>> first_rows(np.array([5, 5, 7, 5]), 2).tolist()
        [0, 1, 2]
    """
    seen: Counter[int] = Counter()
    kept = []
    for place, person in enumerate(persons.tolist()):
        seen[person] += 1
        if seen[person] <= most:
            kept.append(place)
    return np.array(kept, dtype=np.int64)


def rows_of(persons: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the rows of chosen persons, named by their places among all in order of number.

    Example:
        >>> rows_of(np.array([7, 5, 7]), np.array([1])).tolist()
        [0, 2]
    """
    _, place = np.unique(persons, return_inverse=True)
    return np.flatnonzero(np.isin(place, chosen))
