"""Handwritten digits that ship with scikit-learn: 1,797 images of 8×8, values 0 to 16."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bract.shared.data.examples import Examples, Splits

TEST, VALIDATION = 360, 137


def load_digits(folder: Path | None = None) -> Splits:
    """Returns 1,300 training, 137 validation and 360 test images, by one fixed shuffle.

    Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits; `folder` is not needed.
    """
    from sklearn.datasets import load_digits as read  # slow to import

    bundle = read()
    order = np.random.default_rng(1797).permutation(len(bundle.target))  # public, fixed split
    everything = Examples(
        inputs=bundle.images.astype(np.uint8)[:, None],
        targets=bundle.target.astype(np.int64),
    ).take(order)
    rows = np.arange(len(everything))
    return Splits(
        test=everything.take(rows[:TEST]),
        validation=everything.take(rows[TEST : TEST + VALIDATION]),
        train=everything.take(rows[TEST + VALIDATION :]),
    )
