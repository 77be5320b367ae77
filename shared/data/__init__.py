"""Data sets by name: examples as arrays, and the public constants that normalise them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bract.shared.contract import DataTerms
from bract.shared.data import heart_disease
from bract.shared.data.digits import load_digits
from bract.shared.data.examples import Examples, Groups, Splits
from bract.shared.data.fashion_mnist import (
    load_fashion_mnist,
    load_public_images,
    load_training_images,
)
from bract.shared.data.shares import faults, share
from bract.shared.errors import UnknownName

__all__ = [
    "DATASETS",
    "Dataset",
    "Examples",
    "Groups",
    "Splits",
    "check_part",
    "dataset",
    "load",
    "load_part",
    "load_public",
]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set: its public terms, and how to read it from a folder.

    Args:
        terms: what an example looks like.
        load: everything, as a simulation holds it.
        load_public: validation and test, as a server holds them; opens no private file that lies
            beside them.
        load_part: the training examples of one site, by the name of its part.
        check_part: what is wrong with them, without naming a value.
        embedded: whether it ships with a library, so that a folder says nothing of where it lies.
    """

    terms: DataTerms
    load: Callable[[Path | None], Splits]
    load_public: Callable[[Path | None], tuple[Examples, Examples]]
    load_part: Callable[[Path | None, str], Examples]
    check_part: Callable[[Path | None, str], list[str]]
    embedded: bool = False


def _in_shares(
    terms: DataTerms,
    load: Callable[[Path | None], Splits],
    load_public: Callable[[Path | None], tuple[Examples, Examples]],
    load_training: Callable[[Path | None], Examples],
    *,
    embedded: bool = False,
) -> Dataset:
    """Returns a data set without sites of its own: its parts are "i/n"."""

    def load_part(folder: Path | None, part: str) -> Examples:
        return share(load_training(folder), part)

    def check_part(folder: Path | None, part: str) -> list[str]:
        where = f"{terms.name} {part}"
        return faults(load_part(folder, part), classes=terms.classes, where=where)

    return Dataset(terms, load, load_public, load_part, check_part, embedded)


def _public_digits(folder: Path | None) -> tuple[Examples, Examples]:
    splits = load_digits(folder)
    return splits.validation, splits.test


DATASETS: dict[str, Dataset] = {
    "digits": _in_shares(
        DataTerms(name="digits", shape=(1, 8, 8), classes=10, offset=0.0, scale=16.0),
        load_digits,
        _public_digits,
        lambda folder: load_digits(folder).train,
        embedded=True,
    ),
    # 72.94 and 90.02 are the mean and deviation of the public training pixels, 0 to 255.
    "fashion-mnist": _in_shares(
        DataTerms(name="fashion-mnist", shape=(1, 28, 28), classes=10, offset=72.94, scale=90.02),
        load_fashion_mnist,
        load_public_images,
        load_training_images,
    ),
    "heart-disease": Dataset(
        DataTerms(name="heart-disease", shape=(heart_disease.INPUTS,), classes=2),
        heart_disease.load_heart_disease,
        heart_disease.load_public_patients,
        heart_disease.load_hospital,
        heart_disease.check_hospital,
    ),
}


def dataset(name: str) -> Dataset:
    """Returns a registered data set.

    Raises:
        UnknownName: naming the nearest.
    """
    if name not in DATASETS:
        raise UnknownName("data set", name, DATASETS)
    return DATASETS[name]


@lru_cache(maxsize=4)
def load(name: str, folder: Path | None) -> Splits:
    """Returns a data set, read once in a process."""
    return dataset(name).load(folder)


def load_public(name: str, folder: Path | None) -> tuple[Examples, Examples]:
    """Returns validation and test, which is all that a server holds.

    Args:
        name: of the data set.
        folder: found or downloaded where it is None.

    Raises:
        UsageError: where a file is missing.
    """
    return dataset(name).load_public(folder)


def load_part(name: str, folder: Path | None, part: str) -> Examples:
    """Returns the private examples of one site.

    Args:
        name: of the data set.
        folder: of this site; found or downloaded where it is None.
        part: the site's own name where the data set knows it ("cleveland" of heart-disease), else
            "i/n", the i-th of n shares of the training examples by a fixed public shuffle.

    Raises:
        UsageError: where a file is missing or there is no such part; never for what is in a row.

    Example:
        >>> [len(load_part("digits", None, f"{i}/3")) for i in (1, 2, 3)]
        [434, 433, 433]
    """
    return dataset(name).load_part(folder, part)


def check_part(name: str, folder: Path | None, part: str, nominal_size: int) -> list[str]:
    """Returns what is wrong with a site's true data, for its operator's eyes: empty where nothing.

    Offline, before the site is offered: once joined it always trains, and what is named here adds
    nothing or goes to 'other'. Files, rows and columns are named, never a value.

    Args:
        name: of the data set.
        folder: of this site.
        part: as `load_part` takes it.
        nominal_size: what the contract says of this site.
    """
    problems = dataset(name).check_part(folder, part)
    if len(load_part(name, folder, part)) < nominal_size:
        problems.append(
            f"{name} {part}: fewer rows than the nominal size {nominal_size}: declare a lower one"
        )
    return problems
