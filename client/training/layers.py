"""A rule for each kind of layer: what it adds to the sum of clipped gradients.

A rule takes the inputs and output gradients of all uses of a layer in one pass and returns a share
for each of its trainable parameters: the norm of every example's gradient, and the weighted sum of
the same numbers. Layers without a rule go to Opacus' samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleModuleFastGradientClipping,
)
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from bract.client.training.embeddings import embedding, without_padding
from bract.client.training.patches import lie_channels_last, patches_of
from bract.client.training.products import bias_shares, products, side, weight_shares
from bract.client.training.shares import Formed, Rule, Share, Shares, Use


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
        outputs = without_padding(layer, inputs[0], backprops).contiguous()
        for parameter, found in sampler(layer, kept, outputs).items():
            if parameter.requires_grad:
                rows[parameter] = rows[parameter] + found if parameter in rows else found
    return rows


def dense(layer: nn.Linear, uses: Sequence[Use]) -> Shares:
    """Returns the shares of a linear layer; a sequence axis and several uses are its places."""
    activations = side([inputs[0].to(b.dtype) for inputs, b in uses])
    backprops = side([b for _, b in uses])
    weight = weight_shares(layer, activations.__getitem__, backprops[:, None], layer.in_features)
    return [*weight, *bias_shares(layer, lambda: backprops.sum(1))]


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
    weight = weight_shares(layer, patches, backprops, features, last)
    return [*weight, *bias_shares(layer, lambda: backprops.sum(2).flatten(1))]


def ghost_dense(layer: nn.Linear, uses: Sequence[Use]) -> Shares:
    """Returns the shares of a linear layer by Opacus' own ghost norms, whatever the shapes."""
    ((inputs, b),) = uses
    activations, backprops = side([inputs[0].to(b.dtype)]), side([b])

    def gram(one: Tensor, other: Tensor) -> Tensor:
        ghost: Tensor = _norm_sampler(layer)(layer, [one], other)[layer.weight]
        return ghost.square()

    bias = bias_shares(layer, lambda: backprops.sum(1))
    if not layer.weight.requires_grad:
        return bias
    return [products(layer.weight, activations[:, None], backprops[:, None], gram), *bias]


def ghost_embedding(layer: nn.Embedding, uses: Sequence[Use]) -> Shares:
    """Returns the share of an embedding by Opacus' own ghost norm."""
    ((inputs, backprops),) = uses
    tokens = inputs[0].contiguous()  # Opacus' sampler views it flat
    outputs = without_padding(layer, tokens, backprops).double()
    ghost = _norm_sampler(layer)(layer, [tokens], outputs)[layer.weight]
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
