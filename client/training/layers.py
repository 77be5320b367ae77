"""What one layer adds to the sum of clipped gradients: a rule for each kind of layer.

A rule takes the inputs and output gradients of all uses of a layer in one pass and returns a share
for each of its trainable parameters: the norm of every example's gradient, and the weighted sum of
the same numbers. Layers without a rule go to Opacus' samplers.

In a product layer the gradient of an example is Σ_t b_t·a_tᵀ, over the places t at which the layer
was applied to it. It is kept as a row (formed once, measured, added) or as its two factors: the
ghost norm of Li, Tramèr, Liang & Hashimoto 2022 (arXiv 2110.05679), and the sum from the same
factors, as in Bu, Wang, Zha & Karypis 2023 (arXiv 2210.00038). The shapes decide.
docs/decisions/0003 says why the bound holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleModuleFastGradientClipping,
)
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from bract.client.training.clipping import (
    NARROW,
    WHOLE,
    are_joined,
    block_of,
    on_gpu,
    quick_norms,
    row_norms,
    settled,
    weighted_sums,
    without_dropped,
)
from bract.client.training.patches import lie_channels_last, patches_of

# The greatest cancellation within one example that a norm from factors is believed in: past it the
# norm is taken to be Σ‖a_t‖‖b_t‖ / GREATEST_CANCELLATION, which clips more than need be.
GREATEST_CANCELLATION = 2.0**15
UNIT_ROUNDOFF = 2.0**-53
# What a number of a row costs to write, measure and add, in multiplications of a float64 product.
ROW_COST = 24
_ROOM = "_rows_of_examples"

Use = tuple[Sequence[Tensor], Tensor]
Gram = Callable[[Tensor, Tensor], Tensor]


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


def sampled(layer: nn.Module, uses: Sequence[Use]) -> Shares:
    """Returns shares by Opacus' sampler, functorch where it has none; uses are added up first.

    For any other kind of layer, and for every layer whose parameters another layer uses too.
    """
    return [Formed(p, rows) for p, rows in sampled_rows(layer, uses).items()]


def sampled_rows(layer: nn.Module, uses: Sequence[Use]) -> dict[Tensor, Tensor]:
    """Returns a gradient for every example, by Opacus' samplers, added up over uses."""
    sampler = GradSampleModule.GRAD_SAMPLERS.get(type(layer), ft_compute_per_sample_gradient)
    rows: dict[Tensor, Tensor] = {}
    for inputs, backprops in uses:
        # Opacus' samplers read strided memory as if its axes lay in order
        kept = [value.contiguous() for value in inputs]
        outputs = _without_padding(layer, inputs[0], backprops).contiguous()
        for parameter, found in sampler(layer, kept, outputs).items():
            if parameter.requires_grad:
                rows[parameter] = rows[parameter] + found if parameter in rows else found
    return rows


def dense(layer: nn.Linear, uses: Sequence[Use]) -> Shares:
    """Returns the shares of a linear layer; a sequence axis and several uses are its places."""
    activations = _side([inputs[0].to(b.dtype) for inputs, b in uses])
    backprops = _side([b for _, b in uses])
    weight = _weight(layer, activations.__getitem__, backprops[:, None], layer.in_features)
    return [*weight, *_bias(layer, lambda: backprops.sum(1))]


def convolution(layer: nn.Conv1d | nn.Conv2d, uses: Sequence[Use]) -> Shares:
    """Returns the shares of a convolution: a dense layer over patches, for each group."""
    groups, last = layer.groups, lie_channels_last(layer, *uses[0])
    outputs = [b.flatten(2).reshape(len(b), groups, -1, b[0, 0].numel()) for _, b in uses]
    backprops = (outputs[0] if len(uses) == 1 else torch.cat(outputs, 3)).transpose(2, 3)

    views = [patches_of(layer, inputs[0].to(b.dtype), last) for inputs, b in uses]

    def patches(part: slice) -> Tensor:
        found = [view(part) for view in views]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    features = math.prod(layer.weight.shape[1:])
    weight = _weight(layer, patches, backprops, features, last)
    return [*weight, *_bias(layer, lambda: backprops.sum(2).flatten(1))]


def embedding(layer: nn.Embedding, uses: Sequence[Use]) -> Shares:
    """Returns the share of an embedding: gradients by (example, token), never one-hot."""
    tokens = torch.cat([inputs[0].reshape(len(b), -1) for inputs, b in uses], 1)
    found = [_without_padding(layer, inputs[0], b) for inputs, b in uses]
    backprops = _side([b[:, None] if b.dim() == 2 else b for b in found])
    owners = torch.arange(len(tokens), device=tokens.device)[:, None] * layer.num_embeddings
    pairs, place = _distinct((owners + tokens).flatten())
    rows = backprops.new_zeros((len(pairs), backprops.shape[2]), dtype=torch.float64)
    rows.index_add_(0, place, backprops.double().flatten(0, 1))
    example, token = pairs // layer.num_embeddings, pairs % layer.num_embeddings
    squares = rows.new_zeros(len(tokens)).index_add_(0, example, row_norms(rows).square())

    def add_(totals: Tensor, factors: Tensor, parts: Sequence[slice] = WHOLE) -> None:
        for total, part in zip(totals, parts, strict=True):
            some, weights = _pairs_of(part, example, factors)
            kept = without_dropped(weights, rows[some])
            total.index_add_(0, token[some], kept * weights[:, None])

    return [Share(layer.weight, squares.sqrt(), add_)]


