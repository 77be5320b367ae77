"""Data sets by name: examples as arrays, and the public constants that normalise them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bract.shared.contract import DataTerms, Scalar
from bract.shared.data import heart_disease, shakespeare, sst2, text
from bract.shared.data.digits import load_digits
from bract.shared.data.examples import Examples, Groups, Splits
from bract.shared.data.fashion_mnist import (
    load_fashion_mnist,
    load_public_images,
    load_training_images,
)
from bract.shared.data.labelled import fits, terms_of
from bract.shared.data.shares import faults, share
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Preparation, Text

__all__ = [
    "DATASETS",
    "Dataset",
    "Examples",
    "Groups",
    "Splits",
    "check_part",
    "dataset",
    "describe",
    "load",
    "load_part",
    "load_public",
]


Prepare = Callable[[Mapping[str, Scalar], Preparation | None, Path | None], Preparation]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set: its public terms, and how to read it from where it lies.

    Every function takes the contract's terms first: they say how files become inputs.

    Args:
        describe: the terms of an example, by options and by a preparation of the user's own.
        fits: whether a contract's terms are such as this data set has; reads nothing.
        load: everything, as a simulation holds it.
        load_public: validation and test, as a server holds them; opens no private file that lies
            beside them.
        load_part: the training examples of one site, by the name of its part.
        check_part: what is wrong with them, without naming a value.
        prepare: the preparation by options, by the user's own where there is one, and by public
            files where it is learned from them; None where `describe` knows everything.
        embedded: whether it ships with a library, so that a folder says nothing of where it lies.
    """

    describe: Callable[[Mapping[str, Scalar], Preparation | None], DataTerms]
    fits: Callable[[DataTerms], bool]
    load: Callable[[DataTerms, Path | None], Splits]
    load_public: Callable[[DataTerms, Path | None], tuple[Examples, Examples]]
    load_part: Callable[[DataTerms, Path | None, str], Examples]
    check_part: Callable[[DataTerms, Path | None, str], list[str]]
    prepare: Prepare | None = None
    embedded: bool = False


def _fixed(terms: DataTerms) -> dict[str, Any]:
    """Returns how a data set without options describes itself, and what fits it."""

    def describe(options: Mapping[str, Scalar], preparation: Preparation | None) -> DataTerms:
        if options:
            raise UnknownName(f"option of the data set {terms.name!r},", min(options), ["(none)"])
        if preparation is not None:
            raise UsageError(f"data set {terms.name!r} takes no schema: leave it out")
        return terms

    def fits(given: DataTerms) -> bool:
        return given == terms.model_copy(
            update={"offset": given.offset, "scale": given.scale, "public": given.public}
        )

    return {"describe": describe, "fits": fits}


def _in_shares(
    terms: DataTerms,
    load: Callable[[Path | None], Splits],
    load_public: Callable[[Path | None], tuple[Examples, Examples]],
    load_training: Callable[[Path | None], Examples],
    *,
    embedded: bool = False,
) -> Dataset:
    """Returns a data set without options and without sites of its own: its parts are "i/n"."""

    def load_part(given: DataTerms, folder: Path | None, part: str) -> Examples:
        return share(load_training(folder), part)

    def check_part(given: DataTerms, folder: Path | None, part: str) -> list[str]:
        where = f"{terms.name} {part}"
        return faults(load_part(given, folder, part), classes=terms.classes, where=where)

    return Dataset(
        **_fixed(terms),
        load=lambda given, folder: load(folder),
        load_public=lambda given, folder: load_public(folder),
        load_part=load_part,
        check_part=check_part,
        embedded=embedded,
    )


