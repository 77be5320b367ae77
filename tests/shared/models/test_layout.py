"""A model for images is run the quicker way, and gives the very numbers that it gave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bract.shared.models.layout import Layout

POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(2, 1),
    nn.MaxPool2d(3, 2, padding=1),
    nn.MaxPool2d(3, 2, ceil_mode=True),
]


def network(pool: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.ReLU(), pool),
        *(nn.Conv2d(8, 4, 2), nn.ReLU(), copy.deepcopy(pool)),
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


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_relu_behind_max_pooling_changes_no_number(pool: nn.Module) -> None:
    model = network(pool)
    model(images())  # sizes the last layer
    plain, expected = untouched(model)
    found = Layout(model).run(model, images())
    assert torch.equal(found, expected)
    for one, other in zip(gradients(model, found), gradients(plain, expected), strict=True):
        assert torch.equal(one, other)


class Watched(nn.ReLU):
    """A ReLU that is not of torch's own class: where it stands it stays."""


def seen_by(relu: nn.Module, pool: nn.Module) -> tuple[int, ...]:
    """Returns the shape of what a ReLU before a pooling was given."""
    shapes: list[tuple[int, ...]] = []
    model = nn.Sequential(nn.Conv2d(2, 3, 3), relu, pool)
    inner = torch.nn.functional.relu

    def noted(value: Tensor, inplace: bool = False) -> Tensor:
        shapes.append(value.shape)
        return inner(value, inplace)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "relu", noted)
        Layout(model).run(model, images())
    return shapes[0]


def test_relu_is_run_behind_max_pooling_and_nothing_else() -> None:
    before, behind = (6, 3, 18, 18), (6, 3, 9, 9)
    assert seen_by(nn.ReLU(), nn.MaxPool2d(2)) == behind
    assert seen_by(nn.ReLU(), nn.AvgPool2d(2)) == before
    assert seen_by(nn.ReLU(), nn.MaxPool2d(2, return_indices=True)) == before
    assert seen_by(Watched(), nn.MaxPool2d(2)) == before
    assert seen_by(nn.ReLU(inplace=True), nn.MaxPool2d(2)) == before
    assert seen_by(nn.ReLU(), nn.MaxPool2d(2, dilation=2)) == before  # may lie in padding alone


def test_relu_that_somebody_watches_sees_what_it_saw() -> None:
    watched = nn.ReLU()
    watched.register_forward_hook(lambda layer, inputs, output: None)
    assert seen_by(watched, nn.MaxPool2d(2)) == (6, 3, 18, 18)


def test_several_poolings_and_relus_in_a_row() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.ReLU(), nn.ReLU())
    )
    _, expected = untouched(model)
    assert torch.equal(Layout(model).run(model, images()), expected)


def test_a_sequence_with_a_way_of_its_own_keeps_it() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    model.forward = lambda value: model[0](value)  # type: ignore[method-assign]
    assert Layout(model).run(model, images()).shape == (6, 3, 18, 18)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.GroupNorm(2, 4)], ids=str)
def test_gradient_behind_a_flattening_comes_with_channels_last(pool: nn.Module) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), pool, nn.Flatten(), nn.LazyLinear(5))
    model(images())
    layout, strides = Layout(model), list[tuple[int, ...]]()

    def noted(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda gradient: strides.append(gradient.stride()))

    def passed(lying: Tensor) -> None:
        model[2].register_forward_hook(noted)  # behind the layout's own
        model(lying).sum().backward()

    layout.run(passed, images())
    assert strides[0][1] == 1
    strides.clear()
    model(images().contiguous(memory_format=torch.channels_last)).sum().backward()
    assert strides[0][1] != 1  # nobody else's passes are touched


