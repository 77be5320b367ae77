"""Norms, clip factors and weighted sums of per-example gradients.

An example enters a sum by the very numbers whose norm was taken. Norms, factors and sums are
float64, so that what one example changes is not lost in the others' rounding. An example whose
gradient is not finite has the factor 0 and its numbers are taken out, since 0 · NaN would poison
the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SLACK = 1e-3
# Numbers widened to float64 at once: two megabytes, about what a core keeps near. A GPU has no such
# place, and takes longer to start on a piece than to be done with it: half a gigabyte.
_BLOCK, _GPU_BLOCK = 1 << 18, 1 << 26
WHOLE: tuple[slice, ...] = (slice(None),)
# Rows so narrow are measured with others, and summed for all parts of a batch at once, though most
# products are with zeros: what it takes to start a product is more than that. On a GPU all are.
NARROW = 2048
# Rows so wide are added one by one, so much of them at once: a product reads what was widened again
# when it is no longer near.
_WIDE, _NEAR = 1 << 14, 1 << 16
_HOST = "cpu"
# How many squares are added in float32. Of a norm over the least no more than 1.1e-9·√d is lost by
# squares under 2⁻¹²⁶, and none under the most overflows.
_RUN, _LEAST, _MOST = 128, 1e-10, 1e18


def on_gpu(values: Tensor) -> bool:
    """Returns whether values are where to start a kernel costs much, and to wait for one more."""
    return values.device.type != _HOST


def block_of(values: Tensor) -> int:
    """Returns how many numbers are worked on at once, where the values are."""
    return _GPU_BLOCK if on_gpu(values) else _BLOCK


def are_joined(rows: Tensor, width: int) -> bool:
    """Returns whether rows of this width, a parameter's, are measured and summed with others."""
    return width <= NARROW or on_gpu(rows)


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """Returns min(1, C(1 − 1e-3) / norm) by example, float64; 0 where the norm is not finite."""
    factors: Tensor = (clip_norm * (1 - SLACK) / norms.double()).clamp(max=1.0)
    factors.nan_to_num_(nan=0.0)  # of an infinite norm it is 0 already
    return factors


def row_norms(gradients: Tensor) -> Tensor:
    """Returns the norm of each row in float64, at least (1 − 1e-5) of the true one.

    That is a hundredth of the slack. Squares of a wide row of float32 are added in float32, run by
    run; all others in float64, as are those of a row so small or large that one could be lost.
    """
    rows = gradients.reshape(len(gradients), -1)
    return settled(quick_norms(rows), rows)


def quick_norms(rows: Tensor) -> Tensor:
    """Returns what `row_norms` does, but for rows that `settled` has to measure again."""
    return _norms_by_runs(rows) if _has_runs(rows) else _wide_norms(rows)


def settled(norms: Tensor, rows: Tensor) -> Tensor:
    """Returns quick norms, but measured in float64 where a square could have been lost."""
    if _has_runs(rows):
        odd = ~((norms > _LEAST) & (norms < _MOST))
        if odd.any():  # each by itself: no row has a say in how another is measured
            norms[odd] = _wide_norms(rows[odd])
    return norms


def _has_runs(rows: Tensor) -> bool:
    # to ask a GPU whether a square was lost would be to wait for it
    return rows.dtype == torch.float32 and rows.shape[1] > NARROW and not on_gpu(rows)


def _wide_norms(rows: Tensor) -> Tensor:
    blocks = [rows] if rows.numel() <= block_of(rows) else [rows[some] for some in _blocks(rows)]
    norms = [torch.linalg.vector_norm(block.double(), dim=1) for block in blocks]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def _norms_by_runs(rows: Tensor) -> Tensor:
    """Returns norms off by at most (128 + 3)·2⁻²⁴ of each, whatever the order of adding."""
    whole = rows.shape[1] // _RUN * _RUN
    runs = torch.linalg.vector_norm(rows[:, :whole].reshape(len(rows), -1, _RUN), dim=2)
    norms: Tensor = torch.linalg.vector_norm(runs, dim=1, dtype=torch.float64)
    if whole < rows.shape[1]:
        rest = torch.linalg.vector_norm(rows[:, whole:].double(), dim=1)
        norms = joint_norms([norms, rest])
    return norms


