"""Sums of clipped per-example gradients, by Opacus' per-example machinery.

Both ways give the same sum of g_i · min(1, C' / ‖g_i‖) with C' = C·(1 − 1e-3): the slack pays for
the rounding of float32, so that the realised norm never passes C.

An example whose gradient is not finite contributes nothing: its row is taken out, since
0 · NaN would poison the sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, Protocol

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.grad_sample.linear import compute_linear_grad_sample
from torch import Tensor, nn

SLACK = 1e-3
Mode = Literal["opacus-hooks", "opacus-ghost"]
Loss = Callable[[Tensor, Tensor], Tensor]


class ClippedSum(Protocol):
    """Adds the clipped gradients of one physical batch to per-parameter sums."""

    def add_(self, sums: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
        """Adds in place; `inputs` has its examples on the first axis, at least one."""


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Silences torch's note that the inputs of a model, being data, ask for no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """Returns min(1, C(1 − 1e-3) / norm) by example; 0 where the norm is too large or no number."""
    factors = (clip_norm * (1 - SLACK) / norms).clamp(max=1.0)
    # A subnormal factor has lost its precision: its product could pass C.
    usable = torch.isfinite(norms) & (factors >= torch.finfo(torch.float32).tiny)
    return torch.where(usable, factors, torch.zeros_like(factors))


class HooksSum:
    """Opacus' hooks: a gradient for every example is stored, its norm taken directly."""

    def __init__(self, model: nn.Module, loss: Loss, clip_norm: float) -> None:
        self._module = GradSampleModule(model, loss_reduction="sum")
        self._parameters = _released(model)
        self._loss, self._clip_norm = loss, clip_norm

    def add_(self, sums: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
        """Adds the clipped gradients of a physical batch."""
        self._clear()
        _backward(self._loss(self._module(inputs), targets).sum())
        samples = {name: _samples(p) for name, p in self._parameters.items()}
        # float64: a square that overflows float32 is still clipped, not lost
        squares = [
            torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64).square()
            for g in samples.values()
        ]
        norms = torch.stack(squares).sum(0).sqrt()
        keep = torch.isfinite(norms)
        factors = clip_factors(norms, self._clip_norm).to(torch.float32)
        for name, gradient in samples.items():
            rows = keep.view(-1, *[1] * (gradient.dim() - 1))
            finite = gradient if bool(keep.all()) else torch.where(rows, gradient, 0.0)
            sums[name] += torch.tensordot(factors, finite, dims=1)
        self._clear()

    def _clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]


def _linear_norms(
    layer: nn.Linear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Returns ‖g_i‖ for weight and bias: ‖output gradient‖ · ‖activation‖ without a sequence axis.

    With one, Opacus' Gram sum may cancel and report a norm below the true one, so the gradient is
    formed and its norm taken directly.
    """
    if backprops.dim() == 2:
        outer = torch.linalg.vector_norm(backprops, dim=1, dtype=torch.float64)
        inner = torch.linalg.vector_norm(activations[0], dim=1, dtype=torch.float64)
        norms = {layer.weight: outer * inner}
        if isinstance(layer.bias, nn.Parameter):
            norms[layer.bias] = outer
    else:
        samples = compute_linear_grad_sample(layer, activations, backprops)
        norms = {
            p: torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64)
            for p, g in samples.items()
            if isinstance(p, nn.Parameter)
        }
    return {p: n for p, n in norms.items() if p.requires_grad}


class _GhostModule(GradSampleModuleFastGradientClipping):  # type: ignore[misc]
    """Opacus' module with norms that never cancel; layers not listed take the direct norm."""

    NORM_SAMPLERS: ClassVar[dict[type[nn.Module], Callable[..., dict[nn.Parameter, Tensor]]]] = {
        nn.Linear: _linear_norms
    }


class GhostSum:
    """Ghost clipping: norms in one backward pass, one weighted sum in a second.

    Li, Tramèr, Liang & Hashimoto 2022 (arXiv 2110.05679).
    """

    def __init__(self, model: nn.Module, loss: Loss, clip_norm: float) -> None:
        self._module = _GhostModule(
            model, loss_reduction="sum", max_grad_norm=clip_norm, use_ghost_clipping=True
        )
        self._parameters = _released(model)
        self._loss, self._clip_norm = loss, clip_norm

    def add_(self, sums: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
        """Adds the clipped gradients of a physical batch."""
        losses, norms = self._norms(inputs, targets)
        keep = torch.isfinite(norms)
        if not bool(keep.all()):
            # The second pass mixes examples in one matrix product: 0 · NaN would reach them all.
            inputs, targets = inputs[keep], targets[keep]
            if len(inputs) == 0:
                return
            losses, norms = self._norms(inputs, targets)
        factors = clip_factors(norms, self._clip_norm).to(losses.dtype)
        self._module.disable_hooks()
        self._clear()
        _backward((factors * losses).sum())
        self._module.enable_hooks()
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RuntimeError(f"no gradient reached {name}")
            sums[name] += parameter.grad
        self._clear()

    def _norms(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = self._loss(self._module(inputs), targets)
        _backward(losses.sum(), retain_graph=True)
        squares = [
            p._norm_sample.double().square()  # type: ignore[attr-defined]
            for p in self._parameters.values()
        ]
        return losses, torch.stack(squares).sum(0).sqrt()

    def _clear(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


class PlainSum:
    """The sum without clipping, for the mechanism 'none'."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model, self._parameters, self._loss = model, _released(model), loss

    def add_(self, sums: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
        """Adds the gradients of a physical batch."""
        values = list(self._parameters.values())
        total = self._loss(self._model(inputs), targets).sum()
        for name, gradient in zip(
            self._parameters, torch.autograd.grad(total, values), strict=True
        ):
            sums[name] += gradient


def clipped_sum(mode: Mode, model: nn.Module, loss: Loss, clip_norm: float) -> ClippedSum:
    """Returns the way to sum that a site chose; the choice cannot change privacy."""
    if mode == "opacus-ghost":
        return GhostSum(model, loss, clip_norm)
    return HooksSum(model, loss, clip_norm)


def _backward(loss: Tensor, *, retain_graph: bool = False) -> None:
    torch.autograd.backward([loss], retain_graph=retain_graph)


def _released(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _samples(parameter: nn.Parameter) -> Tensor:
    samples = parameter.grad_sample  # type: ignore[attr-defined]
    if not isinstance(samples, Tensor):
        raise RuntimeError("per-example gradients were accumulated over batches")
    return samples
