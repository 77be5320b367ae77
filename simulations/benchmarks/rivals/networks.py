"""The networks that all engines train; torch alone is needed."""

from __future__ import annotations

from torch import nn

CLASSES = 10


def cnn() -> nn.Module:
    """Returns two convolutions and two dense layers, 225,034 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


def small_cnn() -> nn.Module:
    """Returns the network of Opacus' MNIST example, 26,010 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, stride=2), nn.ReLU(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
    )


NETWORKS = {"cnn": cnn, "small_cnn": small_cnn}
