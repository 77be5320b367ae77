"""Gradients of public examples by plain autograd, one at a time: what a release should hold.

Shares nothing with the private step but the model and its loss, so that an error there shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bract.client.training.clipping import SLACK
from bract.shared import models, tasks
from bract.shared.arrays import Array, Arrays
from bract.shared.data import Examples
from bract.shared.models.frozen import Features, FrozenFront
from bract.shared.terms import DataTerms, ModelTerms

Sums = dict[str, npt.NDArray[np.float64]]


def start(model: ModelTerms, data: DataTerms) -> dict[str, Array]:
    """Returns the public weights that every round is asked with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = models.released_parameters(models.of(model, data))
    return {name: value.detach().numpy().copy() for name, value in parameters.items()}


def typical_norm(model: ModelTerms, data: DataTerms, examples: Examples) -> float:
    """Returns the median norm of the gradients at the start; 1 where they vanish."""
    weights = start(model, data)
    norms = [_norm(each) for each in _each(model, data, weights, examples)]
    middle = float(np.median(norms))
    return middle if np.isfinite(middle) and middle > 0 else 1.0


def clipped_sums(
    model: ModelTerms, data: DataTerms, weights: Arrays, examples: Examples, clip_norm: float
) -> Sums:
    """Returns Σ g·min(1, C(1 − 1e-3) / ‖g‖) over examples, by parameter, in units of C.

    As clipping has it, an example whose gradient is not finite adds nothing.
    """
    sums = {name: np.zeros(value.shape) for name, value in weights.items()}
    for gradient in _each(model, data, weights, examples):
        norm = _norm(gradient)
        if not np.isfinite(norm) or norm == 0:
            continue
        factor = min(1.0, clip_norm * (1 - SLACK) / norm) / clip_norm
        for name, value in gradient.items():
            sums[name] += factor * value.numpy()
    return sums


def _each(
    terms: ModelTerms, data: DataTerms, weights: Arrays, examples: Examples
) -> Iterator[dict[str, Tensor]]:
    model = models.of(terms, data).train()
    parameters = models.released_parameters(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name])))
    if isinstance(model, FrozenFront):  # what lies in front is no part of the private step
        inputs = Features(model, data).rows(examples, slice(None))
        model = model.behind()
    else:
        inputs = tasks.inputs_of(examples.inputs, data)
    model = model.double()
    parameters = models.released_parameters(model)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    targets = tasks.targets_of(examples.targets, data)
    targets = targets.double() if targets.is_floating_point() else targets
    for row in range(len(examples)):
        one = slice(row, row + 1)
        loss = tasks.losses(model(inputs[one]), targets[one], data.task).sum()
        found = torch.autograd.grad(loss, list(parameters.values()))
        yield dict(zip(parameters, found, strict=True))


def _norm(gradient: dict[str, Tensor]) -> float:
    return float(torch.stack([value.norm() for value in gradient.values()]).norm())
