"""Which batches share a graph, and what one is given and leaves; the graphs' tests need a GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bract.client.training import graphs
from bract.client.training.bookkeeping import BookKeepingSum
from bract.client.training.gradients import clipped_sum, zeros
from bract.client.training.graphs import Batch, ReplayedSum, Shape, shape_of
from bract.shared import models, tasks

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
SHAPE, CLASSES, CLIP = (1, 8, 8), 10, 0.05
Sums = dict[str, Tensor]
losses = partial(tasks.losses, task="classes")


def batch(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=made), torch.randint(0, 10, (count,), generator=made)


def summed(adder: Any, parameters: Mapping[str, Tensor], *given: Tensor) -> Sums:
    sums = zeros(parameters)
    adder.add_(sums, *given)
    return sums


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(2)
    return models.build("cnn", SHAPE, CLASSES, {})


@pytest.fixture
def replaying(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> ReplayedSum:
    """One whose recorded passes run on the CPU, each time anew."""

    class Run(graphs.Recorded):
        def __init__(
            self, summer: BookKeepingSum, parameters: Any, shape: Shape, pool: Any
        ) -> None:
            self._batch, self._device = Batch(parameters, shape), torch.device("cpu")
            self._graph = self
            self.summer = summer

        def add_(
            self, sums: Sums, inputs: Tensor, targets: Tensor, counted: Tensor | None = None
        ) -> None:
            self._batch.take(inputs, targets, counted)
            self._batch.run(self.summer)
            self._batch.add_to(sums)

    monkeypatch.setattr(graphs, "Recorded", Run)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    parameters = models.released_parameters(model)
    return ReplayedSum(BookKeepingSum(model, losses, CLIP), parameters)


def test_batches_that_look_otherwise_share_no_graph() -> None:
    inputs, targets = batch(8)
    shapes = {
        shape_of(inputs, targets),
        shape_of(inputs.double(), targets),
        shape_of(inputs[:, :, :4], targets),
        shape_of(inputs, targets.int()),
        shape_of(inputs, targets[:, None]),
        shape_of(inputs[1:], targets[1:]),
    }
    assert len(shapes) == 6


def test_what_graphs_add_is_what_the_summer_adds(model: nn.Module, replaying: ReplayedSum) -> None:
    parameters = models.released_parameters(model)
    plain = BookKeepingSum(model, losses, CLIP)
    for seed, count in enumerate([20, 17, 20, 18, 20, 17, 3, 20, 20, 40, 1]):
        given = batch(count, seed)
        found, expected = summed(replaying, parameters, *given), summed(plain, parameters, *given)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert [shape.examples for shape in replaying._graphs] == [20]


def test_example_that_is_not_counted_adds_nothing(model: nn.Module, replaying: ReplayedSum) -> None:
    parameters = models.released_parameters(model)
    inputs, targets = batch(20)
    for _ in range(5):
        summed(replaying, parameters, inputs, targets)
    assert replaying._graphs
    inputs[18], inputs[19] = torch.nan, 1e30
    found = summed(replaying, parameters, inputs, targets, torch.arange(20) < 18)
    plain = BookKeepingSum(model, losses, CLIP)
    expected = summed(plain, parameters, inputs[:18], targets[:18])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    # and the next batch counts all of its own again
    whole = batch(20, 5)
    for name, value in summed(plain, parameters, *whole).items():
        again = summed(replaying, parameters, *whole)[name]
        torch.testing.assert_close(again, value, rtol=1e-5, atol=1e-7)


def test_sums_are_added_to_what_is_there(model: nn.Module, replaying: ReplayedSum) -> None:
    parameters, given = models.released_parameters(model), batch(20)
    once = summed(replaying, parameters, *given)
    sums = zeros(parameters)
    for _ in range(5):
        replaying.add_(sums, *given)
    for name, value in once.items():
        torch.testing.assert_close(sums[name], 5 * value, rtol=1e-9, atol=1e-12)


def test_pass_that_cannot_be_recorded_runs_as_before(
    model: nn.Module,
    replaying: ReplayedSum,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []

    def refusing(*_: Any) -> None:
        asked.append(1)
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(graphs, "Recorded", refusing)
    parameters, given = models.released_parameters(model), batch(20)
    with caplog.at_level(logging.INFO, logger="bract.client"):
        found = [summed(replaying, parameters, *given) for _ in range(6)]
    assert len(asked) == 1
    assert "cannot be recorded" in caplog.text
    torch.testing.assert_close(found[0], found[-1])


def test_no_memory_for_a_graph_is_no_lack_of_it_for_a_pass(
    model: nn.Module, replaying: ReplayedSum, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, given = models.released_parameters(model), batch(20)
    for _ in range(5):
        summed(replaying, parameters, *given)
    assert replaying._graphs

    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(graphs, "Recorded", short)
    found = [summed(replaying, parameters, *batch(40)) for _ in range(5)]
    torch.testing.assert_close(found[0], found[-1])
    assert not replaying._graphs


@pytest.mark.parametrize("name", ["cnn", "hf", "some_module:factory"])
@pytest.mark.parametrize("mode", ["book-keeping", "opacus-hooks", "opacus-ghost"])
def test_without_a_gpu_nothing_is_recorded(model: nn.Module, name: str, mode: Any) -> None:
    summer = clipped_sum(mode, model, losses, CLIP)
    assert graphs.replayed(summer, models.released_parameters(model), name) is summer


@pytest.mark.parametrize("mode", ["book-keeping", "opacus-hooks", "opacus-ghost"])
@pytest.mark.parametrize("name", [*models.MODELS, "some_module:factory"])
def test_passes_of_our_own_models_alone_are_recorded(
    model: nn.Module, name: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a GPU, and not in the modes that are references."""
    monkeypatch.setattr(graphs, "_device_of", lambda _: torch.device("cuda"))
    summer = clipped_sum(mode, model, losses, CLIP)
    found = graphs.replayed(summer, models.released_parameters(model), name)
    recorded = mode == "book-keeping" and name not in {"hf", "some_module:factory"}
    assert isinstance(found, ReplayedSum) == recorded
    assert recorded or found is summer
