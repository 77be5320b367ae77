"""What counting bytes gets on shakespeare: unigrams and bigrams with one added to each count.

A plain reference without privacy: the speeches of all training roles are counted in one place. A
model of the experiment `shakespeare` that learned something is better on the public test roles.

Run: python -m bract.simulations.benchmarks.shakespeare_baselines --json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bract.shared.data import describe, load
from bract.shared.data.examples import Examples
from bract.shared.data.locations import folder_of

BYTES = 256


def main() -> None:
    """Prints, for each model, its loss in nats of a byte, its perplexity and its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--data-dir", type=Path, help="a folder of data sets")
    options = parser.parse_args()
    scores = measure(options.data_dir)
    if options.json:
        print(json.dumps(scores))
        return
    for model, row in scores.items():
        print(f"{model:8}", "  ".join(f"{name} {value:.4f}" for name, value in row.items()))


def measure(root: Path | None) -> dict[str, dict[str, float]]:
    """Returns loss, perplexity and accuracy on the test roles, by model.

    Args:
        root: a folder of data sets; `$BRACT_DATA` where it is None.
    """
    splits = load(describe("shakespeare"), folder_of("shakespeare", folder=None, root=root))
    counts = _counts(*_pairs(splits.train))
    before, after = _pairs(splits.test)
    return {
        "unigram": _score(np.broadcast_to(counts.sum(0), counts.shape), before, after),
        "bigram": _score(counts, before, after),
    }


def _pairs(examples: Examples) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns each byte that has one after it, and that one."""
    there = examples.targets >= 0
    return examples.inputs[there].astype(np.int64), examples.targets[there]


def _counts(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns how often each byte follows each, (256, 256)."""
    return np.bincount(BYTES * before + after, minlength=BYTES**2).reshape(BYTES, BYTES)


def _score(
    counts: npt.NDArray[np.int64], before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]
) -> dict[str, float]:
    odds = (counts + 1) / (counts + 1).sum(1, keepdims=True)
    loss = float(-np.log(odds[before, after]).mean())
    right = float((odds.argmax(1)[before] == after).mean())
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": right}


if __name__ == "__main__":
    main()
