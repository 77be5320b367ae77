"""Does one example of a batch touch the numbers of another? Asked of batches that are made up.

A test and no proof: what mixes in larger batches alone, or for examples unlike all that are tried
here, is not found.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bract.client.training import gradients
from bract.client.training.gradients import Mode
from bract.shared import tasks
from bract.shared.errors import ModelRejected
from bract.shared.models import released_parameters
from bract.shared.terms import DataTerms

# Trained weights stay far below it. Public, so that refusing tells nothing.
GREATEST_WEIGHT = 1e3
TIMES = 9  # so many copies of a few examples make a large batch
_SOME = 2  # and so many a smaller one, for the passes of which there are many
_TOLERANCE = 1e-4
_Found = tuple[Tensor, list[Tensor]]
_MODES: tuple[Mode, ...] = ("book-keeping", "opacus-hooks")


class Passes:
    """Sums over made-up batches, formed from a copy of a model as private training forms them.

    No gradient is clipped, which would hide that all of them shrink together; those that are not
    finite are left out, as in training.

    Args:
        model: in training.
        data: what an example looks like, and what is learned of it.
    """

    def __init__(self, model: nn.Module, data: DataTerms) -> None:
        self._model, self._task = model, data.task
        self._modes = list(_MODES)
        self._begin()

    def are_as_alone(self, inputs: Tensor, targets: Tensor, alone: Tensor) -> bool:
        """Whether many examples have the sum of their gradients alone, of which these are rows."""
        inputs, targets = (torch.cat([side] * TIMES) for side in (inputs, targets))
        _, sums = self._of(inputs, targets, torch.ones(len(inputs), dtype=torch.bool))
        found = torch.cat(sums, 1)[0]
        alone = TIMES * alone.double()
        bound = _TOLERANCE * float(alone.norm(dim=1).sum()) + 1e-6
        return float((found - alone.sum(0)).norm()) <= bound

    def check_others_stay(self, inputs: Tensor, targets: Tensor, data: DataTerms) -> None:
        """Returns where no example was found to touch the answers or the sum of the others.

        Batches of one size that differ in one example are compared: no kernel makes a difference.

        Raises:
            ModelRejected: naming what the example was.
        """
        inputs, targets = (torch.cat([side] * _SOME) for side in (inputs, targets))
        row = len(inputs) // 2
        others = torch.arange(len(inputs)) != row
        odd = _odd(inputs[row], data)
        self._check_by(odd, inputs, targets, others)
        with torch.no_grad():  # such weights as a server may send at the most
            for parameter in self._parameters.values():
                parameter.mul_(GREATEST_WEIGHT).clamp_(-GREATEST_WEIGHT, GREATEST_WEIGHT)
        self._check_by(odd[::2], inputs, targets, others)

    def _check_by(
        self, odd: Sequence[tuple[str, Tensor]], inputs: Tensor, targets: Tensor, others: Tensor
    ) -> None:
        answers, sums = self._of(inputs, targets, others)
        for kind, example in odd:
            changed = torch.where(others.view(-1, *[1] * example.dim()), inputs, example)
            try:
                found, after = self._of(changed, targets, others)
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise ModelRejected(f"fails where an example {kind}: {reason}") from error
            pairs = [(found[others], answers[others]), *zip(after, sums, strict=True)]
            if not all(_same(one, other) for one, other in pairs):
                raise ModelRejected(
                    f"mixes examples of one batch: where one of them {kind}, the answers to the "
                    "others or their gradients are no longer the same; remove what runs over the "
                    "batch axis"
                )

    def _of(self, inputs: Tensor, targets: Tensor, counted: Tensor) -> _Found:
        """Returns the answers to all examples, and a row for each sum over those counted."""
        try:
            return self._pass(inputs, targets, counted)
        except NotImplementedError:
            if len(self._modes) == 1:
                raise
            self._modes.pop(0)  # a mode that does not take this model: asked in the next
            self._begin()
            return self._pass(inputs, targets, counted)

    def _begin(self) -> None:
        model = copy.deepcopy(self._model)
        self._parameters = released_parameters(model)
        self._summer = gradients.clipped_sum(
            self._modes[0], model, self._losses, math.inf, "float32"
        )

    def _pass(self, inputs: Tensor, targets: Tensor, counted: Tensor) -> _Found:
        sums = gradients.zeros(self._parameters)
        with gradients.expected_warnings():
            self._summer.add_(sums, inputs, targets, counted)
        return self._answers, [total.reshape(1, -1) for total in sums.values()]

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._answers = outputs.detach()
        return tasks.losses(outputs, targets, self._task)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether rows agree to float32's rounding, by their norms: that is what clipping sees."""
    bound = _TOLERANCE * other.norm(dim=1) + 1e-6
    return bool(((one - other).norm(dim=1) <= bound).all())


def _odd(example: Tensor, data: DataTerms) -> list[tuple[str, Tensor]]:
    """Returns examples such as guards of a model look out for, and what is said of each."""
    if data.vocabulary is not None:
        other = (example + 1) % data.vocabulary
        return [("has other tokens", other), ("has one token alone", torch.zeros_like(example))]
    infinite = example.clone()
    infinite.view(-1)[infinite.numel() // 2] = torch.inf
    return [
        ("is a million times as large", -1e6 * example),
        ("holds an infinite number", infinite),
        ("holds what is no number", torch.full_like(example, torch.nan)),
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether rows of numbers agree, each by its own scale; what is not finite in both agrees."""
    one, other = (rows.flatten(1).double() for rows in (one, other))
    finite = other.isfinite()
    if not torch.equal(finite, one.isfinite()):
        return False
    return close(torch.where(finite, one, 0.0), torch.where(finite, other, 0.0))
