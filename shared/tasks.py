"""What is learned: inputs and targets as tensors, and the loss of each example, by task.

Site and server share this, so that what is trained is what is scored.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bract.shared.preparation import Table
from bract.shared.terms import DataTerms, Task

NO_CLASS = -100


def inputs_of(values: np.ndarray, data: DataTerms, device: torch.device | str = "cpu") -> Tensor:
    """Returns a batch of model inputs on a device, from values as they were read."""
    return prepared(placed(values, device), data)


def placed(values: np.ndarray, device: torch.device | str) -> Tensor:
    """Returns values on a device; a GPU takes them when it comes to it, and is not waited for."""
    found = torch.from_numpy(np.ascontiguousarray(values))
    if torch.device(device).type == "cpu":
        return found
    return found.pin_memory().to(device, non_blocking=True)


def prepared(raw: Tensor, data: DataTerms) -> Tensor:
    """Returns model inputs: normalised float32, or int64 tokens within the vocabulary.

    A token that does not exist becomes token 0: to fail on it would tell that it is there.
    """
    if data.vocabulary is None:
        return (raw.to(torch.float32) - data.offset) / data.scale
    tokens = raw.to(torch.int64)
    return torch.where((tokens >= 0) & (tokens < data.vocabulary), tokens, 0)


def targets_of(values: np.ndarray, data: DataTerms, device: torch.device | str = "cpu") -> Tensor:
    """Returns a batch of targets: labels, rows of labels for "next-token", float32 for "value".

    A label that does not exist becomes NO_CLASS, a value that is not finite NaN: such a target
    adds nothing, and to fail on it would tell that it is there.
    """
    found = placed(values, device)
    if data.task == "value":
        numbers = found.to(torch.float32)
        return torch.where(numbers.isfinite(), numbers, torch.nan)
    labels = found.to(torch.int64)
    return torch.where((labels >= 0) & (labels < data.classes), labels, NO_CLASS)


def unit_of(data: DataTerms) -> float:
    """Returns what a difference of 1 in the learned value is in the file's own unit.

    A number y is learned as 2·(y − low) / (high − low) − 1, where a table says low and high.
    """
    low, high = _bounds(data)
    return (high - low) / 2


def values_of(learned: Tensor, data: DataTerms) -> Tensor:
    """Returns learned values in the file's own unit."""
    low, high = _bounds(data)
    return (learned + 1) * ((high - low) / 2) + low


def _bounds(data: DataTerms) -> tuple[float, float]:
    """Returns what -1 and 1 stand for: themselves, where no table says."""
    target = data.preparation.target if isinstance(data.preparation, Table) else None
    if target is None or target.low is None or target.high is None:
        return -1.0, 1.0
    return target.low, target.high


def full(value: Tensor) -> Tensor:
    """Returns float32 for 16 bits, the very numbers, and anything else as it is."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def losses(outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Returns the loss of each example; never reduced over examples, so none touches another.

    "classes": cross-entropy in nats of (examples, classes). "next-token": its mean over the places
    of (examples, places, classes) that have a target. "value": the squared error of (examples, 1).
    """
    outputs = full(outputs)
    if task == "classes":
        return functional.cross_entropy(outputs, targets, reduction="none", ignore_index=NO_CLASS)
    if task == "next-token":
        # in one row of places: with the classes last a softmax is several times faster
        flat, labels = outputs.flatten(0, 1), targets.flatten()
        each = functional.cross_entropy(flat, labels, reduction="none", ignore_index=NO_CLASS)
        places = (targets != NO_CLASS).sum(1).clamp(min=1)
        return each.view(targets.shape).sum(1) / places
    known = targets.isfinite()
    # in both places: the gradient of what is not taken must not be NaN either
    errors = outputs[:, 0] - torch.where(known, targets, 0.0)
    return torch.where(known, errors.square(), 0.0)


def made_up(data: DataTerms, examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns random inputs and targets, to try a model on without any data."""
    shape = (examples, *data.shape)
    if data.vocabulary is None:
        inputs = torch.randn(shape, generator=generator)
    else:
        inputs = torch.randint(data.vocabulary, shape, generator=generator)
    if data.task == "value":
        return inputs, torch.randn(examples, generator=generator)
    if data.task == "next-token":
        return inputs, torch.randint(data.classes, shape, generator=generator)
    return inputs, torch.arange(examples) % data.classes
