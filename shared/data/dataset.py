"""What a data set is: its public terms, and how each side reads its part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bract.shared.data.examples import Examples, Splits
from bract.shared.errors import BractError
from bract.shared.preparation import Preparation
from bract.shared.terms import DataTerms, Scalar

Describe = Callable[[Mapping[str, Scalar], Preparation | None], DataTerms]
Prepare = Callable[[Mapping[str, Scalar], Preparation | None, Path | None], Preparation]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set: its public terms, and how to read it from where it lies.

    Every function but the first takes the contract's terms first: they say how files become inputs.

    Args:
        describe: the terms of an example, by options and by a preparation of the user's own.
        load: everything, as a simulation holds it.
        load_public: validation and test, as a server holds them; opens no private file that lies
            beside them.
        load_part: the training examples of one site, by the name of its part.
        check_part: what is wrong with them, without naming a value.
        prepare: the preparation by options, by the user's own where there is one, and by public
            files where it is learned from them; None where `describe` knows everything.
        embedded: whether it ships with a library, so that a folder says nothing of where it lies.
        published: whether its name says which examples it has: what lies elsewhere is refused.
        files: those that are read in a folder of the user's own; None where code decides on it.
        private: what must be there before a site's folder is opened, the file of its part where
            that is known; the folder itself says enough otherwise.
    """

    describe: Describe
    load: Callable[[DataTerms, Path | None], Splits]
    load_public: Callable[[DataTerms, Path | None], tuple[Examples, Examples]]
    load_part: Callable[[DataTerms, Path | None, str], Examples]
    check_part: Callable[[DataTerms, Path | None, str], list[str]]
    prepare: Prepare | None = None
    embedded: bool = False
    published: bool = False
    files: Callable[[Path], list[Path]] | None = None
    private: Callable[[Path], Path] = lambda folder: folder

    def fits(self, terms: DataTerms) -> bool:
        """Returns whether a contract's terms are such as this data set has; reads nothing."""
        try:
            own = self.describe(terms.options, terms.preparation)
        except BractError:
            return False
        return terms == own.model_copy(
            update={"offset": terms.offset, "scale": terms.scale, "public": terms.public}
        )
