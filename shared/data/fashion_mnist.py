"""Fashion-MNIST: 60,000 + 10,000 images of clothing, 28×28 bytes (Xiao, Rasul & Vollgraf 2017)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bract.shared.data.examples import Examples, Splits
from bract.shared.data.locations import Source, content, located

VALIDATION = 2_000

SOURCE = Source(
    name="fashion-mnist",
    base="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    sha256={
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
)


def load_fashion_mnist(folder: Path | None = None) -> Splits:
    """Returns 60,000 training images, and of the public 10,000 the first 2,000 as validation.

    So that all 60,000 can lie at sites; the test accuracy is over the other 8,000.

    Args:
        folder: holds the four idx files, gzipped or not; found or downloaded where it is None.

    Raises:
        UsageError: where a file is missing or is not the published one.
    """
    train = load_training_images(folder)
    validation, test = load_public_images(folder)
    return Splits(train=train, validation=validation, test=test)


def load_training_images(folder: Path | None = None) -> Examples:
    """Returns the 60,000 training images; the public files are not opened."""
    return _examples(folder, "train")


def load_public_images(folder: Path | None = None) -> tuple[Examples, Examples]:
    """Returns the validation and test images; the training files are not opened."""
    public = _examples(folder, "t10k")
    rows = np.arange(len(public))
    return public.take(rows[:VALIDATION]), public.take(rows[VALIDATION:])


def _examples(folder: Path | None, part: str) -> Examples:
    folder = located(SOURCE) if folder is None else folder
    return Examples(
        inputs=_idx(folder, f"{part}-images-idx3-ubyte")[:, None],
        targets=_idx(folder, f"{part}-labels-idx1-ubyte").astype(np.int64),
    )


def _idx(folder: Path, name: str) -> np.ndarray:
    """Returns the array of an idx file: two zero bytes, a type, the rank, the sides, the data."""
    found = content(SOURCE, folder, name)
    rank = found[3]
    sides = np.frombuffer(found, dtype=">u4", count=rank, offset=4).astype(int)
    return np.frombuffer(found, dtype=np.uint8, offset=4 + 4 * rank).reshape(tuple(sides))
