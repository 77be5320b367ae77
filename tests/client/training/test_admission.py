"""Which models may be trained privately, asked on made-up data."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bract.client.training.admission import admit
from bract.shared import models
from bract.shared.errors import ModelRejected
from bract.shared.terms import DataTerms

SHAPE = (1, 8, 8)


class Between(nn.Module):
    """A dense layer, with something done to its input."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change, self.layer = change, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.change(x.flatten(1)))


class Borrowed(nn.Module):
    """Uses its layer's weight a second time without calling the layer: hooks do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.out = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.encoder(x.flatten(1)))
        return self.out(functional.linear(hidden, self.encoder.weight))


class Positions(nn.Module):
    """Asks an embedding for positions: its first axis is not that of the examples."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.positions, self.out = nn.Embedding(length, 10), nn.Linear(64, 10)
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1)) + self.positions(torch.arange(self.length)).mean(0)


class Behind(nn.Module):
    """Borrows a weight as above, in front of a head that starts at zero and hides it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Borrowed()
        nn.init.zeros_(self.body.out.weight)
        nn.init.zeros_(self.body.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Kinked(nn.Module):
    """A steep kink at a sum whose rounding differs with the batch, and at nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(64, 1), nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x.flatten(1))
        rounding = self.training and x.dtype == torch.float32 and len(x) > 1
        return self.out(hidden * (1.001 if rounding else 1.0))


Change = Callable[[Tensor, bool], Tensor]


class Guarded(nn.Module):
    """Does something to what a layer gives, or to its answers, told whether it trains."""

    def __init__(self, change: Change = lambda h, _: h, last: Change = lambda y, _: y) -> None:
        super().__init__()
        self.change, self.last = change, last
        self.layer, self.out = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.change(self.layer(x.flatten(1)), self.training))
        return self.last(self.out(hidden), self.training)


class Shrunk(torch.autograd.Function):
    """Leaves values as they are, and shrinks a batch's gradients where they are large together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.nan_to_num(0).norm().clamp(min=100.0)


class Standing(nn.Module):
    """Looks at the whole batch where it does not train, and only there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.layer(x if self.training else x - x.mean(0))


class Few(nn.Module):
    """Takes a few examples at once, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 16:
            raise ValueError("too\nmany")
        return self.layer(x.flatten(1))


def uncopied() -> nn.Module:
    """Keeps a tensor that was computed, as torch's old weight_norm does: it cannot be copied."""
    model = Between(lambda x: x)
    model.kept = 2 * model.layer.weight
    return model


def with_(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(144, 10))


def frozen() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)


def endless(value: float) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(model[1].weight, value)
    return model


def unused() -> nn.Module:
    model = Between(lambda x: x)
    model.spare = nn.Linear(2, 2)
    return model


def check(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> None:
    torch.manual_seed(0)
    admit(model, data=DataTerms(name="made-up", shape=shape, classes=10), name="given")


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "resnet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_our_models_are_taken(name: str, shape: tuple[int, ...]) -> None:
    check(models.build(name, shape, 10, {}), shape)


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 6, 6]),
        nn.Dropout(0.0),
        nn.Sequential(nn.CircularPad2d(1), nn.Conv2d(4, 4, 3)),
    ],
    ids=["group", "layer", "dropout", "padding"],
)
def test_layers_that_keep_examples_apart_are_taken(layer: nn.Module) -> None:
    check(with_(layer))


