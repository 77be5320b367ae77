"""Inputs, targets and losses: what cannot be used adds nothing, and no example touches another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bract.shared import tasks
from bract.shared.terms import DataTerms

DATA = {
    "classes": DataTerms(name="d", shape=(3,), classes=4, offset=1.0, scale=2.0),
    "next-token": DataTerms(name="d", shape=(5,), classes=7, task="next-token", vocabulary=7),
    "value": DataTerms(name="d", shape=(3,), classes=1, task="value"),
}
# Targets that are none, as a reader of files would leave them.
UNUSABLE: dict[str, list[Any]] = {
    "classes": [-1, 4, -100, 2**40],
    "next-token": [[-1] * 5, [7] * 5, [2**40] * 5],
    "value": [np.nan, np.inf, -np.inf],
}


def outputs_for(data: DataTerms, examples: int) -> Tensor:
    shape = (examples, *data.shape) if data.task == "next-token" else (examples,)
    generator = torch.Generator().manual_seed(3)
    return torch.randn((*shape, data.classes), generator=generator).requires_grad_()


@pytest.mark.parametrize("task", DATA)
def test_each_example_has_a_loss_that_no_other_touches(task: str) -> None:
    data = DATA[task]
    _, targets = tasks.made_up(data, 4, torch.Generator().manual_seed(1))
    outputs = outputs_for(data, 4)
    losses = tasks.losses(outputs, targets, data.task)
    assert losses.shape == (4,)
    for row in range(4):
        (gradient,) = torch.autograd.grad(losses[row], outputs, retain_graph=True)
        touched = gradient.flatten(1).abs().sum(1) > 0
        assert touched.tolist() == [place == row for place in range(4)]
        alone = tasks.losses(outputs[row : row + 1], targets[row : row + 1], data.task)
        torch.testing.assert_close(alone[0], losses[row])


@pytest.mark.parametrize(("task", "target"), [(t, v) for t, each in UNUSABLE.items() for v in each])
def test_a_target_that_is_none_adds_nothing(task: str, target: Any) -> None:
    data = DATA[task]
    targets = tasks.targets_of(np.array([target, target]), data)
    outputs = outputs_for(data, 2)
    losses = tasks.losses(outputs, targets, data.task)
    (gradient,) = torch.autograd.grad(losses.sum(), outputs)
    assert losses.tolist() == [0.0, 0.0]
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_loss_of_a_text_is_the_mean_over_the_places_that_have_a_target() -> None:
    data = DATA["next-token"]
    outputs = outputs_for(data, 1)
    targets = tasks.targets_of(np.array([[3, 1, -1, -1, -1]]), data)
    chances = torch.log_softmax(outputs, 2)
    expected = -(chances[0, 0, 3] + chances[0, 1, 1]) / 2
    torch.testing.assert_close(tasks.losses(outputs, targets, "next-token")[0], expected)


def test_numbers_are_normalised_and_tokens_are_not() -> None:
    values = np.array([[1, 3, 5]], dtype=np.uint8)
    assert tasks.inputs_of(values, DATA["classes"]).tolist() == [[0.0, 1.0, 2.0]]
    tokens = tasks.inputs_of(np.array([[0, 6, 7, -1, 2**40]]), DATA["next-token"])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[0, 6, 0, 0, 0]]
