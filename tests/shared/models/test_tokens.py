"""Models of tokens: what they answer, and what they may look at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bract.shared import models
from bract.shared.errors import UnknownName, UsageError
from bract.shared.models.transformer import rotated

LENGTH, VOCABULARY = 12, 30
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm", {"layers": 2}),
    "learned": ("transformer", {}),
    "rope": ("transformer", {"positions": "rope", "hidden": 16}),
}


def made(kind: str, task: str = "classes") -> nn.Module:
    """A model all of whose weights were moved: a head of zeros would hide everything."""
    name, options = KINDS[kind]
    torch.manual_seed(1)
    classes = VOCABULARY if task == "next-token" else 3
    model = models.build(name, (LENGTH,), classes, options, vocabulary=VOCABULARY, task=task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def texts(count: int = 4) -> Tensor:
    return torch.randint(1, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_task_decides_between_one_answer_and_one_at_every_place(kind: str) -> None:
    assert made(kind)(texts()).shape == (4, 3)
    assert made(kind, "value")(texts()).shape == (4, 3)
    assert made(kind, "next-token")(texts()).shape == (4, LENGTH, VOCABULARY)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_dropped_and_nothing_is_buffered(kind: str) -> None:
    model = made(kind).train()
    assert torch.equal(model(texts()), model(texts()))
    assert not list(model.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_what_fills_up_a_text_does_not_change_its_answer(kind: str) -> None:
    model, tokens = made(kind), texts()
    tokens[:, 7:] = 0
    torch.testing.assert_close(model(tokens), model(tokens[:, :7]))
    other = tokens.clone()
    other[:, 7] = 1  # a token that is there does
    assert (model(other) - model(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["classes", "next-token"])
def test_empty_text_has_an_answer_and_gradients_that_are_numbers(kind: str, task: str) -> None:
    model, tokens = made(kind, task), texts()
    tokens[1] = 0
    answers = model(tokens)
    assert answers.isfinite().all()
    answers.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_next_token_is_told_from_what_stands_before_it_alone(kind: str) -> None:
    model, tokens = made(kind, "next-token"), texts()
    changed = tokens.clone()
    changed[:, 6] = 1 + tokens[:, 6] % (VOCABULARY - 1)
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax((0, 2)).min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_the_tokens_matters(kind: str) -> None:
    model, tokens = made(kind), texts()
    assert (model(tokens) - model(tokens.flip(1))).abs().max() > 1e-3


def test_rotated_products_depend_on_the_distance_of_two_places_alone() -> None:
    one, other = torch.randn(2, 8, dtype=torch.float64)
    products = rotated(one.expand(LENGTH, 8)) @ rotated(other.expand(LENGTH, 8)).T
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert (products[0] - products[0, 0]).abs().max() > 1e-2
    torch.testing.assert_close(products[0, 0], one @ other)


@pytest.mark.parametrize(
    ("name", "options", "error", "reason"),
    [
        ("transformer", {"positions": "rop"}, UnknownName, "did you mean 'rope'"),
        ("transformer", {"width": 30}, UsageError, "width 30 must divide by 4"),
        ("transformer", {"width": 12, "positions": "rope"}, UsageError, "divide by 8"),
        ("transformer", {"layers": 0}, UsageError, "layers"),
        ("lstm", {"hidden": 0}, UsageError, "hidden 0 must be at least 1"),
    ],
)
def test_option_that_will_not_do_is_named(
    name: str, options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        models.build(name, (LENGTH,), 2, options, vocabulary=9)
