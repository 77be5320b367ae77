"""Scores on public examples: over all rows, and for each group they come from."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from bract.server.evaluation import Evaluator
from bract.shared import models
from bract.shared.contract import DataTerms
from bract.shared.data import Examples, Groups

NAMES = ("large", "small", "empty")


def evaluator(classes: int) -> Evaluator:
    data = DataTerms(name="made-up", shape=(2,), classes=classes)
    return Evaluator(models.build("linear", data.shape, classes, {}), data)


def weights(classes: int, slope: float = 1.0) -> dict[str, np.ndarray]:
    matrix = np.zeros((classes, 2), dtype=np.float32)
    matrix[1, 0] = slope  # the second class where the first input is positive
    return {"1.weight": matrix, "1.bias": np.zeros(classes, dtype=np.float32)}


def examples(groups: Groups | None = None) -> Examples:
    """Eight of ten right in the first group, one of four in the second."""
    scores = np.array([3, 2, 1, 4, -1, -2, -3, -4, 5, -5, -1, -2, -3, -6], dtype=np.float32)
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0])
    inputs = np.stack([scores, np.zeros_like(scores)], axis=1)
    return Examples(inputs=inputs, targets=truth, groups=groups)


def test_each_group_has_its_accuracy_and_counts_alike_in_their_mean() -> None:
    groups = Groups(NAMES, np.repeat([0, 1], [10, 4]))
    report = evaluator(2).report(weights(2), examples(groups))
    assert report["test_accuracy_by_group"] == {"large": 0.8, "small": 0.25}
    assert report["test_accuracy_mean_of_groups"] == pytest.approx(0.525)
    assert evaluator(2).score(weights(2), examples(groups)).accuracy == pytest.approx(9 / 14)


def test_data_without_groups_have_none_in_the_report() -> None:
    report = evaluator(2).report(weights(2), examples())
    assert report["test_accuracy_by_group"] is None
    assert report["test_accuracy_mean_of_groups"] is None


@pytest.mark.parametrize("slope", [1.0, -0.25])
def test_two_classes_have_an_area_under_the_curve(slope: float) -> None:
    shown, given = examples(), weights(2, slope)
    given["1.weight"][0] = [2 * slope, 0]  # the first class's score turns the order round
    area = evaluator(2).report(given, shown)["auc"]
    assert area == pytest.approx(metrics.roc_auc_score(shown.targets, -slope * shown.inputs[:, 0]))


@pytest.mark.parametrize("case", ["three classes", "one class seen", "weights not finite"])
def test_area_is_null_where_there_are_not_two_classes_to_tell_apart(case: str) -> None:
    classes, shown, slope = 2, examples(), 1.0
    if case == "three classes":
        classes = 3
    elif case == "one class seen":
        shown = shown.take(np.arange(4))
    else:
        slope = np.inf
    assert evaluator(classes).report(weights(classes, slope), shown)["auc"] is None
