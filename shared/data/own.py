"""Data sets of the user's own, by the name of a function that makes one: `module:factory`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bract.shared import factories
from bract.shared.data.dataset import Dataset
from bract.shared.data.examples import Examples, Splits, native
from bract.shared.data.shares import faults
from bract.shared.errors import BractError, UsageError
from bract.shared.preparation import Preparation
from bract.shared.terms import DataTerms, Scalar

Result = TypeVar("Result")


class OwnData(Protocol):
    """What a factory returns. It may have `check(folder, part) -> list[str]` too.

    A folder is None where none is named. No method may fail for what is in an example: that would
    tell. An example that cannot be read has -1 for its label, or NaN for its value, and adds
    nothing. Nothing may be computed over private examples either: what prepares them is public.
    """

    @property
    def terms(self) -> DataTerms:
        """What an example looks like and what is learned of it; its name is replaced."""

    def train(self, folder: Path | None) -> Examples:
        """Returns the training examples that simulated sites share."""

    def public(self, folder: Path | None) -> tuple[Examples, Examples]:
        """Returns validation and test, and opens no private file."""

    def part(self, folder: Path | None, part: str) -> Examples:
        """Returns a real site's training examples."""


def own(name: str) -> Dataset:
    """Returns the data set `module:factory`; options go to the factory by keyword.

    A site runs this code only where its own SITE.toml lists it.

    Raises:
        UsageError: where the module or the factory will not do.
    """
    factory: Callable[..., OwnData] = factories.named(name, "data set")

    def describe(options: Mapping[str, Scalar], preparation: Preparation | None) -> DataTerms:
        if preparation is not None:
            raise UsageError(f"data set {name!r} takes no schema: its code says what it needs")
        terms = _made(name, factory, options).terms
        return terms.model_copy(update={"name": name, "options": dict(options)})

    def load(terms: DataTerms, folder: Path | None) -> Splits:
        made = _made(name, factory, terms.options)
        train = _fitting(terms, _asked(terms, "train", partial(made.train, folder)))
        validation, test = load_public(terms, folder)
        return Splits(train=train, validation=validation, test=test)

    def load_public(terms: DataTerms, folder: Path | None) -> tuple[Examples, Examples]:
        made = _made(name, factory, terms.options)
        validation, test = _asked(terms, "public", partial(made.public, folder))
        return _some(terms, validation), _some(terms, test)

    def load_part(terms: DataTerms, folder: Path | None, part: str) -> Examples:
        made = _made(name, factory, terms.options)
        return _fitting(terms, _asked(terms, "part", partial(made.part, folder, part)))

    def check_part(terms: DataTerms, folder: Path | None, part: str) -> list[str]:
        check = getattr(_made(name, factory, terms.options), "check", None)
        if check is not None:
            return list(_asked(terms, "check", partial(check, folder, part)))
        if terms.task != "classes":
            return []
        where = f"{name} {part}"
        return faults(load_part(terms, folder, part), classes=terms.classes, where=where)

    return Dataset(describe, load, load_public, load_part, check_part)


def _made(name: str, factory: Callable[..., OwnData], options: Mapping[str, Scalar]) -> OwnData:
    try:
        made = factory(**options)
    except BractError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"data set {name!r}: its factory fails with {reason}") from error
    lacking = [m for m in ("train", "public", "part") if not callable(getattr(made, m, None))]
    if lacking or not isinstance(getattr(made, "terms", None), DataTerms):
        what = ", ".join(lacking) or "terms (DataTerms)"
        raise UsageError(f"data set {name!r}: what its factory returns lacks {what}")
    return made


def _asked(terms: DataTerms, method: str, call: Callable[[], Result]) -> Result:
    """Returns what the user's code returns; of its error only the type is told, as it reads data.

    Raises:
        UsageError: where it fails.
    """
    try:
        return call()
    except BractError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise UsageError(f"data set {terms.name!r}: its {method} fails with {kind}") from error


def _fitting(terms: DataTerms, found: Any) -> Examples:
    """Returns examples as the terms say, in numbers that torch takes.

    Raises:
        UsageError: where they are others.
    """
    if not isinstance(found, Examples) or not _has(found.inputs, (len(found), *terms.shape)):
        raise UsageError(
            f"data set {terms.name!r} gives no Examples with inputs of (examples, "
            f"{', '.join(map(str, terms.shape))}), as its terms say"
        )
    places = terms.shape if terms.task == "next-token" else ()
    if not _has(found.targets, (len(found), *places)):
        raise UsageError(
            f"data set {terms.name!r} gives targets of another shape than "
            f"({', '.join(['examples', *map(str, places)])}), or no numbers"
        )
    return replace(found, inputs=native(found.inputs), targets=native(found.targets))


def _has(values: Any, shape: tuple[int, ...]) -> bool:
    """Whether values are numbers of a shape: an array, or what gives its rows as arrays."""
    kind = getattr(getattr(values, "dtype", None), "kind", "")
    return kind in ("b", "u", "i", "f") and getattr(values, "shape", None) == shape


def _some(terms: DataTerms, found: Any) -> Examples:
    fitting = _fitting(terms, found)
    if not len(fitting):
        raise UsageError(f"data set {terms.name!r} has no public examples to score a model by")
    return fitting