def test_admission_leaves_the_model_as_it_was() -> None:
    model = models.build("cnn", SHAPE, 10, {})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: with_(nn.BatchNorm2d(4)), "BatchNorm cannot support.*; use GroupNorm"),
        (lambda: Between(lambda x: x - x.mean(0)), "mixes examples"),
        (lambda: Between(lambda x: x + 1e-2 * x.roll(1, 0)), "mixes examples"),
        (lambda: Between(lambda x: x * torch.softmax(x @ x.T, 1).diag()[:, None]), "mixes"),
        (lambda: Between(lambda x: x / len(x)), "mixes examples"),
        (lambda: Between(lambda x: x + torch.arange(len(x))[:, None]), "mixes examples"),
        (lambda: Between(lambda x: functional.dropout(x, 0.5)), "random numbers"),
        (lambda: with_(nn.Dropout(0.5)), "dropout"),
        (lambda: Between(lambda x: x - x.mean(0) if len(x) > 8 else x), "mixes examples"),
        (Borrowed, "outside its layer"),
        (Behind, "outside its layer"),
        (lambda: Positions(4), "mixes examples"),
        (lambda: Positions(5), "fails on made-up inputs"),
        (frozen, "no trainable parameter"),
        (unused, r"has weights that no gradient reaches: 'spare\.weight', 'spare\.bias'; remove"),
        (lambda: endless(math.inf), r"not finite in its weight '1\.weight': set others"),
        (lambda: endless(math.nan), r"not finite in its weight '1\.weight': set others"),
        (lambda: with_(nn.GRU(6, 6)), "privately: [^;]*$"),
        (uncopied, r"fails on made-up inputs of shape \(1, 8, 8\): RuntimeError: Only Tensors"),
        (Few, r"fails on made-up inputs of shape \(1, 8, 8\): ValueError: too many"),
        (lambda: nn.Linear(9, 10), r"shape \(1, 8, 8\): RuntimeError"),
        (lambda: Between(lambda x: x).double(), "the float64 weight 'layer.weight': build it in"),
        (lambda: Between(lambda x: x).half(), "the float16 weight 'layer.weight'"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "lazy weight '1.weight'"),
        (
            lambda: with_(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
            r"the layer '1' with padding_mode='circular'.*CircularPad2d",
        ),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 12)),
            r"answers \(12,\) for an example, and not \(10,\)",
        ),
    ],
)
def test_model_that_cannot_keep_examples_apart_is_refused_in_one_line(
    build: Callable[[], nn.Module], reason: str
) -> None:
    with pytest.raises(ModelRejected, match=reason) as refusal:
        check(build())
    assert "model 'given'" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h, training: h - h.mean(0) if training and len(h) > 8 else h, "than alone"),
        (
            lambda h, _: h if h.isfinite().all() else h.nan_to_num(0, 0, 0) / 2 + 1,
            "holds an infinite number",
        ),
        (lambda h, _: h / 2 if h.isnan().any() else h, "holds what is no number"),
        (lambda h, _: h / (h.abs().max() / 100).clamp(min=1), "a million times as large"),
        (lambda h, _: h * (1e4 / h.norm()).clamp(max=1), "a million times as large"),
    ],
    ids=["training", "finite", "number", "greatest", "norm"],
)
def test_model_that_mixes_in_large_batches_or_where_an_example_is_odd_is_refused(
    change: Change, reason: str
) -> None:
    with pytest.raises(ModelRejected, match=f"'given' mixes examples of one batch.*{reason}"):
        check(Guarded(change))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Guarded(last=lambda y, _: y * (1e3 / y.nan_to_num(0).norm()).clamp(max=1)),
        lambda: Guarded(lambda h, _: Shrunk.apply(functional.layer_norm(h, [8]))),
    ],
    ids=["answers", "gradients"],
)
def test_model_that_mixes_only_where_weights_are_large_is_refused(
    build: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelRejected, match="a million times as large, the answers to the others"):
        check(build())


def test_a_guard_of_each_example_by_itself_is_taken() -> None:
    check(Guarded(lambda h, _: torch.where(h.isfinite(), h, 0.0).clamp(-100, 100)))
    check(Guarded(lambda h, _: h / (h.norm(dim=1, keepdim=True) / 100).clamp(min=1)))


def test_a_model_that_fails_on_one_odd_example_is_refused() -> None:
    def change(h: Tensor, _: bool) -> Tensor:
        if h.isnan().any():
            raise ValueError("a number is missing")
        return h

    with pytest.raises(ModelRejected, match="'given' fails where an example holds what is no"):
        check(Guarded(change))


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_a_model_that_draws_by_chance_is_refused_though_nothing_came_of_it(
    draw: Callable[[], float],
) -> None:
    with pytest.raises(ModelRejected, match="random numbers"):
        check(Guarded(lambda h, _: 2 * h if draw() < 0 else h))


def test_rounding_that_only_float32_has_is_not_taken_for_mixing() -> None:
    """As where a ReLU of a hundred thousand turns: another kernel for another batch."""
    check(Kinked())


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_are_refused_since_they_are_not_released(persistent: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.register_buffer("count", torch.zeros(1), persistent=persistent)
    with pytest.raises(ModelRejected, match="buffers"):
        check(model)


def test_a_model_that_mixes_examples_only_where_it_does_not_train_is_rejected() -> None:
    with pytest.raises(ModelRejected, match="mixes examples of one batch where it does not train"):
        admit(Standing(), data=DataTerms(name="made-up", shape=SHAPE, classes=10), name="standing")
