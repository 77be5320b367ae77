"""How a site computes, which cannot change what is private."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bract.client.training.gradients import Mode, Precision


@dataclass(frozen=True, slots=True)
class Execution:
    """How to compute, which cannot change privacy: device, per-example mode, memory bound.

    `physical_batch` is the greatest number of examples in memory at once, None what suits the
    device; a logical batch is split into pieces of it. `precision` is that of the products of the
    two passes; norms and sums are float64 in either, of the very numbers that the passes gave.
    `noise_ahead` lets a thread draw a step's noise while its gradients are formed: for where a
    core is idle.
    """

    device: str = "cpu"
    mode: Mode = "book-keeping"
    physical_batch: int | None = None
    precision: Precision = "float32"
    noise_ahead: bool = True

    @property
    def at_once(self) -> int:
        """The greatest number of examples in memory: a GPU is idle with few."""
        suits = 256 if torch.device(self.device).type == "cpu" else 1024
        return self.physical_batch or suits
