"""What a layer adds to the sum of clipped gradients, for each of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from bract.client.training.clipping import WHOLE, row_norms, weighted_sums

Use = tuple[Sequence[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One parameter's part of the clipped sum.

    `norms` bounds the norm of each example's gradient, in float64, and is that norm but for
    rounding. `add_(totals, factors, parts)` adds Σ f_i·g_i of each part of the examples to its own
    float64 total in place.
    """

    parameter: Tensor
    norms: Tensor
    add_: Add


class Add(Protocol):
    """Adds the weighted gradients of parts of the examples to a total each."""

    def __call__(self, totals: Tensor, factors: Tensor, parts: Sequence[slice] = WHOLE, /) -> None:
        """Adds in place; `totals` has a part on its first axis, `factors` are those of all."""


@dataclass(frozen=True, slots=True, eq=False)
class Formed:
    """A share of gradients that were formed, a row for each: what is measured is what is added."""

    parameter: Tensor
    rows: Tensor

    @property
    def norms(self) -> Tensor:
        """The norm of each example's gradient."""
        return row_norms(self.rows)

    def add_(self, totals: Tensor, factors: Tensor, parts: Sequence[slice] = WHOLE) -> None:
        """Adds Σ f_i·g_i of each part to its total in place."""
        totals += weighted_sums(factors, self.rows, parts)


Shares = list[Share | Formed]
Rule = Callable[[Any, Sequence[Use]], Shares]
