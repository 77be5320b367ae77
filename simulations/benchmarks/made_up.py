"""Made-up images of Fashion-MNIST's shape, shared by benchmarks; they lie on disk.

The folder that `lay_out` fills is all that a run needs, and no run reads more of it than the rows
it trains on.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from torch import nn

from bract.shared.data.examples import Examples
from bract.shared.terms import DataTerms
from bract.simulations.benchmarks.rivals import networks

DATA = "bract.simulations.benchmarks.made_up:images"
CNN = "bract.simulations.benchmarks.made_up:cnn"
SMALL_CNN = "bract.simulations.benchmarks.made_up:small_cnn"

SHAPE, CLASSES = (1, 28, 28), networks.CLASSES
_PUBLIC = 64  # validation and test examples: so few that scoring them costs nothing
_CHUNK = 1 << 14


@dataclass(frozen=True, slots=True)
class Images:
    """Images in a folder; see `bract.shared.data.own.OwnData`."""

    terms: DataTerms

    def train(self, folder: Path | None) -> Examples:
        """Returns the training examples, whose images are read when they are taken."""
        return _read(folder, "train")

    def public(self, folder: Path | None) -> tuple[Examples, Examples]:
        """Returns the same few images as validation and as test."""
        return _read(folder, "public"), _read(folder, "public")

    def part(self, folder: Path | None, part: str) -> Examples:
        """Returns the training examples, whatever the part."""
        return _read(folder, "train")


def images() -> Images:
    """Returns the data set."""
    return Images(
        DataTerms(name="made-up", shape=SHAPE, classes=CLASSES, offset=72.94, scale=90.02)
    )


def cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Returns the model of 225,034 parameters."""
    return networks.cnn()


def small_cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Returns the model of 26,010 parameters."""
    return networks.small_cnn()


def lay_out(folder: Path, examples: int) -> None:
    """Writes so many training images, and a few public ones, into a folder."""
    generator = np.random.default_rng(0)  # made up: no secret
    for name, count in (("train", examples), ("public", _PUBLIC)):
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *SHAPE)}
        with (folder / f"{name}-inputs.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, count, _CHUNK):
                shape = (min(_CHUNK, count - start), *SHAPE)
                file.write(generator.integers(0, 256, shape, dtype=np.uint8).tobytes())
        np.save(folder / f"{name}-targets.npy", generator.integers(0, CLASSES, count))


class _Rows:
    """Rows of a mapped file, let go as soon as they are copied.

    Else the whole neighbourhood of every row that was ever read would count as this process's.
    """

    def __init__(self, path: Path) -> None:
        whole = np.load(path, mmap_mode="r")
        self.shape, self.dtype, self.ndim = whole.shape, whole.dtype, whole.ndim
        with path.open("rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._rows = np.frombuffer(self._file, self.dtype, offset=len(self._file) - whole.nbytes)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rows_of_file = self._rows.reshape(self.shape)
        found: np.ndarray = np.require(rows_of_file[rows], requirements="W")  # no view of the file
        self._file.madvise(mmap.MADV_DONTNEED)
        return found


def _read(folder: Path | None, name: str) -> Examples:
    if folder is None:
        raise ValueError("made-up images need the folder that lay_out filled")
    return Examples(
        inputs=cast(np.ndarray, _Rows(folder / f"{name}-inputs.npy")),
        targets=np.load(folder / f"{name}-targets.npy"),
    )
