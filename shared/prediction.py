"""What a trained model answers to a user's own rows, and the rows with the answers beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bract.shared import encoding, new_file
from bract.shared.evaluation import BATCH, softmax
from bract.shared.trained import Trained, labels_of


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The answer to each row.

    `predictions` are labels, for tokens the number of the one that follows the row, or values in
    the file's own unit. `probability` is that of the prediction and `probabilities` those of all
    `labels`; both None for values, the second for tokens too: there are too many.
    """

    predictions: tuple[str | int | float, ...]
    probability: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    labels: tuple[str, ...] = ()

    def columns(self) -> dict[str, list[str | int | float]]:
        """Returns the answers as columns of a table, by name."""
        found: dict[str, list[str | int | float]] = {"prediction": list(self.predictions)}
        if self.probability is not None:
            found["probability"] = self.probability.tolist()
        if self.probabilities is not None:
            for label, values in zip(self.labels, self.probabilities.T, strict=True):
                found[f"probability_{label}"] = values.tolist()
        return found


def predict(trained: Trained, paths: tuple[Path, ...], output: Path) -> int:
    """Returns how many rows of a user's files went to `output` with answers beside them.

    Raises:
        UsageError: where a file is of a kind that the contract does not name, or a row of it
            cannot be read (by row and column, never by value), or `output` exists.
    """
    new_file.check(output)
    rows = encoding.encode(trained.contract.data, paths)
    new_file.write(rows.answered(answers(trained, rows.inputs)), output)
    return len(rows.inputs)


def answers(trained: Trained, inputs: np.ndarray) -> Answers:
    """Returns the answers to inputs of (rows, *shape), as `encoding.encode` gives them."""
    data = trained.contract.data
    outputs = np.concatenate(list(_outputs(trained, inputs)))
    if data.task == "value":
        return Answers(predictions=tuple(outputs[:, 0].tolist()))
    probabilities = softmax(outputs)
    best = probabilities.argmax(1)
    likely = probabilities[np.arange(len(best)), best]
    if data.task == "next-token":
        return Answers(predictions=tuple(best.tolist()), probability=likely)
    labels = labels_of(data)
    return Answers(
        predictions=tuple(labels[place] for place in best),
        probability=likely,
        probabilities=probabilities,
        labels=labels,
    )


@torch.inference_mode()
def _outputs(trained: Trained, inputs: np.ndarray) -> Iterator[np.ndarray]:
    """Yields a row of scores, or a value, for each input; of tokens those after the last place."""
    model, last = trained.raw_model(), trained.contract.data.task == "next-token"
    for start in range(0, len(inputs), BATCH):
        some = np.ascontiguousarray(inputs[start : start + BATCH])
        outputs = model(torch.from_numpy(some))
        yield (outputs[:, -1] if last else outputs).numpy()
