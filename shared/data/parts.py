"""The user's own files, whole or in parts: who opens which of them, and how a whole one is cut.

A file or folder named `train`, `validation` or `test` (with its suffix) within a folder is a part:
a site holds its own `train`, the server's public folder the other two, a simulation all three.
Anything else is whole, and for a simulation alone: it is cut by one public shuffle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bract.shared.data.examples import Examples, Splits
from bract.shared.data.persons import rows_of
from bract.shared.data.shares import dealt
from bract.shared.errors import UsageError
from bract.shared.terms import DataTerms

logger = logging.getLogger("bract.data")

PARTS = ("train", "validation", "test")
TRAIN, VALIDATION = 0.8, 0.05
_SEED = 80_515  # public: nothing but the number of examples is looked at


@dataclass(frozen=True, slots=True)
class Reader:
    """How files of one kind are read by a contract's terms.

    Args:
        suffixes: that a part's file may have; an empty one where it is a folder.
        option: names the whole to `bract simulate`.
        read: a part's examples; fails where it is not there, never for what is in it.
        check: what is wrong with a part, by file, row and column and never by value; first what
            keeps examples from being read.
        demand: raises what a user must settle first, in a simulation and of public files.
        files_of: those that `read` opens of a part.
    """

    suffixes: tuple[str, ...]
    option: str
    read: Callable[[DataTerms, Path], Examples]
    check: Callable[[DataTerms, Path], list[str]]
    demand: Callable[[DataTerms, Path], None] = lambda terms, path: None
    files_of: Callable[[Path], list[Path]] = lambda path: [path]

    def load(self, terms: DataTerms, where: Path | None) -> Splits:
        """Returns everything, as a simulation holds it.

        Raises:
            UsageError: where nothing is named, or nothing in it can be read.
        """
        if where is None:
            raise UsageError(
                f"data set {terms.name!r} has no place of its own: name it with {self.option}"
            )
        if not self._in_parts(where):
            return self._cut(terms, where)
        train = self._own(terms, self._part(where, "train"))
        validation, test = self.load_public(terms, where)
        return Splits(train=train, validation=validation, test=test)

    def load_public(self, terms: DataTerms, where: Path | None) -> tuple[Examples, Examples]:
        """Returns validation and test, without what cannot be read; opens no `train`."""
        folder = self._folder(terms, where)
        if not self._in_parts(folder):
            cut = self._cut(terms, folder)
            return cut.validation, cut.test
        parts = (self._part(folder, name) for name in ("validation", "test"))
        validation, test = (self._own(terms, part).readable() for part in parts)
        return validation, test

    def load_part(self, terms: DataTerms, where: Path | None, part: str) -> Examples:
        """Returns a site's `train`, or the i-th of n shares of it."""
        train = self.read(terms, self._part(self._folder(terms, where), "train"))
        return train if part == "1/1" else dealt(train, part)

    def check_part(self, terms: DataTerms, where: Path | None, part: str) -> list[str]:
        """Returns what is wrong with a site's `train`."""
        return self.check(terms, self._part(self._folder(terms, where), "train"))

    def files(self, folder: Path) -> list[Path]:
        """Returns the files that a simulation reads in a folder: of its parts, or of the whole."""
        parts = [self._part(folder, name) for name in PARTS]
        read = [path for path in parts if path.exists()] or [folder]
        return [file for path in read for file in self.files_of(path)]

    def private(self, folder: Path) -> Path:
        """Returns where a site's `train` lies, or should."""
        return self._part(folder, "train")

    def _own(self, terms: DataTerms, path: Path) -> Examples:
        self.demand(terms, path)
        return vouched(self.read(terms, path), path, partial(self.check, terms, path))

    def _cut(self, terms: DataTerms, path: Path) -> Splits:
        cut = whole(self._own(terms, path), path)
        return Splits(cut.train, cut.validation.readable(), cut.test.readable())

    def _in_parts(self, where: Path) -> bool:
        return any(self._part(where, name).exists() for name in PARTS)

    def _part(self, folder: Path, name: str) -> Path:
        found = [folder / f"{name}{suffix}" for suffix in self.suffixes]
        return next((path for path in found if path.exists()), found[0])

    def _folder(self, terms: DataTerms, where: Path | None) -> Path:
        if where is None:
            first = self.suffixes[0]
            raise UsageError(
                f"data set {terms.name!r} has no place of its own: name the folder that holds "
                f"train{first}, or validation{first} and test{first}"
            )
        return where


def vouched(found: Examples, path: Path, check: Callable[[], list[str]]) -> Examples:
    """Returns what was found in the reader's own file: to him an error may say what is in it.

    Args:
        found: the file's examples.
        path: the file.
        check: what is wrong with it; first what keeps examples from being read.

    Raises:
        UsageError: where none of them can be read. Where some cannot, the log says so.
    """
    unread = len(found) - len(found.readable())
    if not unread and len(found):
        return found
    first = next(iter(check()), f"{path} is empty")
    if unread == len(found):
        raise UsageError(f"{path} has no example that can be read: {first}")
    logger.warning(
        "%s: %d of %d examples cannot be read and add nothing: correct them or take them out; "
        "the first: %s",
        path,
        unread,
        len(found),
        first,
    )
    return found


def whole(everything: Examples, where: Path) -> Splits:
    """Returns 80 % for training, 5 % for validation and 15 % for the test, by one public shuffle.

    All examples of a person fall into one part.

    Raises:
        UsageError: where there are too few for three parts.
    """
    persons = everything.persons
    units = len(everything) if persons is None else len(np.unique(persons))
    ends = [round(TRAIN * units), round((TRAIN + VALIDATION) * units)]
    if not 0 < ends[0] < ends[1] < units:
        raise UsageError(f"{where} has too few examples ({units}) to train, validate and test")
    order = np.random.default_rng(_SEED).permutation(units)
    cuts = [np.sort(cut) for cut in np.split(order, ends)]
    if persons is not None:
        cuts = [rows_of(persons, cut) for cut in cuts]
    train, validation, test = (everything.take(cut) for cut in cuts)
    return Splits(train=train, validation=validation, test=test)
