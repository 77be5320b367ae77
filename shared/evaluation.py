"""How good a model is on public examples: those that a server holds, or a user names."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from bract.shared import canonical, tasks
from bract.shared.arrays import Arrays
from bract.shared.data import Examples, Groups
from bract.shared.models import released_parameters
from bract.shared.models.frozen import Features, FrozenFront
from bract.shared.models.layout import Layout
from bract.shared.terms import DataTerms

BATCH = 512
_WORTH_THREADS = 0.02  # seconds of a pass; to start threads takes two milliseconds


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy in [0, 1], None for the task "value", and the mean loss, None where not finite.

    "next-token": the accuracy and the loss in nats of a token, over all tokens there are, and the
    perplexity, exp(loss); None for other tasks.
    """

    accuracy: float | None
    loss: float | None
    perplexity: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    """What a pass over examples found of each: how many targets, right ones, and their loss.

    `outputs` are the scores of classes, or the one value; none are kept of tokens.
    """

    known: np.ndarray
    right: np.ndarray
    losses: np.ndarray
    outputs: np.ndarray


class Evaluator:
    """A model kept warm to be scored with changing weights; a frozen front runs only once.

    Args:
        model: is moved to the device.
        data: how inputs are prepared.
        device: where it is scored.
    """

    def __init__(
        self, model: nn.Module, data: DataTerms, device: torch.device | str = "cpu"
    ) -> None:
        model.to(device).eval()
        self._device = torch.device(device)
        if self._device.type != "cpu":  # as in training, by whoever comes first
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self._features = Features(model, data, device) if isinstance(model, FrozenFront) else None
        self._model = model.behind() if isinstance(model, FrozenFront) else model
        self._layout = Layout(self._model)
        self._data = data
        self._parameters = released_parameters(model)
        alone = self._features is not None or self._device.type != "cpu"
        self._cores = 1 if alone or not _keeps_no_state(self._model) else os.cpu_count() or 1
        self._threads = 1

    def score(self, weights: Arrays, examples: Examples) -> Score:
        """Returns accuracy and loss on public examples."""
        return self._score(self._outcome(weights, examples))

    def report(self, weights: Arrays, examples: Examples) -> dict[str, Any]:
        """Returns the fields of `reports.Scores` that the task has, from one pass.

        Precision, recall, F1 and area under the ROC curve are macro; a row of the confusion matrix
        is of one true class. With groups each one's figures, and the mean of their accuracies, in
        which a small hospital counts as much as a large one.
        """
        outcome = self._outcome(weights, examples)
        score = self._score(outcome)
        found: dict[str, Any] = {
            "test_accuracy": score.accuracy,
            "test_loss": score.loss,
            "test_perplexity": score.perplexity,
        }
        if self._data.task == "value":
            return {**found, **_of_values(outcome, examples.targets, tasks.unit_of(self._data))}
        found |= _accuracy_by_group(outcome, examples.groups)
        if self._data.task == "classes":
            found |= _of_classes(outcome, examples.targets, self._data.classes)
            found["test_auc_by_group"] = _auc_by_group(outcome, examples)
        return found

    def each(self, weights: Arrays, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """Returns every example's outputs and mean loss, of public ones: see `_Outcome`."""
        outcome = self._outcome(weights, examples)
        return outcome.outputs, outcome.losses / np.maximum(outcome.known, 1)

    def _score(self, outcome: _Outcome) -> Score:
        count = max(int(outcome.known.sum()), 1)
        loss = canonical.finite(float(outcome.losses.sum()) / count)
        return Score(
            accuracy=None if self._data.task == "value" else int(outcome.right.sum()) / count,
            loss=loss,
            perplexity=_exponential(loss) if self._data.task == "next-token" else None,
        )

    @torch.inference_mode()
    def _outcome(self, weights: Arrays, examples: Examples) -> _Outcome:
        for name, parameter in self._parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name], dtype=np.float32)))
        starts = range(0, max(len(examples), 1), BATCH)  # one at the least
        batches = [slice(start, start + BATCH) for start in starts]
        parts = self._parts(examples, batches)
        columns = zip(*parts, strict=True)
        return _Outcome(*(torch.cat(column).cpu().numpy() for column in columns))

    def _parts(self, examples: Examples, batches: list[slice]) -> list[tuple[torch.Tensor, ...]]:
        if self._threads == 1:
            started = time.perf_counter()
            parts = [self._batch(examples, rows) for rows in batches]
            if time.perf_counter() - started > _WORTH_THREADS:
                self._threads = self._cores  # from the next pass on
            return parts
        # One thread an operation, as everywhere: its sums must not depend on how many there are.
        alone = partial(torch.set_num_threads, 1)
        with ThreadPoolExecutor(min(self._threads, len(batches)), initializer=alone) as pool:
            return list(pool.map(partial(self._batch, examples), batches))

    @torch.inference_mode()
    def _batch(self, examples: Examples, rows: slice) -> tuple[torch.Tensor, ...]:
        """Returns the columns of `_Outcome` for some examples."""
        if self._features is None:
            inputs = tasks.inputs_of(examples.inputs[rows], self._data, self._device)
        else:
            inputs = self._features.rows(examples, rows)
        targets = tasks.targets_of(examples.targets[rows], self._data, self._device)
        return self._part(self._layout.run(self._model, inputs), targets)

    def _part(self, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the columns of `_Outcome`; losses are summed in float64."""
        outputs = tasks.full(outputs)
        if self._data.task == "value":
            known = targets.isfinite()
            losses = tasks.losses(outputs, targets, "value").double()
            return known.long(), torch.zeros_like(known).long(), losses, outputs
        flat, labels = outputs.reshape(-1, self._data.classes), targets.reshape(-1)
        rows = (len(targets), -1) if len(targets) else (0, 1)
        each = tasks.losses(flat, labels, "classes").double().reshape(rows).sum(1)
        right = (flat.argmax(1) == labels).reshape(rows).sum(1)
        known = (labels != tasks.NO_CLASS).reshape(rows).sum(1)
        return known, right, each, outputs if self._data.task == "classes" else outputs[:, :0, 0]


def _keeps_no_state(model: nn.Module) -> bool:
    """Returns whether threads may run a model at once: what others wrote may note things in it."""
    return {type(part).__module__.partition(".")[0] for part in model.modules()} <= {
        "torch",
        "bract",
    }


def _of_values(outcome: _Outcome, truth: np.ndarray, unit: float) -> dict[str, Any]:
    """Returns squared and absolute error in the file's unit, and R² = 1 − residual / total."""
    rows = np.flatnonzero(outcome.known)
    wanted = np.asarray(truth, dtype=np.float64)[rows]
    errors = np.asarray(outcome.outputs, dtype=np.float64)[rows, 0] - wanted
    if not len(rows) or not np.isfinite(errors).all():
        return {}
    squared, spread = float(np.square(errors).sum()), np.square(wanted - wanted.mean()).sum()
    return {
        "test_mean_squared_error": squared / len(rows) * unit**2,
        "test_mean_absolute_error": float(np.abs(errors).mean()) * unit,
        "test_r2": 1 - squared / float(spread) if spread > 0 else None,
    }


def _of_classes(outcome: _Outcome, targets: np.ndarray, classes: int) -> dict[str, Any]:
    rows = np.flatnonzero(outcome.known)
    truth, scores = targets[rows], outcome.outputs[rows]
    guesses = scores.argmax(1) if len(rows) else truth
    table = _confusion(truth, guesses, classes)
    right, guessed, true = np.diagonal(table), np.sum(table, 0), np.sum(table, 1)
    return {
        "precision": _macro(right, guessed),
        "recall": _macro(right, true),
        "f1": _macro(2 * right, guessed + true),
        "confusion": table,
        "auc": _auc(scores, truth),
    }


def _macro(parts: np.ndarray, wholes: np.ndarray) -> float:
    """Returns the mean over classes of a share, 0 for a class that has none."""
    return float(np.mean(parts / np.maximum(wholes, 1)))


def _confusion(truth: np.ndarray, guesses: np.ndarray, classes: int) -> list[list[int]]:
    counts = np.bincount(truth.astype(np.int64) * classes + guesses, minlength=classes**2)
    table: list[list[int]] = counts.reshape(classes, classes).tolist()
    return table


def _auc(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Returns the area under the ROC curve: of two classes, else the mean of each against the rest.

    None where a class is missing, or a score is not finite. The mean is Provost & Domingos' 2000
    without their weights: each class counts alike.
    """
    classes = scores.shape[1]
    if len(np.unique(truth)) != classes or not np.isfinite(scores).all():
        return None
    if classes == 2:
        return _area(scores[:, 1] - scores[:, 0], truth == 1)
    probabilities = softmax(scores)
    areas = [_area(probabilities[:, one], truth == one) for one in range(classes)]
    return float(np.mean(areas))


def _area(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns how often a positive's score is over a negative's, a tie counting half.

    The area under the ROC curve is that (Mann & Whitney 1947).
    """
    ranks, count = stats.rankdata(scores)[positive], int(positive.sum())
    above = float(ranks.sum()) - count * (count + 1) / 2
    return above / (count * (len(scores) - count))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Returns the probabilities of classes, the last axis, in float64."""
    shifted = np.asarray(scores, dtype=np.float64)
    raised = np.exp(shifted - shifted.max(-1, keepdims=True))
    probabilities: np.ndarray = raised / raised.sum(-1, keepdims=True)
    return probabilities


def _accuracy_by_group(outcome: _Outcome, groups: Groups | None) -> dict[str, Any]:
    def accuracy(rows: np.ndarray) -> float:
        return float(outcome.right[rows].sum() / outcome.known[rows].sum())

    found = _by_group(accuracy, outcome, groups)
    mean = float(np.mean(list(found.values()))) if found else None
    return {"test_accuracy_by_group": found, "test_accuracy_mean_of_groups": mean}


def _auc_by_group(outcome: _Outcome, examples: Examples) -> dict[str, float | None] | None:
    def area(rows: np.ndarray) -> float | None:
        readable = rows[outcome.known[rows] > 0]
        return _auc(outcome.outputs[readable], examples.targets[readable])

    return _by_group(area, outcome, examples.groups)


def _by_group(
    figure: Callable[[np.ndarray], Any], outcome: _Outcome, groups: Groups | None
) -> dict[str, Any] | None:
    """Returns a figure of each group that has targets at all, None where none are known."""
    if groups is None:
        return None
    return {n: figure(rows) for n, rows in groups.rows().items() if outcome.known[rows].any()}


def _exponential(loss: float | None) -> float | None:
    try:
        return None if loss is None else math.exp(loss)
    except OverflowError:
        return None
