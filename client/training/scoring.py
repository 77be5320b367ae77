"""How good received weights are on a site's own examples: two counts, which leave with noise only.

Adding or removing one example changes the number of right answers by at most 1 and the number of
examples by 1: the pair has L2 sensitivity √2. That holds of floating-point arithmetic only where
an example's answer is the same whoever is scored beside it. A kernel is chosen by the shape of its
batch, and a server may choose weights whose logits differ by rounding alone; so every batch has
the same shape, the last one filled up; and its place must not decide either (`rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bract.client.training.noise import on_grid_
from bract.client.training.randomness import RandomStream
from bract.client.training.sizes import fill
from bract.shared.data import Examples
from bract.shared.models import rounding
from bract.shared.updates import ProtectedScore

Prepare = Callable[[Examples, npt.NDArray[np.int64]], tuple[Tensor, Tensor]]
SENSITIVITY = math.sqrt(2)
TOGETHER = rounding.UNIT


def counts(model: nn.Module, examples: Examples, prepare: Prepare) -> tuple[int, int]:
    """Returns the exact (correct, total), which must not leave: `protect` them.

    Logits that are not numbers are never right, nor is a label that does not exist; both count.

    Args:
        model: on its device, with the weights to be scored.
        examples: all are scored.
        prepare: gives the model's inputs and the targets of some rows.
    """
    correct = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), rounding.one_thread(_is_uneven(model, examples, prepare)):
            for start in range(0, len(examples), TOGETHER):
                rows = np.arange(start, min(start + TOGETHER, len(examples)))
                inputs, targets = prepare(examples, rows)
                logits = model(fill(inputs, TOGETHER))[: len(rows)]
                right = (logits.argmax(1) == targets) & ~logits.isnan().any(1)
                correct += int(right.sum())
    finally:
        model.train(was_training)
    return correct, len(examples)


def _is_uneven(model: nn.Module, examples: Examples, prepare: Prepare) -> bool:
    """Returns whether an answer may follow its place, where several threads compute a batch."""
    inputs, _ = prepare(examples, np.arange(min(1, len(examples))))
    if inputs.device.type != "cpu" or torch.get_num_threads() == 1:
        return False
    return not rounding.is_even(lambda: model(fill(torch.zeros_like(inputs), TOGETHER)))


def protect(
    correct: int, total: int, *, noise_multiplier: float, stream: RandomStream
) -> ProtectedScore:
    """Returns both counts with N(0, (√2·σ)²), made in float64 and rounded to a public grid.

    Args:
        correct: how many answers are right.
        total: how many examples there are.
        noise_multiplier: σ, relative to the sensitivity √2.
        stream: where the noise comes from.
    """
    stddev = SENSITIVITY * noise_multiplier
    noisy = np.array([correct, total], dtype=np.float64) + stddev * stream.normals(2)
    released = on_grid_(noisy, stddev)
    return ProtectedScore(correct=float(released[0]), total=float(released[1]))
