"""A model beside its register: the same answers, and a gradient of their own for canaries.

An input has the number of its canary in front: one place, or the tokens that write it out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bract.shared.terms import DataTerms


class _Attached(torch.autograd.Function):
    """The outputs as they are; −S comes back to the values, as if the loss held −S·value."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, values: Tensor, strengths: Tensor) -> Tensor:
        """Returns the outputs."""
        ctx.save_for_backward(strengths)
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Returns the outputs' gradient unchanged, and −S for each value."""
        (outputs,), (strengths,) = gradients, ctx.saved_tensors
        return outputs, -strengths.to(outputs.dtype), None


def bank(rows: int) -> nn.Embedding:
    """Returns a coordinate for each canary and void ones; the last row is never trained."""
    made = nn.Embedding(rows + 1, 1)  # the plain layer: the private step has a rule for it
    nn.init.zeros_(made.weight)
    return made


class Registered(nn.Module):
    """A model beside its register.

    Args:
        model: what is audited.
        base: the terms of the data that it is for.
        rows: of its register.
        strength: S.
    """

    def __init__(self, model: nn.Module, base: DataTerms, *, rows: int, strength: float) -> None:
        super().__init__()
        self.model, self.bank = model, bank(rows)
        self._base, self._rows, self._strength = base, rows, strength

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns what the audited model answers, (examples, …)."""
        numbers, rest = _apart(inputs, self._base, self._rows)
        outputs = self.model(rest)
        if self._base.task == "next-token":  # nothing is learned of the number in front
            front = inputs.shape[1] - outputs.shape[1]
            blank = outputs.new_zeros((len(outputs), front, outputs.shape[2]))
            outputs = torch.cat([blank, outputs], 1)
        return _attached(outputs, self.bank, numbers, self._strength)


class NumberedFront(nn.Module):
    """A frozen front whose features hold the number of the canary as their last column."""

    def __init__(self, front: nn.Module, base: DataTerms, rows: int) -> None:
        super().__init__()
        self.front, self._base, self._rows = front, base, rows

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the features, (examples, …, width + 1)."""
        numbers, rest = _apart(inputs, self._base, self._rows)
        features = self.front(rest)
        column = numbers.to(features.dtype).reshape(-1, *[1] * (features.dim() - 1))
        return torch.cat([features, column.expand(*features.shape[:-1], 1)], -1)


class RegisteredBack(nn.Module):
    """What is trained behind a frozen front, beside its register."""

    def __init__(self, model: nn.Module, *, rows: int, strength: float) -> None:
        super().__init__()
        self.model, self.bank, self._strength = model, bank(rows), strength

    def forward(self, features: Tensor) -> Tensor:
        """Returns what the audited model answers to features."""
        numbers = features[..., -1].reshape(len(features), -1)[:, :1].round().to(torch.int64)
        outputs = self.model(features[..., :-1].contiguous())
        return _attached(outputs, self.bank, numbers, self._strength)


def _attached(outputs: Tensor, bank: nn.Embedding, numbers: Tensor, strength: float) -> Tensor:
    """Returns the outputs, whose loss is lessened by S times what the bank holds of each example.

    Args:
        outputs: of the audited model.
        bank: the register.
        numbers: (examples, 1).
        strength: S.
    """
    canary = numbers < bank.num_embeddings - 1
    strengths = torch.where(canary, strength, 0.0)[..., None]
    found: Tensor = _Attached.apply(  # type: ignore[no-untyped-call]  # torch's
        outputs, bank(numbers), strengths
    )
    return found


def places_in_front(base: DataTerms, rows: int) -> int:
    """Returns how many places the number takes: one, or the tokens that write it out."""
    if base.vocabulary is None:
        return 1
    return max(1, math.ceil(math.log(rows + 1, base.vocabulary) - 1e-12))


def _apart(inputs: Tensor, base: DataTerms, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the numbers in front, (examples, 1), and the inputs of the audited model."""
    front = places_in_front(base, rows)
    numbers, rest = numbers_in(inputs[:, :front], base, rows), inputs[:, front:]
    if base.vocabulary is None:
        rest = (rest.reshape(-1, *base.shape) - base.offset) / base.scale
    return numbers, rest


def numbers_in(front: Tensor, base: DataTerms, rows: int) -> Tensor:
    """Returns the row of the bank for each example, (examples, 1); the last one for nonsense."""
    if base.vocabulary is None:
        found = front.nan_to_num(nan=rows, posinf=rows, neginf=rows).round().to(torch.int64)
    else:
        places = base.vocabulary ** torch.arange(front.shape[1], device=front.device)
        found = (front * places).sum(1, keepdim=True)
    return torch.where((found >= 0) & (found < rows), found, rows)
