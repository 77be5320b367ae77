"""Data sets by name: examples as arrays, and the public constants that normalise them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bract.shared.contract import DataTerms
from bract.shared.data.digits import load_digits
from bract.shared.data.examples import Examples, Splits
from bract.shared.data.fashion_mnist import load_fashion_mnist
from bract.shared.errors import UnknownName

__all__ = ["DATASETS", "Dataset", "Examples", "Splits", "dataset", "load"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set: its public terms, and how to read it from a folder."""

    terms: DataTerms
    load: Callable[[Path | None], Splits]


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        terms=DataTerms(name="digits", shape=(1, 8, 8), classes=10, offset=0.0, scale=16.0),
        load=load_digits,
    ),
    # 72.94 and 90.02 are the mean and deviation of the public training pixels, 0 to 255.
    "fashion-mnist": Dataset(
        terms=DataTerms(
            name="fashion-mnist", shape=(1, 28, 28), classes=10, offset=72.94, scale=90.02
        ),
        load=load_fashion_mnist,
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
