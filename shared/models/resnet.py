"""A small residual network for colour images, with group norms (Wu & He 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

STAGES = 3
_GROUPS = 8


def resnet(shape: tuple[int, ...], classes: int, *, width: int = 16, blocks: int = 1) -> nn.Module:
    """Returns a residual network (He et al. 2015, arXiv 1512.03385) for images of any sides ≥ 8.

    A convolution, three stages of `blocks` residual blocks with `width`, 2·`width` and 4·`width`
    channels, the latter two at half the resolution of the one before, the mean over the image, and
    a dense layer.

    Raises:
        ValueError: where the shape is no image, or too small, or a size is below 1.
    """
    if len(shape) != 3 or min(shape[1:]) < 8:
        raise ValueError(f"shape {shape} must be (channels, height, width), sides of at least 8")
    if min(width, blocks) < 1:
        raise ValueError(f"width {width} and blocks {blocks} must be at least 1")
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1, bias=False), _norm(width)]
    layers.append(nn.ReLU())
    channels = width
    for stage in range(STAGES):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Residual(channels, width * 2**stage, stride))
            channels = width * 2**stage
    return nn.Sequential(*layers, Mean(), nn.Linear(channels, classes))


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.first_norm, self.second_norm = _norm(outputs), _norm(outputs)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Conv2d(inputs, outputs, 1, stride=stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns (examples, outputs, height / stride, width / stride)."""
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


class Mean(nn.Module):
    """The mean over height and width."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (examples, channels)."""
        return x.mean((2, 3))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, _GROUPS), channels)
