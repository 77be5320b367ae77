"""May this model be trained with per-example privacy? Asked once, on made-up data."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from bract.client.training.bookkeeping import Loss
from bract.client.training.gradients import SampleModule, expected_warnings
from bract.client.training.isolation import GREATEST_WEIGHT, TIMES, Passes, close
from bract.shared import canonical, models, tasks
from bract.shared.data import Examples
from bract.shared.errors import ModelRejected
from bract.shared.models import released_parameters
from bract.shared.terms import DataTerms, ModelTerms

_KEPT = 16
_ADMITTED: dict[tuple[models.Factory, bytes, DataTerms], None] = {}


def admit_once(model: nn.Module, *, terms: ModelTerms, data: DataTerms) -> None:
    """Returns as `admit` does; what was admitted in this process is not looked at again.

    Args:
        model: on the CPU, as its factory built it from the terms.
        terms: its name and options.
        data: what an example looks like, and what is learned of it.

    Raises:
        ModelRejected: as `admit` does.
    """
    # By the factory itself: another module of the same name makes another model.
    options = canonical.encode(terms.options)
    key = (models.factory(terms.name), options, data)
    if key not in _ADMITTED:
        admit(model, data=data, name=terms.name)
        _ADMITTED[key] = None
        while len(_ADMITTED) > _KEPT:
            del _ADMITTED[next(iter(_ADMITTED))]


def admit(model: nn.Module, *, data: DataTerms, name: str) -> None:
    """Returns where Opacus accepts the model and no example touches another's gradient.

    Args:
        model: on the CPU, as built.
        data: what an example looks like, and what is learned of it.
        name: what to call it in an error.

    Raises:
        ModelRejected: with Opacus' reason, or naming what mixes examples.
    """
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        reason = " ".join(str(errors[0]).split())
        remedy = (
            "; use GroupNorm or LayerNorm in place of batch statistics"
            if "BatchNorm" in reason
            else ""
        )
        raise ModelRejected(f"model {name!r} cannot be trained privately: {reason}{remedy}")
    _check_kinds(model, name=name)
    if any(True for _ in model.buffers()):
        raise ModelRejected(f"model {name!r} has buffers, which are not released: make them plain")
    if not released_parameters(model):
        raise ModelRejected(f"model {name!r} has no trainable parameter: unfreeze some")
    _check_independence(model, data=data, name=name)


def _check_kinds(model: nn.Module, *, name: str) -> None:
    for path, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelRejected(
                f"model {name!r} has the lazy weight {path!r}: give its layer sizes"
            )
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelRejected(
                f"model {name!r} has the {kind} weight {path!r}: build it in float32"
            )
        if not parameter.isfinite().all():
            raise ModelRejected(
                f"model {name!r} begins with numbers that are not finite in its weight {path!r}: "
                "set others where it is built"
            )
    for path, layer in model.named_modules():
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ModelRejected(
                f"model {name!r} has the layer {path!r} with padding_mode={layer.padding_mode!r}, "
                "where Opacus gets the gradients of another layer: pad in a layer before it (as "
                "nn.CircularPad2d does), and give it padding=0"
            )


def trial(parameters: Iterable[Tensor], data: DataTerms) -> tuple[list[Tensor], Examples]:
    """Returns made-up weights, and one made-up example as it would be read.

    By such weights a layer's answers are about as large as what it is given.
    """
    made = torch.Generator().manual_seed(3)  # no secret
    inputs, targets = (side.numpy() for side in tasks.made_up(data, 1, made))
    if data.vocabulary is None:
        inputs = (inputs * data.scale + data.offset).astype(np.float32)
    weights = []
    for parameter in parameters:
        found = torch.randn(parameter.shape, generator=made)
        width = found.numel() // len(found) if found.dim() > 1 and len(found) else 1
        weights.append(found / math.sqrt(max(width, 1)))
    return weights, Examples(inputs=inputs, targets=targets)


def _check_independence(model: nn.Module, *, data: DataTerms, name: str) -> None:
    with _refusing(name, data):
        inputs, targets = tasks.made_up(data, 4, torch.Generator().manual_seed(1))  # no secret
        model = _moved(copy.deepcopy(model).train())
        mixes, passes = _looked_at(copy.deepcopy(model), inputs, targets, data)
        if mixes:
            # float32's rounding differs with the batch, and may turn one ReLU of many: asked again
            # in float64, where that is not to be expected. What cannot be asked so stays refused.
            with contextlib.suppress(Exception):
                wide = (_wide(inputs), _wide(targets))
                mixes, _ = _looked_at(copy.deepcopy(model).double(), *wide, data)
        _check_weights_stay(model, inputs, targets, data=data)
        _check_answers(model.eval(), inputs, data=data)
        if mixes:
            raise ModelRejected(
                "mixes examples of one batch, or uses a parameter outside its layer: the gradient "
                "of one example is another in a batch than alone; remove what runs over the batch "
                "axis, and call layers rather than their weights"
            )
        passes.check_others_stay(inputs, targets, data)


@contextlib.contextmanager
def _refusing(name: str, data: DataTerms) -> Iterator[None]:
    """Makes of whatever a model raises, on made-up inputs, a refusal that names the model."""
    try:
        yield
    except ModelRejected as error:
        raise ModelRejected(f"model {name!r} {error}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelRejected(
            f"model {name!r} fails on made-up inputs of shape {data.shape}: {reason}"
        ) from error


def _check_weights_stay(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, data: DataTerms
) -> None:
    """Returns where no pass writes into a weight, as an embedding with max_norm does.

    What was written would leave with the update: without noise, and uncharged.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(GREATEST_WEIGHT)  # so large that what keeps them small would act
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for training in (True, False):
        loss = tasks.losses(model.train(training)(inputs), targets, task=data.task).sum()
        torch.autograd.grad(loss, list(released_parameters(model).values()), allow_unused=True)
        for kept, (path, parameter) in zip(before, model.named_parameters(), strict=True):
            if not torch.equal(kept, parameter):
                raise ModelRejected(
                    f"changes its weight {path!r} while it answers, which tells "
                    "its input without noise: remove what does (max_norm of an embedding)"
                )