def _pairs_of(part: slice, example: Tensor, factors: Tensor) -> tuple[slice, Tensor]:
    """Returns which pairs, sorted by example, are of a part of the examples, and their factors.

    On a GPU all are, with the factor 0 outside the part: to ask where it ends would be to wait.
    """
    start, stop, _ = part.indices(len(factors))
    if (start, stop) == (0, len(factors)):
        return slice(None), factors[example]
    if on_gpu(example):
        inside = (example >= start) & (example < stop)
        return slice(None), torch.where(inside, factors[example], 0.0)
    ends = torch.searchsorted(example, example.new_tensor([start, stop])).tolist()
    return slice(*ends), factors[example[slice(*ends)]]


def _distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct keys, and the place of each key among them.

    On a GPU as many as there are keys, zeros after the last: to ask how many are distinct would be
    to wait for it.
    """
    if on_gpu(keys):
        return _distinct_by_sorting(keys)
    found: tuple[Tensor, Tensor] = torch.unique(keys, return_inverse=True)
    return found


def _distinct_by_sorting(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered, order = keys.sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    places = first.cumsum(0) - 1
    distinct = torch.zeros_like(keys).scatter_(0, places, ordered)
    return distinct, torch.empty_like(keys).scatter_(0, order, places)


def ghost_dense(layer: nn.Linear, uses: Sequence[Use]) -> Shares:
    """Returns the shares of a linear layer by Opacus' own ghost norms, whatever the shapes."""
    ((inputs, b),) = uses
    activations, backprops = _side([inputs[0].to(b.dtype)]), _side([b])

    def gram(one: Tensor, other: Tensor) -> Tensor:
        ghost: Tensor = _norm_sampler(layer)(layer, [one], other)[layer.weight]
        return ghost.square()

    bias = _bias(layer, lambda: backprops.sum(1))
    if not layer.weight.requires_grad:
        return bias
    return [_products(layer.weight, activations[:, None], backprops[:, None], gram), *bias]


def ghost_embedding(layer: nn.Embedding, uses: Sequence[Use]) -> Shares:
    """Returns the share of an embedding by Opacus' own ghost norm."""
    ((inputs, backprops),) = uses
    tokens = inputs[0].contiguous()  # Opacus' sampler views it flat
    ghost = _norm_sampler(layer)(layer, [tokens], backprops.double())[layer.weight]
    return [Share(share.parameter, ghost, share.add_) for share in embedding(layer, uses)]


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: dense,
    RNNLinear: dense,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Embedding: embedding,
}
GHOST_RULES: dict[type[nn.Module], Rule] = {nn.Linear: ghost_dense, nn.Embedding: ghost_embedding}


def _norm_sampler(layer: nn.Module) -> Callable[..., dict[Tensor, Tensor]]:
    sampler: Callable[..., dict[Tensor, Tensor]]
    sampler = GradSampleModuleFastGradientClipping.NORM_SAMPLERS[type(layer)]
    return sampler


def _without_padding(layer: nn.Module, tokens: Tensor, backprops: Tensor) -> Tensor:
    """Returns the gradients without those of an embedding's padding, which autograd leaves out."""
    if not isinstance(layer, nn.Embedding) or layer.padding_idx is None:
        return backprops
    return torch.where((tokens == layer.padding_idx)[..., None], 0.0, backprops)


def _side(uses: list[Tensor]) -> Tensor:
    """Returns one side of a dense layer as (examples, places, features)."""
    sides = [side.reshape(len(side), -1, side.shape[-1]) for side in uses]
    return sides[0] if len(sides) == 1 else torch.cat(sides, 1)


def _weight(
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
    factors = weight.numel() > NARROW and _keeps_factors(
        places=places, inputs=features, outputs=outputs
    )
    if not factors and are_joined(backprops, weight.numel()):
        return [Formed(weight, _joined(weight, activations, backprops, features, channels_last))]
    if factors:
        kept = activations(slice(None)).view(*backprops.shape[:3], features)
        share = _products(weight, kept, backprops, _gram)
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
    if kept is None or len(kept) < size or kept.dtype != like.dtype or kept.device != like.device:
        kept = None  # freed before more is asked for
        kept = like.new_empty(size)
    parameter.__dict__[_ROOM] = kept
    return kept[:size].view(shape)


def give_back(parameters: Iterable[Tensor]) -> None:
    """Frees what steps keep, as where memory is short."""
    for parameter in parameters:
        parameter.__dict__.pop(_ROOM, None)


def _bias(layer: nn.Linear | nn.Conv1d | nn.Conv2d, rows: Callable[[], Tensor]) -> Shares:
    # annotated as never None, but a layer made with bias=False has none
    bias: Tensor | None = layer.bias
    return [Formed(bias, rows())] if bias is not None and bias.requires_grad else []


def _keeps_factors(*, places: int, inputs: int, outputs: int) -> bool:
    """Whether two Gram matrices and a float64 product cost less than rows (half that in float32).

    One place has no Gram matrices: its norm is ‖a‖‖b‖.
    """
    gram = 0 if places == 1 else 2 * places * places * (inputs + outputs)
    return gram + places * inputs * outputs < (places / 2 + ROW_COST) * inputs * outputs


def _products(parameter: Tensor, a: Tensor, b: Tensor, gram: Gram) -> Share:
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
    """Adds Σ_it (f_i·b_it)·a_itᵀ of each part, one float64 product for each group."""
    one, other = (without_dropped(factors, side).double() for side in (a, b))
    other = other * factors[:, None, None, None]
    for total, part in zip(totals, parts, strict=True):
        if a.shape[1] == 1:
            found = other[part].flatten(0, 2).t() @ one[part].flatten(0, 2)
        else:
            left, right = (side[part].transpose(0, 1).flatten(1, 2) for side in (other, one))
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