def _described_text(name: str) -> Callable[[Mapping[str, Scalar], Preparation | None], DataTerms]:
    """Returns how a data set of labelled text describes itself, once it is prepared."""

    def describe(options: Mapping[str, Scalar], preparation: Preparation | None) -> DataTerms:
        assert isinstance(preparation, Text)  # noqa: S101  what its `prepare` returns
        return terms_of(name, preparation)

    return describe


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
        **_fixed(DataTerms(name="heart-disease", shape=(heart_disease.INPUTS,), classes=2)),
        load=lambda given, folder: heart_disease.load_heart_disease(folder),
        load_public=lambda given, folder: heart_disease.load_public_patients(folder),
        load_part=lambda given, folder, part: heart_disease.load_hospital(folder, part),
        check_part=lambda given, folder, part: heart_disease.check_hospital(folder, part),
    ),
    "sst2": Dataset(
        describe=_described_text("sst2"),
        fits=sst2.fits,
        load=sst2.load_sst2,
        load_public=sst2.load_public_sentences,
        load_part=sst2.load_part,
        check_part=sst2.check_part,
        prepare=sst2.prepare,
    ),
    "text": Dataset(
        describe=_described_text("text"),
        fits=fits,
        load=text.load_text,
        load_public=text.load_public_text,
        load_part=text.load_part,
        check_part=text.check_part,
        prepare=text.prepare,
    ),
    "shakespeare": Dataset(
        **_fixed(shakespeare.TERMS),
        load=lambda given, folder: shakespeare.load_shakespeare(folder),
        load_public=lambda given, folder: shakespeare.load_public_speeches(folder),
        load_part=lambda given, folder, part: shakespeare.load_role(folder, part),
        check_part=lambda given, folder, part: shakespeare.check_role(folder, part),
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


def describe(
    name: str,
    options: Mapping[str, Scalar] | None = None,
    preparation: Preparation | None = None,
    where: Path | None = None,
) -> DataTerms:
    """Returns the public terms of a data set, by its options.

    Args:
        name: of the data set.
        options: of that data set.
        preparation: the user's own, as a schema gives it.
        where: the folder or file whose public part is opened, if anything is learned from it.

    Raises:
        UnknownName: for an unknown data set or option, naming the nearest.
        UsageError: where an option's value will not do, or a public file is missing.
    """
    chosen = dataset(name)
    if chosen.prepare is not None:
        preparation = chosen.prepare(options or {}, preparation, where)
    return chosen.describe(options or {}, preparation)


@lru_cache(maxsize=4)
def load(terms: DataTerms, where: Path | None) -> Splits:
    """Returns a data set, read once in a process."""
    return dataset(terms.name).load(terms, where)


def load_public(terms: DataTerms, where: Path | None) -> tuple[Examples, Examples]:
    """Returns validation and test, which is all that a server holds.

    Args:
        terms: of the data set, as the contract has them.
        where: its folder or file; found or downloaded where it is None.

    Raises:
        UsageError: where a file is missing.
    """
    return dataset(terms.name).load_public(terms, where)


def load_part(terms: DataTerms, where: Path | None, part: str) -> Examples:
    """Returns the private examples of one site.

    Args:
        terms: of the data set, as the contract has them.
        where: this site's folder or file; found or downloaded where it is None.
        part: the site's own name where the data set knows it ("cleveland" of heart-disease), else
            "i/n", the i-th of n shares of the training examples by a fixed public shuffle.

    Raises:
        UsageError: where a file is missing or there is no such part; never for what is in a row.

    Example:
        >>> digits = describe("digits")
        >>> [len(load_part(digits, None, f"{i}/3")) for i in (1, 2, 3)]
        [434, 433, 433]
    """
    return dataset(terms.name).load_part(terms, where, part)


def check_part(terms: DataTerms, where: Path | None, part: str, nominal_size: int) -> list[str]:
    """Returns what is wrong with a site's true data, for its operator's eyes: empty where nothing.

    Offline, before the site is offered: once joined it always trains, and what is named here adds
    nothing or goes to 'other'. Files, rows and columns are named, never a value.

    Args:
        terms: of the data set, as the contract has them.
        where: this site's folder or file.
        part: as `load_part` takes it.
        nominal_size: what the contract says of this site.
    """
    problems = dataset(terms.name).check_part(terms, where, part)
    if len(load_part(terms, where, part)) < nominal_size:
        problems.append(
            f"{terms.name} {part}: fewer rows than the nominal size {nominal_size}: declare a "
            "lower one"
        )
    return problems
