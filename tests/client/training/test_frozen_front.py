"""A front that is frozen: its features are kept by site and server, and nothing else changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bract.client.training.execution import Execution
from bract.client.training.randomness import RandomStream
from bract.client.training.trainer import Trainer
from bract.shared import models
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.errors import VerificationFailed
from bract.shared.evaluation import Evaluator
from bract.shared.terms import DataTerms, EvaluationTerms, ModelTerms, TrainingTerms

MODES = ("book-keeping", "opacus-hooks", "opacus-ghost")
DATA = DataTerms(name="digits", shape=(1, 8, 8), classes=10, scale=16.0)
FACTORIES = """
import torch
from torch import nn
from bract.shared.models.frozen import FrozenFront

class Whole(nn.Module):
    def __init__(self, front, back):
        super().__init__()
        self.front, self.back = front, back

    def forward(self, x):
        return self.back(self.front(x))

def parts(classes, seed):
    front = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten()).requires_grad_(False)
    filters = torch.randn(front[0].weight.shape, generator=torch.Generator().manual_seed(seed))
    front[0].weight.copy_(filters)
    front[0].bias.zero_()
    return front, nn.Sequential(nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, classes))

def fronted(shape, classes, *, seed=1):
    return FrozenFront(*parts(classes, seed))

def whole(shape, classes, *, seed=1):
    return Whole(*parts(classes, seed))
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelTerms]:
    (tmp_path / "fronted_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fronted_models", raising=False)
    return lambda name, **options: ModelTerms(name=f"fronted_models:{name}", options=options)


def contract_of(world: Any, model: ModelTerms) -> Contract:
    return world.contract(
        model=model,
        training=TrainingTerms(local_steps=3, learning_rate=0.5),
        privacy={"sampling_rate": 0.5},
        evaluation=EvaluationTerms(every=1, noise_multiplier=5.0),
    )


def examples(count: int = 150) -> Examples:
    generator = np.random.default_rng(3)
    inputs = generator.integers(0, 17, (count, 1, 8, 8)).astype(np.uint8)
    return Examples(inputs=inputs, targets=generator.integers(0, 10, count))


def start(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {n: generator.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}


@pytest.mark.parametrize("mode", MODES)
def test_kept_features_give_the_update_and_the_score_of_the_whole_model(
    world: Any, made: Callable[..., ModelTerms], mode: str
) -> None:
    found = []
    for name in ("whole", "fronted"):
        contract = contract_of(world, made(name))
        trainer = Trainer(contract, Execution(mode=mode, physical_batch=40))
        weights, shown = start(trainer.shapes), examples()
        for _ in range(2):  # the second round finds the features kept
            update = trainer.train(
                terms=contract.cohort[0],
                examples=shown.take(np.arange(150)),
                weights=weights,
                stream=RandomStream(bytes(32)),
            )
        score = trainer.score(examples=shown, weights=weights, stream=RandomStream(bytes(32)))
        found.append((update.arrays, score))
    (arrays, score), (of_kept, score_of_kept) = found
    assert set(arrays) == {"back.0.weight", "back.0.bias", "back.2.weight", "back.2.bias"}
    for name, value in arrays.items():
        np.testing.assert_allclose(of_kept[name], value, atol=1e-6)
    assert score == score_of_kept


def test_features_follow_the_data_when_they_change(
    world: Any, made: Callable[..., ModelTerms]
) -> None:
    contract = contract_of(world, made("fronted"))
    warm, fresh = Trainer(contract, Execution()), Trainer(contract, Execution())
    weights, shown = start(warm.shapes), examples()
    changed = Examples(inputs=16 - shown.inputs, targets=shown.targets)

    def train(trainer: Trainer, some: Examples) -> np.ndarray:
        update = trainer.train(
            terms=contract.cohort[0],
            examples=some,
            weights=weights,
            stream=RandomStream(bytes(32)),
        )
        return np.concatenate([value.ravel() for value in update.arrays.values()])

    before = train(warm, shown)
    np.testing.assert_array_equal(train(warm, changed), train(fresh, changed))
    assert np.abs(before - train(fresh, changed)).max() > 1e-4
    np.testing.assert_array_equal(train(warm, shown), before)


def test_example_that_cannot_be_used_adds_nothing_behind_a_front_either(
    world: Any, made: Callable[..., ModelTerms]
) -> None:
    contract = contract_of(world, made("fronted")).model_copy(deep=True)
    trainer, good = Trainer(contract, Execution()), examples(20)
    weights = start(trainer.shapes)

    class All(RandomStream):
        def poisson_sample(self, population: int, rate: float) -> np.ndarray:
            return np.arange(population)

        def normals(self, count: int) -> np.ndarray:
            return np.zeros(count)

    inputs = np.concatenate([good.inputs, good.inputs[:2]]).astype(np.float32)
    inputs[20, 0, 3, 3] = np.nan
    targets = np.concatenate([good.targets, [1, 77]])
    terms = contract.cohort[0]
    expected, found = (
        trainer.train(terms=terms, examples=some, weights=weights, stream=All(bytes(32))).arrays
        for some in (good, Examples(inputs, targets))
    )
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-7)


def test_server_scores_by_kept_features_as_by_the_whole_model(
    made: Callable[..., ModelTerms],
) -> None:
    shown, found = examples(), []
    for name in ("whole", "fronted"):
        model = models.of(made(name), DATA)
        evaluator, weights = Evaluator(model, DATA), start(models.released_shapes(model))
        for scale in (0.5, 1.0):
            scaled = {n: scale * value for n, value in weights.items()}
            found.append((evaluator.score(scaled, shown), evaluator.report(scaled, shown)))
    (one, two), (other, another) = found[:2], found[2:]
    for left, right in ((one, other), (two, another)):
        assert left[0].accuracy == right[0].accuracy
        assert left[0].loss == pytest.approx(right[0].loss, rel=1e-5)
        assert left[1]["confusion"] == right[1]["confusion"]
    assert one[0].loss != two[0].loss


def test_site_with_other_frozen_weights_refuses_before_any_round(
    world: Any, made: Callable[..., ModelTerms]
) -> None:
    pinned = models.pinned(made("fronted"), DATA)
    assert pinned.frozen is not None
    Trainer(contract_of(world, pinned), Execution())
    other = pinned.model_copy(update={"options": {"seed": 2}})
    with pytest.raises(VerificationFailed, match="frozen weights here are not those") as refusal:
        Trainer(contract_of(world, other), Execution())
    assert "\n" not in str(refusal.value)
