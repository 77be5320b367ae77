"""Several random views of one example in one private step: it is clipped once, as one example.

De, Berrada, Hayes, Smith & Balle 2022 (arXiv 2204.13650): the loss of an example is the mean over
its views. Every layer is used once a view, and its uses are added up before the norm is taken, so
one example still adds at most C. What is drawn for an example depends on no other's content.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bract.client.training.bookkeeping import Loss
from bract.client.training.randomness import RandomStream
from bract.shared.terms import TrainingTerms

REACH = 8  # shifts go up to a side's eighth


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """How each view of each example is moved: down and right in pixels, and whether mirrored."""

    down: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    mirrored: npt.NDArray[np.bool_]

    def take(self, part: slice | npt.NDArray[np.int64]) -> Moves:
        """Returns the moves of some examples."""
        return Moves(self.down[part], self.right[part], self.mirrored[part])


def draw(
    training: TrainingTerms, shape: tuple[int, ...], count: int, stream: RandomStream
) -> Moves | None:
    """Returns the moves of `count` examples, each of (count, views); None where none are asked.

    Nothing is drawn then, so that a step without views is what it always was.
    """
    if training.augmentation == "none":
        return None
    words = stream.words(3 * count * training.views).reshape(3, count, training.views)
    down, right = (
        _up_to(side // REACH, drawn) for side, drawn in zip(shape[1:], words[:2], strict=True)
    )
    mirrored = (words[2] >> np.uint64(63)).astype(bool) & (training.augmentation == "shift-flip")
    return Moves(down, right, mirrored)


def _up_to(reach: int, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Returns whole numbers from −reach to reach; even to 2⁻⁵⁰."""
    return (words % np.uint64(2 * reach + 1)).astype(np.int64) - reach


def moved(images: np.ndarray, moves: Moves) -> np.ndarray:
    """Returns (examples, views, channels, height, width): zeros come in where a view is moved out.

    Args:
        images: (examples, channels, height, width), before they are normalised.
        moves: of these examples.
    """
    rows, right = _places(images.shape[2], moves.down)
    columns, inside = _places(images.shape[3], moves.right)
    columns = np.where(moves.mirrored[..., None], columns[..., ::-1], columns)
    inside = np.where(moves.mirrored[..., None], inside[..., ::-1], inside)
    examples = np.arange(len(images))[:, None, None, None]
    found = images[examples, :, rows[..., :, None], columns[..., None, :]]
    kept = right[..., :, None, None] & inside[..., None, :, None]
    views = np.moveaxis(np.where(kept, found, np.zeros((), images.dtype)), -1, 2)
    # Axes in memory in their order, an axis of one channel too: Opacus' samplers rely on it.
    return np.array(views, order="C")


def _places(
    side: int, shift: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Returns where each pixel of a side comes from, and whether that lies within the image."""
    place = np.arange(side) - shift[..., None]
    return place.clip(0, side - 1), (place >= 0) & (place < side)


class Viewed(nn.Module):
    """A model that answers all views of an example: (examples, views, …) in and out.

    Args:
        model: sees one view of each example at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the answers, (examples, views, …)."""
        return torch.stack([self.model(view.contiguous()) for view in inputs.unbind(1)], 1)


def mean_loss(loss: Loss) -> Loss:
    """Returns the loss of an example with views: the mean over them."""

    def over_views(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([loss(view, targets) for view in outputs.unbind(1)], 1).mean(1)

    return over_views
