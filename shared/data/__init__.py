"""Data sets by name: examples as arrays, and the public constants that normalise them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from bract.shared.data import arrays, heart_disease, hub, images, shakespeare, sst2, table, text
from bract.shared.data.dataset import Dataset, Describe
from bract.shared.data.digits import load_digits
from bract.shared.data.examples import Examples, Groups, Splits
from bract.shared.data.fashion_mnist import (
    load_fashion_mnist,
    load_public_images,
    load_training_images,
)
from bract.shared.data.labelled import terms_of
from bract.shared.data.options import Options
from bract.shared.data.own import own
from bract.shared.data.parts import Reader
from bract.shared.data.shares import faults, share
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Preparation, Text
from bract.shared.terms import DataTerms, Scalar

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


def _fixed(terms: DataTerms) -> Describe:
    """Returns how a data set without options describes itself."""

    def describe(options: Mapping[str, Scalar], preparation: Preparation | None) -> DataTerms:
        Options(terms.name, options, {}).refuse(preparation)
        return terms

    return describe


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
        _fixed(terms),
        load=lambda given, folder: load(folder),
        load_public=lambda given, folder: load_public(folder),
        load_part=load_part,
        check_part=check_part,
        embedded=embedded,
        published=True,
    )


def _described_text(name: str, labels: tuple[str, ...] | None = None) -> Describe:
    """Returns how a data set of labelled text describes itself, once it is prepared."""

    def describe(options: Mapping[str, Scalar], preparation: Preparation | None) -> DataTerms:
        if not isinstance(preparation, Text) or labels not in (None, preparation.labels):
            raise UsageError(f"data set {name!r} is text with its own labels: drop the schema")
        return terms_of(name, preparation)

    return describe


def _in_files(describe: Describe, reader: Reader) -> Dataset:
    """Returns a data set of the user's own files."""
    return Dataset(
        describe,
        load=reader.load,
        load_public=reader.load_public,
        load_part=reader.load_part,
        check_part=reader.check_part,
        files=reader.files,
        private=reader.private,
    )


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
        _fixed(DataTerms(name="heart-disease", shape=(heart_disease.TABLE.width,), classes=2)),
        load=lambda given, folder: heart_disease.load_heart_disease(folder),
        load_public=lambda given, folder: heart_disease.load_public_patients(folder),
        load_part=lambda given, folder, part: heart_disease.load_hospital(folder, part),
        check_part=lambda given, folder, part: heart_disease.check_hospital(folder, part),
        published=True,
    ),
    "sst2": Dataset(
        _described_text("sst2", sst2.LABELS),
        load=sst2.load_sst2,
        load_public=sst2.load_public_sentences,
        load_part=sst2.load_part,
        check_part=sst2.check_part,
        prepare=sst2.prepare,
        published=True,
    ),
    "text": Dataset(
        _described_text("text"),
        load=text.load_text,
        load_public=text.load_public_text,
        load_part=text.load_part,
        check_part=text.check_part,
        prepare=text.prepare,
        files=text.files,
        private=text.private,
    ),
    "shakespeare": Dataset(
        _fixed(shakespeare.TERMS),
        load=lambda given, folder: shakespeare.load_shakespeare(folder),
        load_public=lambda given, folder: shakespeare.load_public_speeches(folder),
        load_part=lambda given, folder, part: shakespeare.load_role(folder, part),
        check_part=lambda given, folder, part: shakespeare.check_role(folder, part),
        published=True,
    ),
    "table": _in_files(
        table.describe,
        Reader((".csv",), "--data-file FILE.csv", table.read, table.check, table.demand),
    ),
    "images": _in_files(
        images.describe,
        Reader(("",), "--image-dir DIR", images.read, images.check, files_of=images.files),
    ),
    "hub": Dataset(
        hub.describe,
        hub.load,
        hub.load_public,
        hub.load_part,
        hub.check_part,
        files=hub.FILES.files,
        private=hub.FILES.private,
    ),
    "arrays": _in_files(
        arrays.describe,
        Reader((".npz",), "--data-file FILE.npz", arrays.read, arrays.check, arrays.demand),
    ),
}


def dataset(name: str) -> Dataset:
    """Returns a registered data set, or one of the user's own, `module:factory`.

    Raises:
        UnknownName: naming the nearest.
        UsageError: where the module or the factory will not do.
    """
    if ":" in name:
        return own(name)
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
