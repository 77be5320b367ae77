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


def filled(count: int, most: int) -> int:
    """Returns the size that holds a batch: of eight between a power of two and the next.

    Args:
        count: of its examples.
        most: how many examples are in memory at once, which no size is over.

    Example:
        >>> [filled(count, 256) for count in (1, 61, 65, 300)]
        [16, 64, 72, 256]
    """
    step = max(4, 1 << max(0, (count - 1).bit_length() - 4))
    return min(most, max(LEAST, -(-count // step) * step))


def planned(expected: float, most: int) -> int:
    """Returns the size that holds nearly every Poisson batch of so many expected examples."""
    return filled(math.ceil(expected + 2.5 * math.sqrt(expected)), most)


def fill(values: Tensor, size: int) -> Tensor:
    """Returns a batch of a size, zeros behind what is there."""
    if len(values) == size:
        return values
    return torch.cat([values, values.new_zeros((size - len(values), *values.shape[1:]))])


class Sizes:
    """Cuts batches into pieces of public sizes.

    Args:
        probe: returns the mean clipped gradient of so many equal, made-up examples, by parameter.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
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
        plan, start = planned(expected, most), 0
        while start < count:
            size = filled(min(count - start, most), most)
            size = size if self._are_alike(size, plan) else plan
            yield slice(start, min(start + size, count)), size
            start += size

    def _are_alike(self, size: int, plan: int) -> bool:
        if size == plan:
            return True
        key = (size, plan)
        if key not in self._alike:
            if self._planned[0] != plan:
                self._planned = plan, self._probe(plan)
            self._alike[key] = _equal(self._probe(size), self._planned[1])
        return self._alike[key]


def _equal(found: list[Tensor], planned_for: list[Tensor]) -> bool:
    """Whether both are the same but for the order in which float64 added the equal examples.

    What is zero or not finite proves nothing.
    """
    for one, other in zip(found, planned_for, strict=True):
        greatest = other.abs().max() if other.numel() else other.new_ones(())
        if not (torch.isfinite(greatest) and greatest > 0):
            return False
        if not bool(((one - other).abs() <= _TOLERANCE * greatest).all()):
            return False
    return True
