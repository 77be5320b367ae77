"""Sums of clipped per-example gradients, in the ways that a site may choose from.

All give the same sum of g_i · min(1, C' / ‖g_i‖) with C' = C·(1 − 1e-3). An example enters the sum
by the very numbers whose norm was taken: a second backward pass rounds differently, and where
weights cancel (a server may choose them so) what it adds can exceed C by any factor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from bract.client.training.bookkeeping import BookKeepingSum, GhostSum, Loss
from bract.client.training.clipping import clip_factors, joint_norms, row_norms, weighted_sum
from bract.client.training.embeddings import without_padding
from bract.shared.errors import UsageError
from bract.shared.models import released_parameters
from bract.shared.models.layout import Layout

Mode = Literal["book-keeping", "opacus-hooks", "opacus-ghost"]
Precision = Literal["float32", "bfloat16"]


class ClippedSum(Protocol):
    """Adds the clipped gradients of one physical batch to per-parameter sums."""

    def add_(
        self,
        sums: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        counted: Tensor | None = None,
    ) -> None:
        """Adds in place; `inputs` has its examples on the first axis, at least one.

        `counted` tells, in booleans, which of them add anything; None: all.
        """


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Silences torch's note that the inputs of a model, being data, ask for no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def zeros(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns sums to add to, float64, by the names of parameters that are on one device."""
    sizes = [p.numel() for p in parameters.values()]
    device = next((p.device for p in parameters.values()), None)
    flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    pieces = zip(parameters.items(), torch.split(flat, sizes), strict=True)
    return {name: piece.view(p.shape) for (name, p), piece in pieces}


class SampleModule(GradSampleModule):  # type: ignore[misc]
    """Opacus' module, whose sampler of an embedding leaves its padding out as autograd does."""

    def capture_backprops_hook(
        self, module: Any, inputs: Any, outputs: tuple[Tensor, ...], **options: Any
    ) -> None:
        """Computes gradients for every example at one layer."""
        if isinstance(module, nn.Embedding):
            tokens: Tensor = module.activations[-1][0]  # type: ignore[index]  # Opacus' own list
            outputs = (without_padding(module, tokens, outputs[0]),)
        super().capture_backprops_hook(module, inputs, outputs, **options)


class HooksSum:
    """Opacus' hooks: a gradient for every example is stored, its norm taken directly."""

    def __init__(self, model: nn.Module, loss: Loss, clip_norm: float) -> None:
        self._module = SampleModule(model, loss_reduction="sum")
        self._parameters = released_parameters(model)
        self._loss, self._clip_norm = loss, clip_norm

    def add_(
        self,
        sums: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        counted: Tensor | None = None,
    ) -> None:
        """Adds the clipped gradients of a physical batch."""
        _reset(self._module)
        torch.autograd.backward([self._loss(self._module(inputs), targets).sum()])
        samples = {name: _samples(name, p) for name, p in self._parameters.items()}
        norms = joint_norms([row_norms(gradients) for gradients in samples.values()])
        factors = clip_factors(norms, self._clip_norm)
        if counted is not None:
            factors = torch.where(counted, factors, 0.0)
        for name, gradients in samples.items():
            sums[name] += weighted_sum(factors, gradients)
        _reset(self._module)


class PlainSum:
    """The sum without clipping, for the mechanism 'none'."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model, self._parameters, self._loss = model, released_parameters(model), loss
        self._layout = Layout(model)

    def add_(self, sums: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
        """Adds the gradients of a physical batch."""
        for name, gradient in self.gradients(inputs, targets).items():
            sums[name] += gradient

    def gradients(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Returns the sum of a physical batch by itself, as autograd forms it."""
        found = self._layout.run(lambda lying: self._pass(lying, targets), inputs)
        return dict(zip(self._parameters, found, strict=True))

    def _pass(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        total = self._loss(self._model(inputs), targets).sum()
        return torch.autograd.grad(total, list(self._parameters.values()))


def clipped_sum(
    mode: Mode, model: nn.Module, loss: Loss, clip_norm: float, precision: Precision = "float32"
) -> ClippedSum:
    """Returns the way to sum that a site chose; the choice cannot change privacy.

    Raises:
        UsageError: where that mode does not know the precision.
    """
    if mode == "book-keeping":
        return BookKeepingSum(model, loss, clip_norm, halves=precision == "bfloat16")
    if precision != "float32":
        raise UsageError(f"precision {precision} needs the mode book-keeping, not {mode}")
    kind = GhostSum if mode == "opacus-ghost" else HooksSum
    return kind(model, loss, clip_norm)


def _samples(name: str, parameter: nn.Parameter) -> Tensor:
    samples = parameter.grad_sample  # type: ignore[attr-defined]
    if not isinstance(samples, Tensor):
        raise RuntimeError(f"no per-example gradient reached {name}")
    return samples


def _reset(module: GradSampleModule) -> None:
    """Clears what a pass leaves behind; one that was cut off, by lack of memory, leaves much."""
    for layer in module.modules():
        layer.__dict__.pop("activations", None)
        layer.__dict__.pop("max_batch_len", None)
    for parameter in module.parameters():
        parameter.__dict__.pop("_current_grad_sample", None)
        parameter.grad = parameter.grad_sample = None
        parameter._forward_counter = 0
