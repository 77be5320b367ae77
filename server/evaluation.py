"""How good the model is, on public examples that the server holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bract.shared import tasks
from bract.shared.arrays import Arrays
from bract.shared.contract import DataTerms
from bract.shared.data import Examples, Groups
from bract.shared.models import released_parameters
from bract.shared.models.frozen import Features, FrozenFront

BATCH = 1024


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy in [0, 1], None for the task "value", and the mean loss, None where not finite.

    "next-token": the accuracy and the loss in nats of a token, over all tokens there are.
    """

    accuracy: float | None
    loss: float | None


class Evaluator:
    """A model kept warm to be scored with changing weights; a frozen front runs only once."""

    def __init__(self, model: nn.Module, data: DataTerms) -> None:
        model.eval()
        self._features = Features(model, data) if isinstance(model, FrozenFront) else None
        self._model = model.behind() if isinstance(model, FrozenFront) else model
        self._data = data
        self._parameters = released_parameters(model)

    def score(self, weights: Arrays, examples: Examples) -> Score:
        """Returns accuracy and loss on public examples."""
        total, right, count = 0.0, 0.0, 0
        for outputs, targets in self._outputs(weights, examples):
            if self._data.task == "value":
                total += float(tasks.losses(outputs, targets, "value").sum())
                count += len(targets)
                continue
            outputs, targets = outputs.reshape(-1, self._data.classes), targets.reshape(-1)
            total += float(tasks.losses(outputs, targets, "classes").sum())
            right += int((outputs.argmax(1) == targets).sum())
            count += int((targets != tasks.NO_CLASS).sum())
        loss, accuracy = total / max(count, 1), right / max(count, 1)
        return Score(
            accuracy=None if self._data.task == "value" else accuracy,
            loss=loss if np.isfinite(loss) else None,
        )

    def report(self, weights: Arrays, examples: Examples) -> dict[str, Any]:
        """Returns macro precision, recall and F1, and the confusion matrix (rows: the truth).

        With two classes the area under the ROC curve too; with groups each one's accuracy and
        their mean, in which a small hospital counts as much as a large one.
        """
        if self._data.task != "classes":
            return {}
        from sklearn import metrics  # slow to import

        logits = self._logits(weights, examples).numpy()
        guesses = logits.argmax(1)
        truth, labels = examples.targets, list(range(self._data.classes))
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            truth, guesses, labels=labels, average="macro", zero_division=0
        )
        confusion = metrics.confusion_matrix(truth, guesses, labels=labels)
        return {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "confusion": confusion.tolist(),
            "auc": _auc(logits, truth),
            **_by_group(guesses == truth, examples.groups),
        }

    def _logits(self, weights: Arrays, examples: Examples) -> torch.Tensor:
        return torch.cat([outputs for outputs, _ in self._outputs(weights, examples)])

    @torch.inference_mode()
    def _outputs(
        self, weights: Arrays, examples: Examples
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields outputs and targets, some examples at a time."""
        for name, parameter in self._parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name], dtype=np.float32)))
        for start in range(0, len(examples), BATCH):
            rows = slice(start, start + BATCH)
            targets = tasks.targets_of(examples.targets[rows], self._data)
            if self._features is None:
                inputs = tasks.inputs_of(examples.inputs[rows], self._data)
            else:
                inputs = self._features.rows(examples, rows)
            yield self._model(inputs), targets


def _auc(logits: np.ndarray, truth: np.ndarray) -> float | None:
    """Returns the area under the ROC curve, None where there are not two classes to tell apart."""
    from sklearn import metrics  # slow to import

    scores = logits[:, 1] - logits[:, 0]
    if logits.shape[1] != 2 or len(np.unique(truth)) != 2 or not np.isfinite(scores).all():
        return None
    return float(metrics.roc_auc_score(truth, scores))


def _by_group(correct: np.ndarray, groups: Groups | None) -> dict[str, Any]:
    if groups is None:
        return {"test_accuracy_by_group": None, "test_accuracy_mean_of_groups": None}
    accuracy = {n: float(correct[rows].mean()) for n, rows in groups.rows().items() if len(rows)}
    return {
        "test_accuracy_by_group": accuracy,
        "test_accuracy_mean_of_groups": float(np.mean(list(accuracy.values()))),
    }
