"""A multilayer perceptron with one hidden layer."""

from __future__ import annotations

import math

from torch import nn

from bract.shared.models.activations import activation_named


def mlp(
    shape: tuple[int, ...],
    classes: int,
    *,
    hidden: int = 64,
    activation: str = "relu",
    init_gain: float = 1.4,
) -> nn.Module:
    """Returns a perceptron with `hidden` units, weights N(0, (init_gain / √inputs)²)."""
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), hidden),
        activation_named(activation),
        nn.Linear(hidden, classes),
    )
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=init_gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    return network
