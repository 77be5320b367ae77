"""May this model be trained with per-example privacy? Asked once, on made-up data."""

from __future__ import annotations

import copy

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional

from bract.client.training.gradients import expected_warnings
from bract.shared.errors import ModelRejected
from bract.shared.models import Shape, released_parameters


def admit(model: nn.Module, *, shape: Shape, classes: int, name: str) -> None:
    """Returns where Opacus accepts the model and no example touches another's gradient.

    Args:
        model: on the CPU, as built.
        shape: of one input, without the batch axis.
        classes: the number of logits.
        name: what to call it in an error.

    Raises:
        ModelRejected: with Opacus' reason, or naming what mixes examples.
    """
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise ModelRejected(
            f"model {name!r} cannot be trained privately: {' '.join(str(errors[0]).split())}; "
            "use GroupNorm or LayerNorm in place of batch statistics"
        )
    if any(True for _ in model.buffers()):
        raise ModelRejected(f"model {name!r} has buffers, which are not released: make them plain")
    if not released_parameters(model):
        raise ModelRejected(f"model {name!r} has no trainable parameter: unfreeze some")
    _check_independence(model, shape=shape, classes=classes, name=name)


def _check_independence(model: nn.Module, *, shape: Shape, classes: int, name: str) -> None:
    generator = torch.Generator().manual_seed(1)  # made-up data, no secret
    inputs = torch.randn((4, *shape), generator=generator)
    targets = torch.arange(4) % classes
    probe = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")
    before = _per_example_gradients(probe, inputs, targets)
    for row in range(len(inputs)):
        perturbed = inputs.clone()
        perturbed[row] = 3.0 * perturbed[row] + 1.0
        others = torch.arange(len(inputs)) != row
        after = _per_example_gradients(probe, perturbed, targets)
        if not torch.allclose(before[others], after[others], rtol=1e-4, atol=1e-6):
            raise ModelRejected(
                f"model {name!r} mixes examples of one batch: the gradient of one depends on "
                "another; remove what runs over the batch axis"
            )


def _per_example_gradients(probe: GradSampleModule, inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns a row of gradients for each example."""
    probe.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # the same dropout on both sides of the comparison
        losses = functional.cross_entropy(probe(inputs), targets, reduction="none")
    with expected_warnings():
        torch.autograd.backward([losses.sum()])
    rows = [p.grad_sample.flatten(1) for p in probe.parameters() if p.requires_grad]
    return torch.cat(rows, dim=1)
