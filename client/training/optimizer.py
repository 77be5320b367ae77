"""Opacus' DP optimizer with our noise: one draw for each logical step, from a CSPRNG."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor
from torch.optim import Optimizer

from bract.client.training.randomness import RandomStream

GRID_BITS = 20


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Adds N(0, (σC)²) to sums of clipped gradients, divides by a public constant, and steps.

    The sums are put into each parameter's `summed_grad` by `put`; Opacus' own clipping is not
    used, and its guard against using one sum twice is.

    Args:
        optimizer: the optimizer that steps on the noised mean.
        noise_multiplier: σ, relative to the clip norm.
        clip_norm: C, the greatest norm that one example adds to the sum.
        normaliser: the public constant q · nominal size; never the realised batch.
        stream: where the noise comes from.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        clip_norm: float,
        normaliser: float,
        stream: RandomStream,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._normaliser = normaliser
        self._stream = stream
        self._stddev = noise_multiplier * clip_norm

    def put(self, sums: list[Tensor]) -> None:
        """Sets the sum of a logical batch, one tensor a parameter; zeros for an empty batch."""
        for parameter, value in zip(self.params, sums, strict=True):
            parameter.summed_grad = value

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Noises and scales the sums; no logical step is ever skipped."""
        self.add_noise()
        self.scale_grad()
        return True

    def add_noise(self) -> None:
        """Adds the host's noise in float64, and rounds the result to a public grid.

        The grid of σC·2⁻²⁰ hides the low bits, whose pattern could tell the sum from the noise
        (Mironov 2012); rounding is post-processing. A GPU is not waited for: noise is drawn while
        it still forms the sum, and follows it there.
        """
        for parameter in self.params:
            _check_processed_flag(parameter.summed_grad)
            total = parameter.summed_grad.detach().to(torch.float64)
            noise = self._stream.normals(total.numel()).reshape(total.shape)
            noise *= self._stddev
            if total.device.type == "cpu":
                noise += total.numpy()
                released = torch.from_numpy(on_grid(noise, self._stddev))
            else:
                arrived = torch.from_numpy(noise).pin_memory().to(total.device, non_blocking=True)
                released = tensor_on_grid(arrived + total, self._stddev)
            parameter.grad = released.to(parameter.dtype).view_as(parameter)
            _mark_as_processed(parameter.summed_grad)

    def scale_grad(self) -> None:
        """Divides by the public normaliser."""
        for parameter in self.params:
            parameter.grad /= self._normaliser


def on_grid(values: np.ndarray, stddev: float) -> np.ndarray:
    """Returns values rounded to multiples of the power of two just under stddev · 2⁻²⁰."""
    if stddev == 0:
        return values
    step = _step(stddev)
    multiples = np.rint(values * (1 / step))  # exact: the step is a power of two
    multiples *= step
    return multiples


def tensor_on_grid(values: Tensor, stddev: float) -> Tensor:
    """Returns what `on_grid` does, where the values are."""
    if stddev == 0:
        return values
    step = _step(stddev)
    return (values * (1 / step)).round() * step


def _step(stddev: float) -> float:
    return 2.0 ** (math.floor(math.log2(stddev)) - GRID_BITS)
