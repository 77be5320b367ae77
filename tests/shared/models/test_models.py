"""Models by name, their options, and factories of installed code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bract.shared import models
from bract.shared.errors import UnknownName, UsageError

FACTORIES = """
from torch import nn

NUMBER = 3

def good(shape, classes, *, width=4):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, classes))
    model.register_buffer("seen", model[1].bias.detach().clone())
    model[1].bias.requires_grad_(False)
    return model

def nothing(shape, classes):
    return "no module"

def typed(shape, classes, *, name="x", fast=False):
    return nn.Identity()

def picky(shape, classes):
    raise ValueError("only on Sundays")
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_models", raising=False)
    return "made_models"


OF_TOKENS = {"lstm", "transformer", "hf"}


@pytest.mark.parametrize("name", sorted(models.MODELS.keys() - OF_TOKENS))
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_model_maps_inputs_to_a_logit_a_class(name: str, shape: tuple[int, ...]) -> None:
    model = models.build(name, shape, 7, {})
    assert model(torch.zeros((2, *shape))).shape == (2, 7)
    assert model.training
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("linear", {}, 650),
        ("mlp", {"hidden": 16}, 65 * 16 + 170),
        ("cnn", {"width": 2, "hidden": 4}, 20 + 4 * 19 + 17 * 4 + 50),
    ],
)
def test_options_reach_the_model(name: str, options: dict[str, Any], count: int) -> None:
    model = models.build(name, (1, 8, 8), 10, options)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("activation", ["relu", "tanh", "selu"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_activation_is_chosen_by_name(name: str, activation: str) -> None:
    model = models.build(name, (1, 8, 8), 10, {"activation": activation})
    assert activation in {type(layer).__name__.lower() for layer in model.modules()}


@pytest.mark.parametrize(
    ("name", "options", "error", "reason"),
    [
        ("cn", {}, UnknownName, "unknown model 'cn': did you mean 'cnn'"),
        ("mlp", {"hiden": 4}, UnknownName, "'hiden': did you mean 'hidden'"),
        ("linear", {"hidden": 4}, UnknownName, r"\(none\)"),
        ("mlp", {"activation": "rellu"}, UnknownName, "did you mean 'relu'"),
        ("cnn", {"pooling": "median"}, UsageError, "pooling 'median' must be one of max, average"),
        ("mlp", {"hidden": "many"}, UsageError, "hidden must be a whole number"),
        ("mlp", {"hidden": 2.5}, UsageError, "hidden must be a whole number"),
        ("mlp", {"init_gain": True}, UsageError, "init_gain must be a number"),
        ("made_models:nothing", {}, UsageError, "returned no torch module"),
        ("made_models:picky", {}, UsageError, "only on Sundays"),
        ("made_models:absent", {}, UsageError, "cannot be imported"),
        ("made_models:NUMBER", {}, UsageError, "is not a function"),
        ("no_such_module_here:factory", {}, UsageError, "cannot be imported"),
        ("resnet", {"blocks": 0}, UsageError, "blocks 0 must be at least 1"),
        ("made_models:typed", {"name": 3}, UsageError, "name must be text"),
        ("made_models:typed", {"fast": 1}, UsageError, "fast must be true or false"),
        ("made_models:typed", {"fast": "no"}, UsageError, "fast must be true or false"),
        (":factory", {}, UsageError, "cannot be imported"),
        (".made_models:good", {}, UsageError, "cannot be imported"),
    ],
)
def test_wrong_name_or_option_is_an_error_that_helps(
    made: str, name: str, options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        models.build(name, (1, 8, 8), 10, options)


@pytest.mark.parametrize("shape", [(64,), (1, 8), (1, 10, 8), (1, 8, 9), (1, 1, 8, 8)])
def test_cnn_names_a_shape_that_is_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"model 'cnn': shape .* must be \(channels"):
        models.build("cnn", shape, 10, {})


@pytest.mark.parametrize("name", sorted(OF_TOKENS))
def test_model_of_tokens_is_not_built_for_numbers(name: str) -> None:
    with pytest.raises(UsageError, match=f"model '{name}' takes tokens"):
        models.build(name, (8,), 2, {})


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 11), (3, 33, 8)])
def test_resnet_takes_images_of_any_sides_from_eight_up(shape: tuple[int, ...]) -> None:
    model = models.build("resnet", shape, 5, {"width": 6, "blocks": 2})
    assert model(torch.randn(2, *shape)).shape == (2, 5)
    with pytest.raises(UsageError, match="sides of at least 8"):
        models.build("resnet", (*shape[:2], 7), 5, {})


def test_factory_of_installed_code_is_called_with_its_options(made: str) -> None:
    model = models.build(f"{made}:good", (1, 8, 8), 10, {"width": 6})
    assert isinstance(model, nn.Sequential)
    assert model[1].out_features == 6


def test_released_parameters_are_the_trainable_ones_without_buffers(made: str) -> None:
    model = models.build(f"{made}:good", (1, 8, 8), 10, {})
    expected = {"1.weight": (4, 64), "2.weight": (10, 4), "2.bias": (10,)}
    assert models.released_shapes(model) == expected
    assert set(models.released_parameters(model)) == set(expected)
