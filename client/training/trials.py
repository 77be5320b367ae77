"""How a model's numbers are rounded on this machine: asked by passes of equal, made-up examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bract.client.training import gradients
from bract.client.training.bookkeeping import Loss
from bract.client.training.sizes import LEAST, Sizes, are_equal
from bract.shared.models import rounding

T = TypeVar("T")
Made = Callable[[int], tuple[list[Tensor], Tensor, Tensor]]


class NotedLoss:
    """A loss that can tell which answers it was asked about.

    Args:
        loss: of each example.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss, self._notes, self._answers = loss, False, torch.empty(0)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the losses."""
        if self._notes:
            self._answers = outputs.detach()
        return self._loss(outputs, targets)

    def noting(self, run: Callable[[], T]) -> tuple[Tensor, T]:
        """Returns the answers of a model in a pass, and what running it gives."""
        self._notes = True
        try:
            found = run()
            return self._answers, found
        finally:
            self._notes, self._answers = False, torch.empty(0)


class Trials:
    """Passes at made-up weights: a server's may be such that every kernel gives the same.

    Args:
        summer: what adds the gradients of a pass up, clipped.
        loss: the summer's.
        parameters: those that are summed, by name.
        made: returns made-up weights for them, and inputs and targets of so many equal examples.
    """

    def __init__(
        self, summer: Any, loss: NotedLoss, parameters: Mapping[str, nn.Parameter], made: Made
    ) -> None:
        self._summer, self._loss, self._made = summer, loss, made
        self._parameters = dict(parameters)
        self._device = next(iter(self._parameters.values())).device

    @cached_property
    def uneven(self) -> bool:
        """Whether an operation of a pass rounds by the place of a number."""
        return self._device.type == "cpu" and not rounding.is_even(lambda: self._added(LEAST))

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes that passes may have."""
        return Sizes(self._mean, self._is_even, rounding.UNIT if self.uneven else 1)

    def _mean(self, size: int, counted: Tensor | None = None) -> list[Tensor]:
        """Returns the mean clipped gradient of equal examples, or of those that count."""
        with rounding.one_thread(self.uneven):
            sums = self._added(size, counted)
        number = size if counted is None else int(counted.sum())
        return [total / number for total in sums]

    def _is_even(self, size: int) -> bool:
        """Returns whether equal examples have equal answers and gradients in one pass.

        Every second one is looked at apart, and every one of the second half: what differs at an
        end, or wherever a pass is cut, is in more of some than of others.
        """
        if size == 1:
            return True
        answers, mean = self._loss.noting(lambda: self._mean(size))
        if not answers.isfinite().all() or not are_equal(mean, mean):
            return True  # such numbers prove nothing
        rows = torch.arange(size, device=self._device)
        some = (rows % 2 == 1, rows >= size // 2)
        return torch.equal(answers, answers[:1].expand_as(answers)) and all(
            are_equal(self._mean(size, counted), mean) for counted in some
        )

    def _added(self, size: int, counted: Tensor | None = None) -> list[Tensor]:
        sums = gradients.zeros(self._parameters)
        with self._on_trial(size) as (inputs, targets):
            self._summer.add_(sums, inputs, targets, *([] if counted is None else [counted]))
        return list(sums.values())

    @contextmanager
    def _on_trial(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        weights, inputs, targets = self._made(size)
        parameters = list(self._parameters.values())
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            load(parameters, weights)
            yield inputs, targets
        finally:
            load(parameters, kept)


@torch.no_grad()
def load(parameters: Iterable[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Sets parameters to values, wherever they are."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