def joint_norms(norms: list[Tensor]) -> Tensor:
    """Returns the norm of each example over all parameters."""
    joint: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return joint


def weighted_sum(factors: Tensor, gradients: Tensor) -> Tensor:
    """Returns Σ f_i·g_i in float64."""
    return weighted_sums(factors, gradients, WHOLE)[0]


def weighted_sums(factors: Tensor, gradients: Tensor, parts: Sequence[slice]) -> Tensor:
    """Returns Σ f_i·g_i of each part of the examples, in float64, a part on the first axis."""
    factors, rows = until_last(factors, gradients.reshape(len(gradients), -1))
    if on_gpu(rows):
        sums = _spread_sums(factors, rows, parts)
    elif rows.shape[1] >= _WIDE:
        sums = _added_sums(factors, rows, parts)
    elif parts is WHOLE and rows.numel() <= _BLOCK:
        sums = factors[None] @ without_dropped(factors, rows).double()
    elif len(parts) > 1 and rows.shape[1] <= NARROW:
        sums = _spread(factors, parts) @ without_dropped(factors, rows).double()
    else:
        sums, rows = _zero_sums(rows, parts), without_dropped(factors, rows)
        for total, part in zip(sums, parts, strict=True):
            some, their = factors[part], rows[part]
            for block in _blocks(their):
                total += some[block] @ their[block].double()
    return sums.view(len(parts), *gradients.shape[1:])


def _spread_sums(factors: Tensor, rows: Tensor, parts: Sequence[slice]) -> Tensor:
    """Returns the sums by products over all examples, a block after the other."""
    sums, spread = _zero_sums(rows, parts), _spread(factors, parts)
    for block in _blocks(rows):
        sums += spread[:, block] @ without_dropped(factors[block], rows[block]).double()
    return sums


def _added_sums(factors: Tensor, rows: Tensor, parts: Sequence[slice]) -> Tensor:
    """Returns the sums by adding one row after the other; a row whose factor is 0 is passed by."""
    sums = _zero_sums(rows, parts)
    pieces = (torch.split(values, _NEAR, 1) for values in (sums, rows))
    for totals, near in zip(*pieces, strict=True):
        room = torch.empty_like(totals[0])
        for total, part in zip(totals, parts, strict=True):
            for factor, row in zip(factors[part].tolist(), near[part], strict=True):
                if factor > 0:
                    total.add_(room.copy_(row), alpha=factor)
    return sums


def _zero_sums(rows: Tensor, parts: Sequence[slice]) -> Tensor:
    return rows.new_zeros((len(parts), rows.shape[1]), dtype=torch.float64)


def _spread(factors: Tensor, parts: Sequence[slice]) -> Tensor:
    """Returns a row of factors for each part, zeros outside it: one product sums all parts."""
    if parts is WHOLE:
        return factors[None]
    spread = factors.new_zeros((len(parts), len(factors)))
    for row, part in zip(spread, parts, strict=True):
        row[part] = factors[part]
    return spread


def until_last(factors: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Returns factors and rows but for those behind the last factor that is not 0.

    What a batch is filled up with lies there. On a GPU, which would be waited for, all of them.
    """
    if on_gpu(factors):
        return factors, *rows
    kept = factors.numpy().nonzero()[0]
    count = int(kept[-1]) + 1 if len(kept) else 0
    return tuple(values[:count] for values in (factors, *rows))


def without_dropped(factors: Tensor, rows: Tensor) -> Tensor:
    """Returns the rows, zeros where the factor is 0: the row may hold NaN."""
    # Where all are kept nothing would change, so what is released does not depend on this branch;
    # to ask that of a GPU would be to wait for it.
    if not on_gpu(rows) and len(rows) and float(factors.min()) > 0:
        return rows
    return torch.where((factors > 0).view(-1, *[1] * (rows.dim() - 1)), rows, 0.0)


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, block_of(rows) // max(1, rows.shape[1]))
    return (slice(start, start + step) for start in range(0, len(rows), step))
