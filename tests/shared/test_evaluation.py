"""Scores on public examples: over all rows, and for each group they come from."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

from bract.shared import evaluation, models, tasks
from bract.shared.data import Examples, Groups
from bract.shared.evaluation import Evaluator
from bract.shared.preparation import Numeric, Table, Target
from bract.shared.reports.runs import Scores
from bract.shared.terms import DataTerms, ModelTerms

PICTURES = DataTerms(name="made-up", shape=(3, 8, 8), classes=3)
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
    areas = {"large": pytest.approx(16 / 25), "small": 1.0}
    assert report["test_auc_by_group"] == areas
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


@pytest.mark.parametrize("case", ["a class is missing", "one class seen", "weights not finite"])
def test_area_is_null_where_classes_cannot_be_told_apart(case: str) -> None:
    classes, shown, slope = 2, examples(), 1.0
    if case == "a class is missing":
        classes = 3
    elif case == "one class seen":
        shown = shown.take(np.arange(4))
    else:
        slope = np.inf
    assert evaluator(classes).report(weights(classes, slope), shown)["auc"] is None


def test_of_more_than_two_classes_the_area_is_the_mean_of_each_against_the_rest() -> None:
    generator = np.random.default_rng(5)
    truth = generator.integers(0, 3, 60)
    shown = Examples(inputs=generator.normal(size=(60, 2)).astype(np.float32), targets=truth)
    matrix = generator.normal(size=(3, 2)).astype(np.float32)
    given = {"1.weight": matrix, "1.bias": np.zeros(3, dtype=np.float32)}
    scores = shown.inputs.astype(np.float64) @ matrix.T.astype(np.float64)
    raised = np.exp(scores)
    expected = metrics.roc_auc_score(
        truth, raised / raised.sum(1, keepdims=True), multi_class="ovr", average="macro"
    )
    assert evaluator(3).report(given, shown)["auc"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("classes", "seen"), [(2, 2), (4, 4), (6, 3)])
def test_figures_of_classes_and_ties_are_those_of_scikit_learn(classes: int, seen: int) -> None:
    generator = np.random.default_rng(classes)
    truth = generator.integers(0, seen, 80)
    inputs = generator.integers(-2, 3, (80, 2)).astype(np.float32)  # so few values that many tie
    matrix = generator.integers(-1, 2, (classes, 2)).astype(np.float32)
    given = {"1.weight": matrix, "1.bias": np.zeros(classes, dtype=np.float32)}
    found = evaluator(classes).report(given, Examples(inputs=inputs, targets=truth))
    scores = inputs @ matrix.T
    guesses, labels = scores.argmax(1), list(range(classes))
    expected = metrics.precision_recall_fscore_support(
        truth, guesses, labels=labels, average="macro", zero_division=0
    )
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(expected[:3])
    table = metrics.confusion_matrix(truth, guesses, labels=labels)
    assert found["confusion"] == table.tolist()
    if classes == 2:
        area = metrics.roc_auc_score(truth, scores[:, 1] - scores[:, 0])
        assert found["auc"] == pytest.approx(area)


def test_an_area_of_a_group_that_lacks_a_class_is_null() -> None:
    groups = Groups(NAMES, np.repeat([0, 1, 2], [4, 10, 0]))
    areas = evaluator(2).report(weights(2), examples(groups))["test_auc_by_group"]
    assert areas["large"] is None
    assert 0 < areas["small"] < 1
    assert "empty" not in areas


def test_a_target_that_is_no_class_counts_nowhere() -> None:
    shown, whole = examples(), evaluator(2).report(weights(2), examples())
    more = Examples(
        inputs=np.concatenate([shown.inputs, shown.inputs[:3]]),
        targets=np.concatenate([shown.targets, [-1, 2, -100]]),
    )
    assert evaluator(2).report(weights(2), more) == whole


class Fixed(nn.Module):
    """The scores of a token's successors, from a table alone."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocabulary, vocabulary))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


def test_perplexity_is_of_a_token_and_that_of_guessing_is_the_vocabulary() -> None:
    data = DataTerms(name="made-up", shape=(3,), classes=4, vocabulary=4, task="next-token")
    shown = Examples(
        inputs=np.array([[0, 1, 2], [3, 2, 1]]), targets=np.array([[1, 2, 3], [2, -1, 0]])
    )
    ready = Evaluator(Fixed(4), data)
    blind = ready.report({"table": np.zeros((4, 4), dtype=np.float32)}, shown)
    assert blind["test_perplexity"] == pytest.approx(4.0)
    # the successor is one more: right for the first row, for none of the two targets of the second
    table = 2.0 * np.roll(np.eye(4, dtype=np.float32), 1, axis=1)
    found = ready.report({"table": table}, shown)
    assert found["test_accuracy"] == pytest.approx(3 / 5)
    loss = np.log(np.exp(2) + 3) - 2 * 3 / 5
    assert found["test_loss"] == pytest.approx(loss)
    assert found["test_perplexity"] == pytest.approx(np.exp(loss))
    assert ready.score({"table": table}, shown).perplexity == found["test_perplexity"]
    assert Scores(**found).f1 is None


