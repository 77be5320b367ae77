"""A model for images is run the quicker way, and gives the very numbers that it gave."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bract.shared.models.layout import Layout

POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(2, 1),
    nn.MaxPool2d(3, 2, padding=1),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.MaxPool2d(2, dilation=2),
]


def network(pool: nn.Module, *, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.ReLU(inplace), pool),
        *(nn.Conv2d(8, 4, 2), nn.ReLU(inplace), copy.deepcopy(pool)),
        *(nn.Flatten(), nn.LazyLinear(5)),
    )


def images() -> Tensor:
    torch.manual_seed(4)
    found = torch.randn(6, 2, 20, 20)
    found[:, :, :8] = 0.0  # where all that a pooling sees is equal
    return found


def untouched(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """Returns a copy that is run as it is written, with its channels last, and what it gives."""
    plain = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return plain, plain(images().contiguous(memory_format=torch.channels_last))


def gradients(model: nn.Module, outputs: Tensor) -> list[Tensor]:
    weights = torch.arange(outputs.numel()).view(outputs.shape) - 7.0
    return list(torch.autograd.grad((outputs * weights).sum(), list(model.parameters())))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_relu_behind_max_pooling_changes_no_number(pool: nn.Module, inplace: bool) -> None:
    model = network(pool, inplace=inplace)
    model(images())  # sizes the last layer
    plain, expected = untouched(model)
    found = Layout(model).outputs(model, images())
    assert torch.equal(found, expected)
    for one, other in zip(gradients(model, found), gradients(plain, expected), strict=True):
        assert torch.equal(one, other)


class Watched(nn.ReLU):
    """A ReLU that is not of torch's own class: where it stands it stays."""


def seen_by(relu: nn.Module, pool: nn.Module, *, hooked: bool = False) -> tuple[int, ...]:
    """Returns the shape of what a ReLU before a pooling was given."""
    shapes: list[tuple[int, ...]] = []
    model = nn.Sequential(nn.Conv2d(2, 3, 3), relu, pool)
    if hooked:
        relu.register_forward_pre_hook(lambda layer, inputs: shapes.append(inputs[0].shape))
        Layout(model).outputs(model, images())
        return shapes[0]
    layout = Layout(model)
    inner = torch.nn.functional.relu

    def noted(value: Tensor, inplace: bool = False) -> Tensor:
        shapes.append(value.shape)
        return inner(value, inplace)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "relu", noted)
        layout.outputs(lambda x: _first(model(x)), images())
    return shapes[0]


def _first(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


def test_relu_is_run_behind_max_pooling_and_nothing_else() -> None:
    before, behind = (6, 3, 18, 18), (6, 3, 9, 9)
    assert seen_by(nn.ReLU(), nn.MaxPool2d(2)) == behind
    assert seen_by(nn.ReLU(), nn.AvgPool2d(2)) == before
    assert seen_by(nn.ReLU(), nn.MaxPool2d(2, return_indices=True)) == before
    assert seen_by(Watched(), nn.MaxPool2d(2)) == before


def test_relu_that_somebody_watches_sees_what_it_saw() -> None:
    assert seen_by(nn.ReLU(), nn.MaxPool2d(2), hooked=True) == (6, 3, 18, 18)


def test_several_poolings_and_relus_in_a_row() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.ReLU(), nn.ReLU())
    )
    _, expected = untouched(model)
    assert torch.equal(Layout(model).outputs(model, images()), expected)


def test_a_sequence_with_a_way_of_its_own_keeps_it() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    model.forward = lambda value: model[0](value)  # type: ignore[method-assign]
    assert Layout(model).outputs(model, images()).shape == (6, 3, 18, 18)


def test_copy_of_a_model_runs_its_own_layers() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    Layout(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert float(copied(images()).abs().sum()) == 0.0
        assert float(model(images()).abs().sum()) > 0.0


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.GroupNorm(2, 4)], ids=str)
def test_gradient_behind_a_flattening_comes_with_channels_last(pool: nn.Module) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), pool, nn.Flatten(), nn.LazyLinear(5))
    model(images())
    layout, strides = Layout(model), list[tuple[int, ...]]()

    def noted(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda gradient: strides.append(gradient.stride()))

    model[2].register_forward_hook(noted)
    layout.outputs(model, images()).sum().backward()
    assert strides[0][1] == 1
    strides.clear()
    model(images().contiguous(memory_format=torch.channels_last)).sum().backward()
    assert strides[0][1] != 1  # nobody else's passes are touched
