"""The shares of a product's weight: Σ_t b_t·a_tᵀ of each example, over the places t of a layer.

Kept as a row (formed once, measured, added) or as its two factors: the ghost norm of Li, Tramèr,
Liang & Hashimoto 2022 (arXiv 2110.05679), and the sum from the same factors, as in Bu, Wang, Zha &
Karypis 2023 (arXiv 2210.00038). The shapes decide. docs/decisions/0003 says why the bound holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bract.client.training.clipping import (
    NARROW,
    WHOLE,
    are_joined,
    block_of,
    on_gpu,
    quick_norms,
    settled,
    until_last,
    weighted_sums,
    without_dropped,
)
from bract.client.training.shares import Formed, Share, Shares

# The greatest cancellation within one example that a norm from factors is believed in: past it the
# norm is taken to be Σ‖a_t‖‖b_t‖ / GREATEST_CANCELLATION, which clips more than need be.
GREATEST_CANCELLATION = 2.0**15
UNIT_ROUNDOFF = 2.0**-53
GREATEST_PLACES = 2**14  # in one product, over all its examples
# What a number of a row costs to write, measure and add, in multiplications of a float64 product.
ROW_COST = 24
_ROOM = "_rows_of_examples"

Gram = Callable[[Tensor, Tensor], Tensor]


def side(uses: list[Tensor]) -> Tensor:
    """Returns one side of a dense layer as (examples, places, features)."""
    sides = [side.reshape(len(side), -1, side.shape[-1]) for side in uses]
    return sides[0] if len(sides) == 1 else torch.cat(sides, 1)


def weight_shares(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d,
    activations: Callable[[slice], Tensor],
    backprops: Tensor,
    features: int,
    channels_last: bool = False,
) -> Shares:
    """Returns the share of a product's weight, the cheaper way.

    Args:
        layer: whose weight.
        activations: of some examples, (examples · groups, places, features).
        backprops: (examples, groups, places, outputs).
        features: how many an output sees.
        channels_last: whether the features lie so.
    """
    weight, (places, outputs) = layer.weight, backprops.shape[2:]
    if not weight.requires_grad:
        return []
    factors = weight.numel() > NARROW and keeps_factors(
        places=places, inputs=features, outputs=outputs
    )
    if not factors and are_joined(backprops, weight.numel()):
        return [Formed(weight, _joined(weight, activations, backprops, features, channels_last))]
    if factors:
        kept = activations(slice(None)).view(*backprops.shape[:3], features)
        share = products(weight, kept, backprops, _gram)
    else:
        share = _formed_products(weight, activations, backprops, features)

    def add_(totals: Tensor, factors: Tensor, parts: Sequence[slice] = WHOLE) -> None:
        share.add_(totals.movedim(2, -1) if channels_last else totals, factors, parts)

    return [replace(share, add_=add_)]


def _joined(
    weight: Tensor,
    activations: Callable[[slice], Tensor],
    backprops: Tensor,
    features: int,
    channels_last: bool,
) -> Tensor:
    """Returns Σ_t b_t·a_tᵀ of every example, as the weight's own axes lie."""
    rows, wide, _ = _form(weight, activations, backprops, features, measured=False)
    rows = rows.transpose(2, 3) if wide else rows
    if channels_last:
        kernel = rows.reshape(len(rows), weight.shape[0], *weight.shape[2:], weight.shape[1])
        return kernel.movedim(-1, 2)
    return rows.reshape(len(rows), *weight.shape)


def _formed_products(
    parameter: Tensor, activations: Callable[[slice], Tensor], backprops: Tensor, features: int
) -> Share:
    """Returns the share of Σ_t b_t·a_tᵀ formed for every example."""
    rows, wide, norms = _form(parameter, activations, backprops, features, measured=True)

    def add_(totals: Tensor, factors: Tensor, parts: Sequence[slice] = WHOLE) -> None:
        found = weighted_sums(factors, rows, parts)
        totals += (found.transpose(2, 3) if wide else found).reshape(totals.shape)

    return Share(parameter, settled(torch.cat(norms), rows.flatten(1)), add_)