def test_perplexity_beyond_every_number_is_null() -> None:
    data = DataTerms(name="made-up", shape=(1,), classes=2, vocabulary=2, task="next-token")
    shown = Examples(inputs=np.array([[0]]), targets=np.array([[1]]))
    table = np.array([[1e6, 0], [0, 0]], dtype=np.float32)
    found = Evaluator(Fixed(2), data).score({"table": table}, shown)
    assert found.loss == pytest.approx(1e6)
    assert found.perplexity is None


def values(low: float, high: float) -> DataTerms:
    columns = (Numeric(name="age", low=0, high=1),)
    prepared = Table(columns=columns, target=Target(name="dose", low=low, high=high))
    return DataTerms(name="made-up", shape=(2,), classes=1, task="value", preparation=prepared)


def test_errors_of_values_are_in_the_unit_of_the_file() -> None:
    data = values(100, 300)
    inputs = np.array([[0.1, 0], [0.5, 0], [-0.4, 0], [0.9, 0]], dtype=np.float32)
    truth = np.array([0.2, 0.4, -0.4, np.nan])  # the last one could not be read
    shown = Examples(inputs=inputs, targets=truth)
    model = models.build("linear", data.shape, 1, {}, task="value")
    given = {
        "1.weight": np.array([[1.0, 0.0]], dtype=np.float32),
        "1.bias": np.zeros(1, dtype=np.float32),
    }
    found = Evaluator(model, data).report(given, shown)
    inside, guessed = 100 + (truth[:3] + 1) * 100, 100 + (inputs[:3, 0] + 1) * 100
    assert found["test_accuracy"] is None
    assert found["test_loss"] == pytest.approx(0.02 / 3)
    assert found["test_mean_squared_error"] == pytest.approx(
        metrics.mean_squared_error(inside, guessed), rel=1e-5
    )
    assert found["test_mean_absolute_error"] == pytest.approx(
        metrics.mean_absolute_error(inside, guessed), rel=1e-5
    )
    assert found["test_r2"] == pytest.approx(metrics.r2_score(inside, guessed), rel=1e-5)
    assert "R² " in Scores(**found).line


def test_r2_of_targets_that_are_all_alike_is_null() -> None:
    data = values(0, 1)
    shown = Examples(inputs=np.zeros((3, 2), dtype=np.float32), targets=np.full(3, 0.25))
    model = models.build("linear", data.shape, 1, {}, task="value")
    zeros = {name: np.zeros(s, np.float32) for name, s in models.released_shapes(model).items()}
    found = Evaluator(model, data).report(zeros, shown)
    assert found["test_r2"] is None
    assert found["test_mean_absolute_error"] == pytest.approx(0.125)


class Viewed(nn.Module):
    """Counts on its images' channels coming first in memory, or does not."""

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8 * 6 * 6, 4)
        self.views = views

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(inputs))
        return self.last(hidden.view(len(hidden), -1) if self.views else hidden.flatten(1))


@pytest.mark.parametrize("views", [False, True])
def test_how_images_lie_in_memory_changes_no_score(views: bool) -> None:
    torch.manual_seed(0)
    model, data = Viewed(views=views), DataTerms(name="made-up", shape=(3, 8, 8), classes=4)
    given = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    shown = Examples(
        inputs=np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32),
        targets=np.arange(40) % 4,
    )
    with torch.inference_mode():
        expected = model(torch.from_numpy(shown.inputs)).numpy()
    for _ in range(2):  # the second time it is known how
        outputs, _ = Evaluator(model, data).each(given, shown)
        np.testing.assert_allclose(outputs, expected, atol=1e-6)
    assert next(model.parameters()).is_contiguous() == views


@pytest.mark.parametrize("name", ["cnn", "resnet", "transformer"])
def test_threads_change_no_bit_of_a_score(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_WORTH_THREADS", 0.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    words = name == "transformer"
    data = DataTerms(name="made-up", shape=(8,), classes=3, vocabulary=9) if words else PICTURES
    inputs, targets = tasks.made_up(
        data, 2 * evaluation.BATCH + 3, torch.Generator().manual_seed(1)
    )
    shown = Examples(inputs.numpy(), targets.numpy())
    model = models.of(ModelTerms(name=name), data)
    scoring = Evaluator(model, data)
    given = {n: p.detach().numpy().copy() for n, p in models.released_parameters(model).items()}
    seen = set[int]()
    model.register_forward_hook(lambda *_: seen.add(threading.get_ident()))
    alone = scoring.each(given, shown)
    assert seen == {threading.get_ident()}
    together = scoring.each(given, shown)
    assert len(seen) > 1
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert scoring.report(given, shown) == Evaluator(model, data).report(given, shown)


def test_what_others_wrote_is_run_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may note in itself what it sees."""
    monkeypatch.setattr(evaluation, "_WORTH_THREADS", 0.0)

    class Noting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add(threading.get_ident())
            return super().forward(x)

    seen = set[int]()
    data = DataTerms(name="made-up", shape=(2,), classes=2)
    scoring = Evaluator(nn.Sequential(Noting(2, 2)), data)
    shown = Examples(np.zeros((2 * evaluation.BATCH, 2)), np.zeros(2 * evaluation.BATCH, np.int64))
    for _ in range(3):
        scoring.score({"0.weight": np.eye(2), "0.bias": np.zeros(2)}, shown)
    assert seen == {threading.get_ident()}
