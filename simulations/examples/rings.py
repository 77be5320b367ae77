"""A data set and a model of one's own: points of three rings, told apart by a small network.

bract simulate --data bract.simulations.examples.rings:data \
    --model bract.simulations.examples.rings:model --set data.options.noise=0.1
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from bract.shared.data import Examples
from bract.shared.data.shares import share
from bract.shared.terms import DataTerms


@dataclass(frozen=True)
class Rings:
    """Points (x, y) of rings with radius 1, 2 and 3; a real data set would read `folder`."""

    noise: float = 0.2
    terms = DataTerms(name="rings", shape=(2,), classes=3, scale=2.0)

    def train(self, folder: Path | None) -> Examples:
        """Returns what the simulated sites share."""
        return self._points(4000, seed=1)

    def public(self, folder: Path | None) -> tuple[Examples, Examples]:
        """Returns validation and test, which the server may see."""
        return self._points(300, seed=2), self._points(900, seed=3)

    def part(self, folder: Path | None, part: str) -> Examples:
        """Returns what one real site would train on: its own file, or here a share such as 2/5."""
        return share(self.train(folder), part)

    def _points(self, count: int, *, seed: int) -> Examples:
        made_up = np.random.default_rng(seed)
        ring, angle = made_up.integers(0, 3, count), made_up.uniform(0, 2 * np.pi, count)
        radius = ring + 1 + self.noise * made_up.standard_normal(count)
        points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return Examples(inputs=points.astype(np.float32), targets=ring)


data = Rings  # the factory; what is set in data.options reaches it


def model(shape: tuple[int, ...], classes: int, *, width: int = 32) -> nn.Module:
    """Returns a network of one hidden layer; options as `--set model.options.width=64`."""
    return nn.Sequential(nn.Linear(shape[0], width), nn.Tanh(), nn.Linear(width, classes))
