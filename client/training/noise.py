"""Noise on sums of clipped gradients, and the public grid that hides its low bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bract.client.training.randomness import RandomStream

GRID_BITS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Standard normals of the host's CSPRNG, float64, which may be on their way to a GPU."""

    values: Tensor
    arrived: Any = None

    def taken(self) -> Tensor:
        """Returns them for what is started from now on; a GPU waits for them, its host does not."""
        if self.arrived is not None:
            now = torch.cuda.current_stream(self.values.device)
            now.wait_event(self.arrived)
            self.values.record_stream(now)
        return self.values


def drawn(stream: RandomStream, count: int, device: torch.device) -> Drawn:
    """Returns normals where they are needed; a GPU takes them beside what it is doing."""
    if device.type == "cpu":
        return Drawn(torch.from_numpy(stream.normals(count)))
    with torch.cuda.stream(_beside(device)):
        values = stream.normals_on(count, device)
        return Drawn(values, torch.cuda.current_stream(device).record_event())


@lru_cache
def _beside(device: torch.device) -> Any:
    # Of a priority of its own: of one priority torch gives out the same 32 streams again and again,
    # and noise must not get into what another one records.
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def noised(
    sums: Sequence[Tensor], places: Sequence[int], *, stddev: float, normals: Tensor
) -> Tensor:
    """Returns sums with the host's noise, on the grid, in float32 and where the sums are.

    A GPU is not waited for: it may still form the sums when their noise has been drawn.

    Args:
        sums: float64 and flat, on one device.
        places: how many numbers of the answer are each one's; what it does not fill is noise.
        stddev: σC.
        normals: one for each place, where the sums are; written over.
    """
    normals *= stddev
    slots = torch.split(normals, list(places))
    torch._foreach_add_(
        [slot[: len(total)] for slot, total in zip(slots, sums, strict=True)], list(sums)
    )
    if normals.device.type != "cpu":
        return tensor_on_grid(normals, stddev).to(torch.float32)
    return torch.from_numpy(on_grid_(normals.numpy(), stddev).astype(np.float32))


def on_grid_(values: np.ndarray, stddev: float) -> np.ndarray:
    """Returns values rounded to multiples of the power of two just under stddev · 2⁻²⁰, in place.

    New memory would cost more than the rounding.
    """
    if stddev == 0:
        return values
    step = _step(stddev)
    values *= 1 / step  # exact: the step is a power of two
    np.rint(values, out=values)
    values *= step
    return values


def tensor_on_grid(values: Tensor, stddev: float) -> Tensor:
    """Returns what `on_grid_` does, where the values are."""
    if stddev == 0:
        return values
    step = _step(stddev)
    return (values * (1 / step)).round() * step


def _step(stddev: float) -> float:
    return 2.0 ** (math.floor(math.log2(stddev)) - GRID_BITS)
