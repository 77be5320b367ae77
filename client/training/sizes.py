"""The sizes of a pass: few, public, and such that an example's numbers are the same in each.

The kernel of a product is chosen by its shape, and another kernel rounds otherwise. Where the shape
followed the batch, one example more would move the rows of all others by their rounding; of weights
that a server chose to cancel that is not little: each row may become any other within C. So a batch
is filled up to a size whose rows were found to be those of the size that is planned for, by a pass
of made-up numbers, and cut into pieces of that size where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LEAST = 16  # below it the kernels of a product change most, and a pass is hardly cheaper
# Of float64: an example's numbers in one kernel are off by 6e-8 of them in another.
_TOLERANCE = 1e-12

Probe = Callable[[int], list[Tensor]]


def filled(count: int, most: int, unit: int = 1) -> int:
    """Returns the size that holds a batch: of eight between a power of two and the next.

    Args:
        count: of its examples.
        most: how many examples are in memory at once, which no size is over.
        unit: of which each size is a multiple, a power of two; 1 where memory holds no unit.

    Example:
        >>> [filled(count, 256) for count in (1, 61, 65, 300)]
        [16, 64, 72, 256]
        >>> [filled(count, 256, 64) for count in (1, 65, 300)]
        [64, 128, 256]
    """
    step = max(4, unit, 1 << max(0, (count - 1).bit_length() - 4))
    return min(max(most // unit * unit, 1), max(LEAST, -(-count // step) * step))


def planned(expected: float, most: int, unit: int = 1) -> int:
    """Returns the size that holds nearly every Poisson batch of so many expected examples."""
    return filled(math.ceil(expected + 2.5 * math.sqrt(expected)), most, unit)


def fill(values: Tensor, size: int) -> Tensor:
    """Returns a batch of a size, zeros behind what is there."""
    if len(values) == size:
        return values
    return torch.cat([values, values.new_zeros((size - len(values), *values.shape[1:]))])


class Sizes:
    """Cuts batches into pieces of public sizes.

    Args:
        probe: returns the mean clipped gradient of so many equal, made-up examples, by parameter.
        is_even: returns whether each of so many equal examples adds the same, at any place.
        unit: of which each size is a multiple.
    """

    def __init__(self, probe: Probe, is_even: Callable[[int], bool], unit: int = 1) -> None:
        self._probe, self._is_even, self._unit = probe, is_even, unit
        self._alike: dict[tuple[int, int], bool] = {}
        self._planned: tuple[int, list[Tensor]] = (0, [])

    def pieces(self, count: int, *, expected: float, most: int) -> Iterator[tuple[slice, int]]:
        """Yields the parts of a batch, and the size that each is filled up to.

        Args:
            count: of its examples, a secret: it decides on how many pieces there are, and in no
                piece on the numbers of an example.
            expected: how many the public terms have one expect.
            most: how many examples are in memory at once.
        """
        plan, start = planned(expected, most, self._unit), 0
        if not self._are_alike(plan, plan):
            most = plan = 1  # alone an example has always the same place
        while start < count:
            size = filled(min(count - start, most), most, self._unit)
            size = size if size == plan or self._are_alike(size, plan) else plan
            yield slice(start, min(start + size, count)), size
            start += size

    def _are_alike(self, size: int, plan: int) -> bool:
        """Returns whether all rows of a pass of a size are as those of the planned size are."""
        key = (size, plan)
        if key not in self._alike:
            if self._planned[0] != plan:
                self._planned = plan, self._probe(plan)
            if size == plan:
                self._alike[key] = self._is_even(plan)
            else:
                self._alike[key] = are_equal(self._probe(size), self._planned[1])
        return self._alike[key]


def are_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether both are the same but for the order in which float64 added the equal examples.

    What is zero or not finite proves nothing.
    """
    for one, other in zip(found, expected, strict=True):
        greatest = other.abs().max() if other.numel() else other.new_ones(())
        if not (torch.isfinite(greatest) and greatest > 0):
            return False
        if not bool(((one - other).abs() <= _TOLERANCE * greatest).all()):
            return False
    return True
