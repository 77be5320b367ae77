"""Sums of clipped per-example gradients, by Opacus' per-example machinery.

Both ways give the same sum of g_i · min(1, C' / ‖g_i‖) with C' = C·(1 − 1e-3). An example enters
the sum by the very numbers whose norm was taken: a second backward pass rounds differently, and
where weights cancel (a server may choose them so) what it adds can exceed C by any factor. Norms,
factors and sums are float64, so that what one example changes is not lost in the others' rounding.

An example whose gradient is not finite contributes nothing: its row is taken out, since
0 · NaN would poison the sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from opacus.grad_sample import GradSampleModule
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
    """Returns min(1, C(1 − 1e-3) / norm) by example, float64; 0 where the norm is not finite."""
    factors = (clip_norm * (1 - SLACK) / norms.double()).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


class HooksSum:
    """Opacus' hooks: a gradient for every example is stored, its norm taken directly."""

    def __init__(self, model: nn.Module, loss: Loss, clip_norm: float) -> None:
        self._module = GradSampleModule(model, loss_reduction="sum")
        self._parameters = _released(model)
        self._loss, self._clip_norm = loss, clip_norm

    def add_(self, sums: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
        """Adds the clipped gradients of a physical batch."""
        _reset(self._module)
        _backward(self._loss(self._module(inputs), targets).sum())
        samples = {name: _samples(name, p) for name, p in self._parameters.items()}
        norms = _joint([_norms(gradients) for gradients in samples.values()])
        factors = clip_factors(norms, self._clip_norm)
        for name, gradients in samples.items():
            sums[name] += _weighted_sum(factors, gradients)
        _reset(self._module)


class _GhostModule(GradSampleModule):  # type: ignore[misc]
    """Opacus' module, which keeps a dense layer's two factors in place of its gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, loss_reduction="sum")
        self.factors: list[tuple[nn.Linear, Tensor, Tensor]] = []
        dense = [layer for layer in model.modules() if type(layer) is nn.Linear]
        self._dense = {id(p) for layer in dense for p in layer.parameters()}

    def capture_activations_hook(self, module: nn.Module, *rest: Any) -> None:
        """Keeps the inputs of a layer; refuses a second use, whose cross terms would be lost."""
        super().capture_activations_hook(module, *rest)
        for parameter in module.parameters():
            if id(parameter) in self._dense and getattr(parameter, "_forward_counter", 0) > 1:
                raise NotImplementedError(
                    "opacus-ghost takes no dense layer whose parameter is used twice: "
                    "use the mode opacus-hooks"
                )

    def capture_backprops_hook(
        self, module: nn.Module, inputs: Any, outputs: Any, **options: Any
    ) -> None:
        """Keeps (layer, activations, output gradients) of a dense layer."""
        if type(module) is not nn.Linear:
            super().capture_backprops_hook(module, inputs, outputs, **options)
            return
        activations, backprops = self.rearrange_grad_samples(
            module=module, backprops=outputs[0].detach(), **options
        )
        self.factors.append((module, activations[0].to(backprops.dtype), backprops))


class GhostSum:
    """Ghost clipping of dense layers in one backward pass; other layers are as with hooks.

    Norms: Li, Tramèr, Liang & Hashimoto 2022 (arXiv 2110.05679). Sums from the kept factors, with
    no second backward pass: Bu, Wang, Zha & Karypis 2023 (arXiv 2210.00038).
    """

    def __init__(self, model: nn.Module, loss: Loss, clip_norm: float) -> None:
        self._module = _GhostModule(model)
        self._parameters = _released(model)
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._loss, self._clip_norm = loss, clip_norm

    def add_(self, sums: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> None:
        """Adds the clipped gradients of a physical batch."""
        self._reset()
        _backward(self._loss(self._module(inputs), targets).sum())
        ghosts = self._module.factors
        dense = {id(p) for layer, _, _ in ghosts for p in layer.parameters()}
        samples = {n: _samples(n, p) for n, p in self._parameters.items() if id(p) not in dense}
        norms = [_norms(gradients) for gradients in samples.values()]
        norms += [norm for ghost in ghosts for norm in _dense_norms(*ghost)]
        factors = clip_factors(_joint(norms), self._clip_norm)
        for name, gradients in samples.items():
            sums[name] += _weighted_sum(factors, gradients)
        for ghost in ghosts:
            for parameter, value in _dense_sums(factors, *ghost).items():
                sums[self._names[id(parameter)]] += value
        self._reset()

    def _reset(self) -> None:
        self._module.factors.clear()
        _reset(self._module)


def _dense_norms(layer: nn.Linear, activations: Tensor, backprops: Tensor) -> list[Tensor]:
    """Returns ‖g_i‖ for weight and bias: ‖output gradient‖ · ‖activation‖ without a sequence axis.

    With one, a Gram sum may cancel and report a norm below the true one, so the gradient is
    formed, its norm taken directly, and the gradient dropped.
    """
    if backprops.dim() > 2:
        return [_norms(g) for g in _dense_samples(layer, activations, backprops).values()]
    outer = _norms(backprops)
    norms = [outer * _norms(activations)] if layer.weight.requires_grad else []
    return [*norms, outer] if _has_bias(layer) else norms


def _dense_sums(
    factors: Tensor, layer: nn.Linear, activations: Tensor, backprops: Tensor
) -> dict[Tensor, Tensor]:
    """Returns Σ f_i·g_i for weight and bias, from what `_dense_norms` measured."""
    if backprops.dim() > 2:
        samples = _dense_samples(layer, activations, backprops)
        return {p: _weighted_sum(factors, g) for p, g in samples.items()}
    weighted = factors[:, None] * _without_dropped(factors, backprops)
    sums: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        sums[layer.weight] = weighted.T @ _without_dropped(factors, activations)
    if _has_bias(layer):
        sums[layer.bias] = weighted.sum(0)
    return sums


def _dense_samples(
    layer: nn.Linear, activations: Tensor, backprops: Tensor
) -> dict[Tensor, Tensor]:
    return dict(compute_linear_grad_sample(layer, [activations], backprops))


def _has_bias(layer: nn.Linear) -> bool:
    return isinstance(layer.bias, nn.Parameter) and layer.bias.requires_grad


def _norms(gradients: Tensor) -> Tensor:
    """Returns the norm of each row; in float64, since a square may overflow float32."""
    rows = gradients.reshape(len(gradients), -1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms


def _joint(norms: list[Tensor]) -> Tensor:
    """Returns the norm of each example over all parameters."""
    joint: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return joint


def _weighted_sum(factors: Tensor, gradients: Tensor) -> Tensor:
    """Returns Σ f_i·g_i in float64."""
    total: Tensor = torch.tensordot(factors, _without_dropped(factors, gradients), dims=1)
    return total


def _without_dropped(factors: Tensor, rows: Tensor) -> Tensor:
    """Returns the rows in float64, zeros where the factor is 0: the row may hold NaN."""
    kept = (factors > 0).view(-1, *[1] * (rows.dim() - 1))
    return torch.where(kept, rows.double(), 0.0)


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


def _backward(loss: Tensor) -> None:
    torch.autograd.backward([loss])


def _released(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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
