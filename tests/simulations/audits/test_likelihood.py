"""LiRA tells what models remember, nothing where they remember nothing, and never by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bract.simulations.audits import likelihood, roc


def drawn(seed: int, models: int, examples: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Confidences of examples that differ, of which members have `effect` more."""
    generator = np.random.default_rng(seed)
    member = generator.integers(0, 2, (models, examples)).astype(bool)
    hardness = generator.normal(0, 3, (1, examples))
    return hardness + generator.normal(0, 1, member.shape) + effect * member, member


def test_confidence_is_the_log_odds_of_an_examples_own_class() -> None:
    outputs, targets = np.random.default_rng(1).normal(0, 3, (40, 5)), np.arange(40) % 5
    odds = torch.softmax(torch.tensor(outputs), 1)[np.arange(40), targets].logit()
    assert likelihood.confidence(outputs, targets) == pytest.approx(odds.numpy())


def test_confidence_stays_finite_where_probabilities_round_to_one() -> None:
    found = likelihood.confidence(np.array([[200.0, -300.0], [-300.0, 200.0]]), np.array([0, 0]))
    assert found.tolist() == [500.0, -500.0]


@pytest.mark.parametrize("models", [16, 64])
def test_what_models_remember_is_found_though_examples_differ(models: int) -> None:
    confidences, member = drawn(2, models, 400, effect=2.0)
    by_ratio = likelihood.ratios(confidences, member)
    area = roc.area(by_ratio[member], by_ratio[~member])
    alone = roc.area(confidences[member], confidences[~member])
    assert area > 0.88
    assert area > alone + 0.15


@pytest.mark.parametrize("models", [8, 64])
def test_nothing_is_found_where_nothing_is_remembered(models: int) -> None:
    areas = []
    for seed in range(30):
        confidences, member = drawn(seed, models, 200, effect=0.0)
        found = likelihood.ratios(confidences, member)
        areas.append(roc.area(found[member], found[~member]))
    error = np.std(areas, ddof=1) / np.sqrt(len(areas))
    assert abs(np.mean(areas) - 0.5) < 4 * error


def test_the_attacked_model_is_no_reference_of_its_own() -> None:
    confidences, member = drawn(3, 20, 10, effect=1.0)
    moved = confidences.copy()
    moved[4] += 1e6
    mean, _ = likelihood._left_out(confidences, member)
    after, _ = likelihood._left_out(moved, member)
    assert after[4] == pytest.approx(mean[4])
    assert not np.allclose(after[5], mean[5])
