"""Every model for tokens and colour images: the same sums by each mode, and a private round."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bract.client.training.admission import admit
from bract.client.training.execution import Execution
from bract.client.training.gradients import clipped_sum
from bract.client.training.randomness import RandomStream
from bract.client.training.trainer import Trainer
from bract.shared import models, tasks
from bract.shared.data import Examples
from bract.shared.terms import DataTerms, EvaluationTerms, ModelTerms, TrainingTerms
from bract.shared.updates import ProtectedUpdate

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
MODES = ("book-keeping", "opacus-hooks", "opacus-ghost")
Sums = dict[str, Tensor]


def text(task: str = "classes", vocabulary: int = 40) -> DataTerms:
    classes = {"classes": 3, "next-token": vocabulary, "value": 1}[task]
    return DataTerms(name="made-up", shape=(12,), classes=classes, task=task, vocabulary=vocabulary)


PRETRAINED = text(vocabulary=30522)
IMAGES = DataTerms(name="made-up", shape=(3, 9, 11), classes=4, offset=0.5, scale=0.5)
ROPE: dict[str, Any] = {"positions": "rope", "width": 32}
CASES: dict[str, tuple[str, dict[str, Any], DataTerms]] = {
    "transformer": ("transformer", {"width": 32}, text()),
    "transformer-next": ("transformer", {"width": 32}, text("next-token")),
    "transformer-value": ("transformer", {"width": 32}, text("value")),
    "rope": ("transformer", ROPE, text()),
    "rope-next": ("transformer", ROPE, text("next-token")),
    "lstm": ("lstm", {"layers": 2, "hidden": 20}, text()),
    "lstm-next": ("lstm", {}, text("next-token")),
    "resnet": ("resnet", {"width": 8, "blocks": 2}, IMAGES),
    "hf-head": ("hf", {}, PRETRAINED),
    "hf-hidden": ("hf", {"hidden": 8, "pooling": "first", "normalised": False}, PRETRAINED),
    "hf-adapted": ("hf", {"rank": 4}, PRETRAINED),
    "hf-last": ("hf", {"rank": 2, "adapted": 2, "hidden": 8}, PRETRAINED),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], DataTerms]:
    if CASES[request.param][0] == "hf":
        request.getfixturevalue("pretrained")
    return CASES[request.param]


def built(name: str, options: dict[str, Any], data: DataTerms) -> nn.Module:
    """A model whose trained weights were moved: those that start at zero hide the others."""
    torch.manual_seed(0)
    model = models.of(ModelTerms(name=name, options=options), data)
    with torch.no_grad():
        for parameter in models.released_parameters(model).values():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def batch(data: DataTerms) -> tuple[Tensor, Tensor]:
    inputs, targets = tasks.made_up(data, 5, torch.Generator().manual_seed(2))
    if data.vocabulary is not None:
        inputs[0], inputs[1, 5:] = 0, 0
    return inputs, targets


def norm(sums: Sums) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in sums.values()))


def distance(one: Sums, other: Sums) -> float:
    assert set(one) == set(other)
    return norm({name: one[name] - other[name] for name in one})


def rows(model: nn.Module, pair: tuple[Tensor, Tensor], task: Any) -> list[Sums]:
    parameters = models.released_parameters(model)
    found = []
    for x, y in zip(*pair, strict=True):
        loss = tasks.losses(model(x[None]), y[None], task).sum()
        gradient = torch.autograd.grad(loss, list(parameters.values()))
        found.append({n: g.double() for n, g in zip(parameters, gradient, strict=True)})
    return found


def test_each_mode_gives_the_clipped_sum_of_microbatches_in_float32(
    case: tuple[str, dict[str, Any], DataTerms],
) -> None:
    model, pair, task = built(*case), batch(case[2]), case[2].task
    gradients = rows(model, pair, task)
    clip = float(np.median([norm(row) for row in gradients]))
    factors = [min(1.0, clip * (1 - 1e-3) / norm(row)) for row in gradients]
    expected = {
        name: sum(f * row[name] for f, row in zip(factors, gradients, strict=True))
        for name in gradients[0]
    }
    assert all(value.norm() > 1e-6 * clip for value in expected.values())  # all are reached
    for mode in MODES:
        sums = {name: torch.zeros_like(value) for name, value in expected.items()}
        losses = partial(tasks.losses, task=task)
        clipped_sum(mode, copy.deepcopy(model), losses, clip).add_(sums, *pair)
        assert distance(sums, expected) < 1e-5 * norm(expected), mode


def test_model_is_admitted_as_it_is_built(case: tuple[str, dict[str, Any], DataTerms]) -> None:
    name, options, data = case
    model = models.of(ModelTerms(name=name, options=options), data)
    admit(model, data=data, name=name)
    assert not list(model.buffers())


def examples(data: DataTerms) -> Examples:
    inputs, targets = tasks.made_up(data, 30, torch.Generator().manual_seed(3))
    return Examples(inputs=inputs.numpy(), targets=targets.numpy())


@pytest.mark.parametrize("mode", MODES)
def test_private_round_yields_a_protected_update_within_its_bound(
    world: Any, case: tuple[str, dict[str, Any], DataTerms], mode: str
) -> None:
    name, options, data = case
    contract = world.contract(
        model=models.pinned(ModelTerms(name=name, options=options), data),
        data=data,
        training=TrainingTerms(local_steps=1, learning_rate=0.5),
        privacy={"sampling_rate": 1.0, "clip_norm": 0.01},
        evaluation=EvaluationTerms(every=1, noise_multiplier=5.0)
        if data.task == "classes"
        else None,
    )
    trainer, shown = Trainer(contract, Execution(mode=mode, physical_batch=8)), examples(data)
    start = models.released_parameters(built(*case))
    weights = {name: value.detach().numpy() for name, value in start.items()}

    def train(some: Examples) -> np.ndarray:
        update = trainer.train(
            terms=contract.cohort[0], examples=some, weights=weights, stream=Silent(bytes(32))
        )
        assert type(update) is ProtectedUpdate
        assert {n: v.shape for n, v in update.arrays.items()} == trainer.shapes
        return np.concatenate([v.ravel() for v in update.arrays.values()]).astype(np.float64)

    whole, bound = train(shown), 0.5 * 0.01 / 100
    move = float(np.linalg.norm(whole - train(shown.take(np.arange(29)))))
    assert 0.5 * bound < move <= bound * (1 + 1e-4)
    if contract.evaluation is not None:
        score = trainer.score(examples=shown, weights=weights, stream=Silent(bytes(32)))
        assert score.total == 30
        assert 0 <= score.correct <= 30


class Silent(RandomStream):
    """A stream whose normals are zero, to see the sums."""

    def normals(self, count: int) -> np.ndarray:
        return np.zeros(count)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_update_of_adapters_is_a_fiftieth_of_the_model_at_most(pretrained: str, rank: int) -> None:
    model = models.build("hf", (12,), 2, {"rank": rank, "encoder": pretrained}, vocabulary=30522)
    released = sum(p.nbytes for p in models.released_parameters(model).values())
    assert 0 < released <= 0.02 * sum(p.nbytes for p in model.parameters())