def _form(
    parameter: Tensor,
    activations: Callable[[slice], Tensor],
    backprops: Tensor,
    features: int,
    *,
    measured: bool,
) -> tuple[Tensor, bool, list[Tensor]]:
    """Returns Σ_t b_t·a_tᵀ or its transpose, which it is, and quick norms where asked for."""
    count, groups, places, outputs = backprops.shape
    # a product is faster the more columns it has; on a GPU to turn the rows would cost more
    wide = features < outputs and not on_gpu(backprops)
    sides = (features, outputs) if wide else (outputs, features)
    rows = _room(parameter, backprops, (count, groups, *sides))
    flat, found, each = rows.flatten(1), rows.flatten(0, 1), backprops.flatten(0, 1)
    step = max(1, block_of(backprops) // (groups * features * max(places, outputs)))
    norms = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        inside = slice(start * groups, (start + step) * groups)
        a, b = activations(part), each[inside]
        left, right = (a, b) if wide else (b, a)
        torch.bmm(left.transpose(1, 2), right, out=found[inside])
        if measured:
            norms.append(quick_norms(flat[part]))  # while they are near
    return rows, wide, norms


def _room(parameter: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns memory for rows, kept from step to step with the parameter.

    The system takes so much back, and to fault it in again costs a part of the step.
    """
    if on_gpu(like):
        return like.new_empty(shape)  # torch keeps a GPU's memory itself
    size = math.prod(shape)
    kept: Tensor | None = parameter.__dict__.pop(_ROOM, None)
    if kept is None or len(kept) < size or kept.dtype != like.dtype:
        kept = None  # freed before more is asked for
        kept = like.new_empty(size)
    parameter.__dict__[_ROOM] = kept
    return kept[:size].view(shape)


def give_back(parameters: Iterable[Tensor]) -> None:
    """Frees what steps keep, as where memory is short."""
    for parameter in parameters:
        parameter.__dict__.pop(_ROOM, None)


def bias_shares(layer: nn.Linear | nn.Conv1d | nn.Conv2d, rows: Callable[[], Tensor]) -> Shares:
    """Returns the share of a product's bias, if it has one: its rows are formed where it is."""
    # annotated as never None, but a layer made with bias=False has none
    bias: Tensor | None = layer.bias
    return [Formed(bias, rows())] if bias is not None and bias.requires_grad else []


def keeps_factors(*, places: int, inputs: int, outputs: int) -> bool:
    """Whether two Gram matrices and a float64 product cost less than rows (half that in float32).

    One place has no Gram matrices: its norm is ‖a‖‖b‖.
    """
    gram = 0 if places == 1 else 2 * places * places * (inputs + outputs)
    return gram + places * inputs * outputs < (places / 2 + ROW_COST) * inputs * outputs


def products(parameter: Tensor, a: Tensor, b: Tensor, gram: Gram) -> Share:
    """Returns the share of Σ_t b_t·a_tᵀ kept as factors, (examples, groups, t, ·) each."""
    examples, groups, places = a.shape[:3]
    one, other = a.double().flatten(0, 1), b.double().flatten(0, 1)
    lengths = (torch.linalg.vector_norm(side, dim=2) for side in (one, other))
    bound = torch.mul(*lengths)
    if places > 1:
        bound = bound.sum(1)
        squares = gram(one, other).clamp(min=0) + _gram_error(one, other) * bound.square()
        bound = torch.maximum(squares.sqrt(), bound / GREATEST_CANCELLATION)
    norms = bound.view(examples, groups)
    joint = norms[:, 0] if groups == 1 else torch.linalg.vector_norm(norms, dim=1)
    return Share(parameter, joint, partial(_add_products_, a, b))


def _add_products_(
    a: Tensor, b: Tensor, totals: Tensor, factors: Tensor, parts: Sequence[slice] = WHOLE
) -> None:
    """Adds Σ_it (f_i·b_it)·a_itᵀ of each part, float64 products over so many places at a time.

    A product's rounding grows with the number of places in it: decision 3 bounds it by this number.
    """
    factors, a, b = until_last(factors, a, b)
    one, other = (without_dropped(factors, side).double() for side in (a, b))
    other = other * factors[:, None, None, None]
    step = max(1, GREATEST_PLACES // a.shape[2])
    for total, part in zip(totals, parts, strict=True):
        start, stop, _ = part.indices(len(a))
        for begin in range(start, stop, step):
            some = slice(begin, min(begin + step, stop))
            if a.shape[1] == 1:
                found = other[some].flatten(0, 2).t() @ one[some].flatten(0, 2)
            else:
                left, right = (side[some].transpose(0, 1).flatten(1, 2) for side in (other, one))
                found = torch.bmm(left.transpose(1, 2), right)
            total += found.view(total.shape)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Returns ‖Σ_t b_t·a_tᵀ‖² = Σ_ts (a_t·a_s)(b_t·b_s), which rounding may leave below zero."""
    products = torch.bmm(a, a.transpose(1, 2)) * torch.bmm(b, b.transpose(1, 2))
    return products.sum((1, 2))


def _gram_error(a: Tensor, b: Tensor) -> float:
    """Returns γ with |rounding of the Gram sum| ≤ γ·(Σ_t ‖a_t‖‖b_t‖)², any order of adding."""
    operations = a.shape[2] + b.shape[2] + a.shape[1] ** 2 + 8
    return 2 * operations * UNIT_ROUNDOFF
