"""A small convolutional network: two convolutions, two dense layers."""

from __future__ import annotations

from torch import nn

from bract.shared.models.activations import activation_named


def cnn(
    shape: tuple[int, ...],
    classes: int,
    *,
    width: int = 8,
    hidden: int = 32,
    activation: str = "tanh",
    pooling: str = "average",
    init_gain: float = 1.5,
) -> nn.Module:
    """Returns a network for images of `shape` (channels, height, width), 8×8 and up.

    3×3 convolutions of `width` and 2·`width` channels, each halved by 2×2 pooling, then a dense
    layer of `hidden` units and one of `classes` logits. No batch statistics anywhere. Orthogonal
    weights of `init_gain` and zero biases: a start from which few noisy steps go far.

    Raises:
        ValueError: where the shape is no image whose sides divide by 4, or pooling is unknown.
    """
    if len(shape) != 3 or shape[1] % 4 or shape[2] % 4:
        raise ValueError(f"shape {shape} must be (channels, height, width), sides divisible by 4")
    pools = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}
    if pooling not in pools:
        raise ValueError(f"pooling {pooling!r} must be one of {', '.join(pools)}")
    pool = pools[pooling]
    channels, height, breadth = shape
    network = nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        activation_named(activation),
        pool(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        activation_named(activation),
        pool(2),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (breadth // 4), hidden),
        activation_named(activation),
        nn.Linear(hidden, classes),
    )
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.orthogonal_(layer.weight, init_gain)
            nn.init.zeros_(layer.bias)
    return network