def looked_at(model: nn.Sequential, layout: Layout) -> list[int]:
    """Returns which layers have a hook in a pass, and makes it."""
    found: list[int] = []

    def passed(lying: Tensor) -> None:
        found.extend(place for place, layer in enumerate(model) if layer._forward_hooks)
        model(lying).sum().backward()

    layout.run(passed, images())
    assert not any(layer._forward_hooks for layer in model)
    return found


def test_only_layers_whose_gradients_come_otherwise_are_looked_at_again() -> None:
    model = network(nn.MaxPool2d(2))
    model(images())  # sizes the last layer
    layout = Layout(model)
    with torch.no_grad():
        layout.run(model, images())  # which tells nothing of gradients
    assert looked_at(model, layout) == list(range(8))
    # The second ReLU is run behind its pooling, and so is the last before the flattening.
    assert looked_at(model, layout) == [4]
    assert looked_at(model, Layout(model)) == list(range(8))


class Residual(nn.Module):
    """Reads what the ReLU that begins a sequence wrote over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1)
        self.down = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2))

    def forward(self, value: Tensor) -> Tensor:
        hidden = self.first(value) + 0.0
        down: Tensor = self.down(hidden)
        return down.sum((2, 3)) + self.second(hidden).sum((2, 3))


class Named(nn.Module):
    """Gives its sequence the images by name."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, value: Tensor) -> Tensor:
        found: Tensor = self.parts(input=value)
        return found


class Solid(nn.Module):
    """Has a convolution over space beside one over a plane."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.plane = nn.Conv3d(1, 3, 2), nn.Conv2d(3, 4, 2)

    def forward(self, value: Tensor) -> Tensor:
        found: Tensor = self.plane(self.space(value[:, None]).amax(2))
        return found


class Shift(nn.Module):
    """Returns a parameter of four axes, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1, 4, 3, 3))

    def forward(self) -> Tensor:
        return self.value


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Conv2d(2, 4, 3), Shift()

    def forward(self, value: Tensor) -> Tensor:
        found: Tensor = self.layer(value)[:, :, :3, :3] * self.shift()
        return found


class Viewing(torch.autograd.Function):
    """Views its gradient as if its channels came first."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value * 1.0

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.view(len(gradient), -1).view(gradient.shape)


class View(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        found: Tensor = Viewing.apply(value)
        return found


def patched() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    model[2].forward = lambda value: nn.functional.avg_pool2d(value, 2)  # type: ignore[method-assign]
    return model


def scripted() -> nn.Sequential:
    inner = torch.jit.script(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    return nn.Sequential(nn.Conv2d(2, 4, 3), inner)


ODD: dict[str, Callable[[], nn.Module]] = {
    "a ReLU in place whose input is read again": Residual,
    "a sequence that is called by name": Named,
    "planes and space": Solid,
    "a module that returns its parameter": Shifted,
    "a pooling that was changed": patched,
    "a gradient that is viewed": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), View(), nn.Flatten()),
    "a script": scripted,
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_odd_models_give_what_they_gave(name: str) -> None:
    torch.manual_seed(6)
    model = ODD[name]()
    expected = model(images())
    wanted = gradients(model, expected)

    def passed(lying: Tensor) -> tuple[Tensor, list[Tensor]]:
        outputs = model(lying)
        return outputs, gradients(model, outputs)

    layout = Layout(model)
    for _ in range(2):
        found, got = layout.run(passed, images())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_copies_of_a_model_are_of_torchs_classes_and_run_their_own_layers() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    Layout(model)
    for copied in (copy.copy(model), copy.deepcopy(model)):
        assert type(copied) is nn.Sequential
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert float(copied(images()).abs().sum()) == 0.0 < float(model(images()).abs().sum())


@pytest.mark.parametrize("channels", [1, 2])
def test_outputs_lie_with_channels_last_whatever_the_images(channels: int) -> None:
    """The strides of one channel could be read either way: the weights must say which."""
    model = nn.Sequential(nn.Conv2d(channels, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    found = Layout(model).run(model, images()[:, :channels])
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not found.is_contiguous()
