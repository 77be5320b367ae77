"""Noise on sums of clipped gradients, and the public grid that hides its low bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GRID_BITS = 20


def noised(
    sums: Sequence[Tensor], places: Sequence[int], *, stddev: float, normals: np.ndarray
) -> Tensor:
    """Returns sums with the host's noise, on the grid, in float32 and where the sums are.

    A GPU is not waited for: it may still form the sums when their noise has been drawn.

    Args:
        sums: float64 and flat, on one device.
        places: how many numbers of the answer are each one's; what it does not fill is noise.
        stddev: σC.
        normals: one for each place; written over.
    """
    normals *= stddev
    device = sums[0].device
    noisy = torch.from_numpy(normals)
    if device.type != "cpu":
        noisy = noisy.pin_memory().to(device, non_blocking=True)
    slots = torch.split(noisy, list(places))
    torch._foreach_add_(
        [slot[: len(total)] for slot, total in zip(slots, sums, strict=True)], list(sums)
    )
    if device.type != "cpu":
        return tensor_on_grid(noisy, stddev).to(torch.float32)
    return torch.from_numpy(on_grid(normals, stddev).astype(np.float32))


def on_grid(values: np.ndarray, stddev: float) -> np.ndarray:
    """Returns values rounded to multiples of the power of two just under stddev · 2⁻²⁰."""
    if stddev == 0:
        return values
    step = _step(stddev)
    multiples = np.rint(values * (1 / step))  # exact: the step is a power of two
    multiples *= step
    return multiples


def tensor_on_grid(values: Tensor, stddev: float) -> Tensor:
    """Returns what `on_grid` does, where the values are."""
    if stddev == 0:
        return values
    step = _step(stddev)
    return (values * (1 / step)).round() * step


def _step(stddev: float) -> float:
    return 2.0 ** (math.floor(math.log2(stddev)) - GRID_BITS)