def _looked_at(
    model: nn.Module, inputs: Tensor, targets: Tensor, data: DataTerms
) -> tuple[bool, Passes]:
    """Returns whether an example's gradient is another beside others than alone, and passes."""
    loss = partial(tasks.losses, task=data.task)
    alone = _alone(model, inputs, targets, loss)
    together = _per_example_gradients(_Probe(copy.deepcopy(model)), inputs, targets, loss)
    passes = Passes(model, data)
    return not (close(together, alone) and passes.are_as_alone(inputs, targets, alone)), passes


def _alone(model: nn.Module, inputs: Tensor, targets: Tensor, losses: Loss) -> Tensor:
    pairs = zip(inputs, targets, strict=True)
    return torch.stack([_gradient(model, *pair, losses) for pair in pairs])


def _wide(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values


@torch.no_grad()
def _moved(model: nn.Module) -> nn.Module:
    """Returns the model with its trainable weights moved a little.

    A head or an adapter that starts at zero hides the gradients of all that lies before it.
    """
    generator = torch.Generator().manual_seed(2)  # no secret
    for parameter in released_parameters(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


class _Probe(SampleModule):
    """Opacus' module, which says at which layer it fails."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, loss_reduction="sum")
        self._names_of = {layer: name for name, layer in model.named_modules()}

    def capture_backprops_hook(self, module: Any, *values: Any, **options: Any) -> None:
        """Computes gradients for every example at one layer, or names the layer."""
        try:
            super().capture_backprops_hook(module, *values, **options)
        except Exception as error:
            known = type(module) in self.GRAD_SAMPLERS
            sampler = "its sampler" if known else "functorch, as it has no sampler for it,"
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ModelRejected(
                f"has the layer {self._names_of[module] or '(itself)'!r}, {_kind(module)}, for "
                f"which Opacus gets no per-example gradients: {sampler} fails with {reason}; "
                "build it from layers that Opacus knows (dense, convolution, embedding, norms), "
                "or register a sampler by opacus.grad_sample.register_grad_sampler"
            ) from error


def _kind(layer: nn.Module) -> str:
    return f"a {type(layer).__module__}.{type(layer).__qualname__}"


@torch.no_grad()
def _check_answers(model: nn.Module, inputs: Tensor, *, data: DataTerms) -> None:
    """Returns where an example's logits in a batch are what they are alone, as evaluation needs."""
    needed = (*data.shape, data.classes) if data.task == "next-token" else (data.classes,)
    given = tuple(model(inputs).shape[1:])
    if given != needed:
        raise ModelRejected(f"answers {given} for an example, and not {needed}")
    alone = torch.cat([model(example[None]) for example in inputs])
    many = torch.cat([inputs] * TIMES)  # what mixes may do so in a large batch alone
    if not (close(model(inputs), alone) and close(model(many)[: len(inputs)], alone)):
        raise ModelRejected(
            "mixes examples of one batch where it does not train: remove what runs over the batch "
            "axis"
        )


def _gradient(model: nn.Module, example: Tensor, target: Tensor, losses: Loss) -> Tensor:
    """Returns the gradient of one example, alone and by plain autograd, as a row."""
    before = _generators()
    loss = losses(model(example[None]), target[None]).sum()
    if _generators() != before:
        # torch's generator starts at a constant: who knows a mask knows which example it hit.
        raise ModelRejected("draws random numbers that are not secret: remove its dropout")
    parameters = released_parameters(model)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    if unused := [path for path, g in zip(parameters, found, strict=True) if g is None]:
        raise ModelRejected(
            f"has weights that no gradient reaches: {', '.join(map(repr, unused))}; remove or "
            "freeze what is not used for every example"
        )
    return torch.cat([g.flatten() for g in found])


def _generators() -> list[object]:
    """Returns the states of the generators that are at hand in every process."""
    numpy = np.random.get_state(legacy=False)["state"]
    return [
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        {name: np.asarray(value).tobytes() for name, value in numpy.items()},
    ]


def _per_example_gradients(
    probe: GradSampleModule, inputs: Tensor, targets: Tensor, losses: Loss
) -> Tensor:
    """Returns a row of gradients for each example."""
    probe.zero_grad()
    with expected_warnings():
        torch.autograd.backward([losses(probe(inputs), targets).sum()])
    samples = [p.grad_sample for p in probe.parameters() if p.requires_grad]
    return torch.cat([g.reshape(len(inputs), -1) for g in samples], dim=1)
