"""One answer from many places: the mean over those that hold something."""

from __future__ import annotations

import torch
from torch import Tensor


def present(tokens: Tensor, ended: int) -> Tensor:
    """Returns which places hold a token: (examples, places), True at one place at least.

    A text of nothing but `ended` counts as one token long: attention over no place, and the mean
    of none, are not numbers.
    """
    there = tokens != ended
    first = torch.arange(tokens.shape[1], device=tokens.device) == 0
    return there | (first & ~there.any(1, keepdim=True))


def mean(hidden: Tensor, there: Tensor) -> Tensor:
    """Returns the mean of (examples, places, width) over the places that are there."""
    weights = there[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
