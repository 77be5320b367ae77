"""The options of a data set: known by name, of the right type, each with an example to show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Preparation
from bract.shared.terms import Scalar

GREATEST_SIZE = 100_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """What was given of the options that a data set knows.

    Args:
        name: of the data set.
        given: as an experiment has them.
        known: each option with an example of its value.

    Raises:
        UnknownName: for an option that is not known.
    """

    name: str
    given: Mapping[str, Scalar]
    known: Mapping[str, Scalar]

    def __post_init__(self) -> None:
        for option in self.given:
            if option not in self.known:
                raise UnknownName(f"option of the data set {self.name!r},", option, self.known)

    def refuse(self, preparation: Preparation | None) -> None:
        """Returns where there is no schema."""
        if preparation is not None:
            raise UsageError(f"data set {self.name!r} takes no schema: leave it out")

    def text(self, option: str) -> str:
        """Returns an option that is a string."""
        value = self._value(option)
        if not isinstance(value, str) or not value:
            raise self._fault(option)
        return value

    def whole(self, option: str, *, least: int) -> int:
        """Returns an option that is a whole number."""
        value = self._value(option)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._fault(option)
        return value

    def shape(self) -> tuple[int, ...]:
        """Returns the option `shape`, whose axes stand between x's."""
        text = self._value("shape")
        if isinstance(text, int) and not isinstance(text, bool):
            text = str(text)  # as `--set data.options.shape=13` reads it
        if not isinstance(text, str) or not re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8}){0,7}", text):
            raise self._fault("shape")
        axes = tuple(int(axis) for axis in text.split("x"))
        if math.prod(axes) > GREATEST_SIZE:
            raise self._fault("shape")
        return axes

    def _value(self, option: str) -> Scalar | None:
        if option not in self.given:
            raise self._fault(option)
        return self.given[option]

    def _fault(self, option: str) -> UsageError:
        had = f" (got {self.given[option]!r})" if option in self.given else ""
        example = f"--set data.options.{option}={self.known[option]}"
        return UsageError(f"data set {self.name!r} needs the option {option}, as in {example}{had}")
