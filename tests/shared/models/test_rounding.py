"""Operations whose last numbers go through other code, found by trying them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bract.shared.models import rounding

SHAPE = (8, 5)
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": functional.elu,
    "exp": torch.exp,
    "gelu": functional.gelu,
    "selu": functional.selu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "softplus": functional.softplus,
    "tanh": torch.tanh,
}


@pytest.fixture(scope="module")
def ending() -> Iterator[Callable[[Tensor], Tensor]]:
    """An operation that rounds what is left over behind vectors of 16 otherwise."""
    library = torch.library.Library("bract_tests", "DEF")

    def ends(x: Tensor) -> Tensor:
        found = 3.0 * x
        found.view(-1)[x.numel() // 16 * 16 :] *= 1 + 2**-23
        return found

    library.define("ends(Tensor x) -> Tensor")
    library.impl("ends", ends, "CPU")
    yield torch.ops.bract_tests.ends
    library._destroy()


def test_an_operation_that_rounds_by_the_place_is_found(
    ending: Callable[[Tensor], Tensor],
) -> None:
    values = torch.randn(SHAPE)
    assert not rounding.is_even(lambda: ending(values))
    assert not rounding.is_even(lambda: torch.tanh(ending(values) + 1))
    assert rounding.is_even(lambda: ending(values[0, 0]))  # one number has one place


@pytest.mark.parametrize("name", POINTWISE)
def test_what_is_found_is_what_a_row_at_the_end_of_a_pass_shows(name: str) -> None:
    operation = POINTWISE[name]
    made = torch.Generator().manual_seed(4)
    rows = 3 * torch.randn((4096, 1), generator=made).expand(4096, 71)  # equal numbers in a row
    answers = torch.stack([operation(row.contiguous()) for row in rows])
    even = bool((answers == answers[:, :1]).all())
    assert rounding.is_even(lambda: operation(torch.randn(SHAPE))) == even


def test_a_pass_backward_is_tried_too() -> None:
    values = torch.randn(SHAPE, requires_grad=True)
    seen = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.relu()

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            seen.append(True)
            return functional.silu(gradients[0])

    def run() -> None:
        (Doubled.apply(values) ** 2).sum().backward()

    expected = rounding.is_even(lambda: functional.silu(torch.randn(SHAPE)))
    assert rounding.is_even(run) == expected
    assert seen


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.softmax(-1),
        lambda x: x.flatten().softmax(0),
        lambda x: x.cumsum(0),
        lambda x: x.flatten().flip(0),
        lambda x: functional.layer_norm(x, (5,)),
        lambda x: x @ x.T,
        lambda x: x.flatten().cumsum(0).relu_(),
    ],
    ids=["softmax", "softmax of all", "sums", "turned", "layer norm", "product", "in place"],
)
def test_what_goes_over_rows_is_not_taken_for_what_takes_numbers_one_by_one(
    operation: Callable[[Tensor], Tensor],
) -> None:
    assert rounding.is_even(lambda: operation(torch.randn(SHAPE)))


def test_one_thread_is_given_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with rounding.one_thread(False):
            assert torch.get_num_threads() == 2
        with rounding.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
