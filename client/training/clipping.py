"""Norms, clip factors and weighted sums of per-example gradients.

An example enters a sum by the very numbers whose norm was taken. Norms, factors and sums are
float64, so that what one example changes is not lost in the others' rounding. An example whose
gradient is not finite has the factor 0 and its numbers are taken out, since 0 · NaN would poison
the sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SLACK = 1e-3
# Numbers widened to float64 at once: two megabytes, about what a core keeps near.
BLOCK = 1 << 18


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """Returns min(1, C(1 − 1e-3) / norm) by example, float64; 0 where the norm is not finite."""
    factors = (clip_norm * (1 - SLACK) / norms.double()).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def row_norms(gradients: Tensor) -> Tensor:
    """Returns the norm of each row; in float64, since a square may overflow float32."""
    rows = gradients.reshape(len(gradients), -1)
    parts = [torch.linalg.vector_norm(rows[part].double(), dim=1) for part in _blocks(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def joint_norms(norms: list[Tensor]) -> Tensor:
    """Returns the norm of each example over all parameters."""
    joint: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return joint


def weighted_sum(factors: Tensor, gradients: Tensor) -> Tensor:
    """Returns Σ f_i·g_i in float64."""
    rows = without_dropped(factors, gradients).reshape(len(gradients), -1)
    first, *rest = (factors[part] @ rows[part].double() for part in _blocks(rows))
    for more in rest:
        first += more
    return first.view(gradients.shape[1:])


def without_dropped(factors: Tensor, rows: Tensor) -> Tensor:
    """Returns the rows, zeros where the factor is 0: the row may hold NaN."""
    kept = factors > 0
    # Where all are kept nothing would change, so what is released does not depend on this branch;
    # to ask that of a GPU would be to wait for it.
    if rows.device.type == "cpu" and kept.all():
        return rows
    return torch.where(kept.view(-1, *[1] * (rows.dim() - 1)), rows, 0.0)


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, rows.shape[1]))
    return (slice(start, start + step) for start in range(0, len(rows), step))
