"""Shares of a data set that has no sites of its own, so that a real federation can try it.

A published data set, whose size is known, is shuffled and cut. A user's own file is dealt row by
row, by what stands in each: one row more must move no other, neither in the sum that a site
releases nor from a domain that counted it to another.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from bract.shared.data.examples import Examples
from bract.shared.data.persons import rows_of
from bract.shared.errors import UsageError

_SEED = 20_260_101  # public: every site must cut alike


def share(train: Examples, part: str) -> Examples:
    """Returns the i-th of n shares of the training examples, `part` being "i/n".

    The n shares are disjoint, hold every example, and differ in size by one at the most; where
    examples are persons', a share holds all of a person or none.

    Raises:
        UsageError: where `part` is no share that has an example.
    """
    cut = _cut(part)
    units = len(train) if train.persons is None else len(np.unique(train.persons))
    if cut is None or cut[1] > units:
        raise _no_share(part, f", n up to {units}")
    chosen = rows_of_share(units, part)
    return train.take(chosen if train.persons is None else rows_of(train.persons, chosen))


def rows_of_share(count: int, part: str) -> npt.NDArray[np.int64]:
    """Returns the rows of a share of `count` private examples, none where there are too few.

    How many a site holds is its secret: to fail on it would tell.

    Raises:
        UsageError: where `part` is no share.
    """
    cut = _cut(part)
    if cut is None:
        raise _no_share(part, "; 1/1 is the whole")
    order = np.random.default_rng(_SEED).permutation(count)
    return np.sort(order[cut[0] - 1 :: cut[1]])


def dealt(examples: Examples, part: str) -> Examples:
    """Returns the i-th of n shares of a user's own examples, `part` being "i/n", maybe empty.

    Whether an example is in it depends on that example alone, or on whose it is. How many a site
    holds is its secret: to fail on it would tell.

    Raises:
        UsageError: where `part` is no share.
    """
    if examples.persons is not None:
        people = (int(person).to_bytes(16, "big", signed=True) for person in examples.persons)
        return examples.take(_dealt(people, part))
    pairs = zip(examples.inputs, examples.targets, strict=True)
    return examples.take(dealt_rows((x.tobytes() + y.tobytes() for x, y in pairs), part))


def dealt_rows(contents: Iterable[bytes], part: str) -> npt.NDArray[np.int64]:
    """Returns the places of the rows that are dealt to a share by what stands in them.

    Equal rows are told apart by how many of them came before: one less is the last one less.
    """
    return _dealt(_told_apart(contents), part)


def _told_apart(contents: Iterable[bytes]) -> Iterator[bytes]:
    seen: Counter[bytes] = Counter()
    for content in contents:
        digest = hashlib.sha256(content).digest()
        yield digest + seen[digest].to_bytes(8, "big")
        seen[digest] += 1


def _dealt(keys: Iterable[bytes], part: str) -> npt.NDArray[np.int64]:
    cut = _cut(part)
    if cut is None:
        raise _no_share(part, "; 1/1 is the whole")
    place, count = cut
    numbers = (hashlib.sha256(b"bract/share/1" + key).digest()[:8] for key in keys)
    chosen = [int.from_bytes(number, "big") % count == place - 1 for number in numbers]
    return np.flatnonzero(np.array(chosen, dtype=bool))


def _no_share(part: str, more: str) -> UsageError:
    return UsageError(
        f"part {part!r} must be i/n, the i-th of n shares, as in 2/5: i from 1 to n{more}"
    )


def may_meet(part: str, other: str) -> bool:
    """Returns whether two parts of one data set may hold the same examples.

    A share takes every n-th example, or those whose hash is i - 1 modulo n: so 1/2 and 1/4 meet,
    and 1/2 and 2/4 do not.

    Example:
        >>> may_meet("1/2", "3/4"), may_meet("1/2", "2/4"), may_meet("1/2", "01/2")
        (True, False, True)
    """
    cut, second = _cut(part), _cut(other)
    if cut is None or second is None:
        return part == other
    return (cut[0] - second[0]) % math.gcd(cut[1], second[1]) == 0


def _cut(part: str) -> tuple[int, int] | None:
    """Returns i and n of "i/n", None where it is no share."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
    place, count = (int(match[1]), int(match[2])) if match else (0, 0)
    return (place, count) if 1 <= place <= count else None


def faults(examples: Examples, *, classes: int, where: str) -> list[str]:
    """Returns what would add nothing to training: a line for each example, without its values."""
    inputs = examples.inputs.reshape(len(examples), -1)
    finite = np.isfinite(inputs).all(axis=1)
    known = (examples.targets >= 0) & (examples.targets < classes)
    return [
        f"{where}, example {row + 1}: {'unknown label' if finite[row] else 'value not finite'}"
        for row in np.flatnonzero(~(finite & known))
    ]
