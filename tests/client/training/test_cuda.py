"""The private step on a GPU: the sums of the CPU, the same noise, and no wait inside it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bract.client.training import graphs, noise
from bract.client.training.execution import Execution
from bract.client.training.gradients import clipped_sum, zeros
from bract.client.training.graphs import ReplayedSum, replayed
from bract.client.training.optimizer import PrivateOptimizer
from bract.client.training.randomness import RandomStream
from bract.client.training.sizes import filled
from bract.client.training.trainer import Trainer
from bract.shared import models, tasks
from bract.shared.data import Examples
from bract.shared.terms import DataTerms, ModelTerms, TrainingTerms

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:.*device properties.*"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TEXT = DataTerms(name="made-up", shape=(12,), classes=3, vocabulary=40)
NEXT = DataTerms(name="made-up", shape=(12,), classes=40, task="next-token", vocabulary=40)
IMAGES = DataTerms(name="made-up", shape=(3, 16, 16), classes=4, offset=0.5, scale=0.5)
GREY = DataTerms(name="made-up", shape=(1, 28, 28), classes=10)
CASES: dict[str, tuple[str, dict[str, Any], DataTerms]] = {
    "linear": ("linear", {}, GREY),
    "mlp": ("mlp", {}, GREY),
    "cnn": ("cnn", {}, GREY),
    "resnet": ("resnet", {"width": 8, "blocks": 2}, IMAGES),
    "transformer": ("transformer", {"width": 32}, TEXT),
    "rope-next": ("transformer", {"width": 32, "positions": "rope"}, NEXT),
    "lstm": ("lstm", {"hidden": 16}, TEXT),
}
NO_WAITS = sorted(CASES.keys() - {"lstm"})  # Opacus' LSTM asks its batch for lengths


@contextmanager
def no_waits() -> Iterator[None]:
    """Whoever waits for the GPU raises."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is a prototype, says torch
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def examples(data: DataTerms) -> Examples:
    inputs, targets = tasks.made_up(data, 40, torch.Generator().manual_seed(3))
    return Examples(inputs=inputs.numpy(), targets=targets.numpy())


def trained(world: Any, case: str, **execution: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights before a round of three steps, and its update."""
    name, options, data = CASES[case]
    contract = world.contract(
        model=models.pinned(ModelTerms(name=name, options=options), data),
        data=data,
        training=TrainingTerms(local_steps=3, learning_rate=0.5, momentum=0.5),
        privacy={"sampling_rate": 0.5, "clip_norm": 0.1, "noise_multiplier": 1.5},
        cohort=world.contract().cohort,
    )
    trainer = Trainer(contract, Execution(**execution))
    torch.manual_seed(1)
    weights = {
        n: (0.1 * torch.randn(shape)).numpy().astype(np.float32)
        for n, shape in trainer.shapes.items()
    }
    update = trainer.train(
        terms=contract.cohort[0],
        examples=examples(data),
        weights=weights,
        stream=RandomStream(bytes(range(32))),
    )
    return weights, dict(update.arrays)


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return math.sqrt(sum(float(((one[n] - other[n]) ** 2).sum()) for n in one))


def norm(one: dict[str, Any]) -> float:
    return distance(one, {n: 0 * value for n, value in one.items()})


@pytest.mark.parametrize("case", CASES)
def test_a_round_gives_the_update_of_the_cpu(world: Any, case: str) -> None:
    _, cpu = trained(world, case, device="cpu")
    _, gpu = trained(world, case, device="cuda:0", physical_batch=7)
    assert distance(cpu, gpu) < 1e-4 * norm(cpu)


@pytest.mark.parametrize("case", CASES)
def test_halves_stay_near_and_keep_their_noise(world: Any, case: str) -> None:
    _, full = trained(world, case, device="cuda:0")
    _, half = trained(world, case, device="cuda:0", precision="bfloat16")
    assert 0 < distance(full, half) < 0.1 * norm(full)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_graphs_add_what_the_summer_adds(case: str, precision: Any) -> None:
    """Of batches of several sizes, in any order, one with an example that is not finite."""
    summer, replaying, parameters, data = replay(case, precision)
    shown = examples(data)
    sizes = [20, 18, 20, 17, 12, 11, 20, 12, 18, 12, 20, 11, 39, 40, 40, 38, 40, 7, 12, 20]
    for turn, size in enumerate(sizes):
        full = filled(size, 40)
        inputs = tasks.inputs_of(shown.inputs[:full], data, "cuda:0")
        targets = tasks.targets_of(shown.targets[:full], data, "cuda:0")
        counted = torch.arange(full, device="cuda:0") < size
        if turn % 3 == 2 and data.vocabulary is None:
            inputs[size - 1] = math.nan  # it must not outlive its batch
        found = [zeros(parameters) for _ in range(2)]
        for sums, adder in zip(found, (replaying, summer), strict=True):
            adder.add_(sums, inputs, targets, counted)
        one, other = ({n: v.cpu().numpy() for n, v in sums.items()} for sums in found)
        assert norm(other) > 0
        assert distance(one, other) < (1e-5 if precision == "float32" else 0.02) * norm(other)
    recorded = {shape.examples for shape in replaying._graphs}
    assert recorded == {16, 20, 40}


def replay(case: str, precision: Any) -> tuple[Any, ReplayedSum, dict[str, Any], DataTerms]:
    name, options, data = CASES[case]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # as a trainer
    torch.manual_seed(4)
    model = models.of(ModelTerms(name=name, options=options), data).cuda()
    parameters = models.released_parameters(model)
    summer = clipped_sum(
        "book-keeping", model, partial(tasks.losses, task=data.task), 0.5, precision
    )
    found = replayed(summer, parameters, name)
    assert isinstance(found, ReplayedSum)
    return summer, found, parameters, data


@pytest.mark.parametrize("case", CASES)
def test_a_round_by_graphs_gives_the_update_of_the_cpu(
    world: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_BEFORE", 0)
    replays, add_ = [], graphs.Recorded.add_
    monkeypatch.setattr(
        graphs.Recorded, "add_", lambda self, *given: (replays.append(1), add_(self, *given))[1]
    )
    _, cpu = trained(world, case, device="cpu")
    _, gpu = trained(world, case, device="cuda:0")
    assert len(replays) == 3
    assert distance(cpu, gpu) < 1e-4 * norm(cpu)


def test_noise_on_its_way_arrives_before_it_is_added(world: Any) -> None:
    """Drawn by a thread and copied beside the passes, or drawn at the step: one update."""
    _, then = trained(world, "cnn", device="cuda:0", noise_ahead=False)
    with torch.cuda.stream(noise._beside(torch.device("cuda:0"))):
        torch.cuda._sleep(500_000_000)  # what is behind it comes late
    _, ahead = trained(world, "cnn", device="cuda:0", noise_ahead=True)
    assert distance(ahead, then) < 1e-5 * norm(then)


def test_noise_never_travels_on_a_stream_that_records() -> None:
    """Torch gives out 32 streams of a priority, in turn."""
    device = torch.device("cuda:0")
    travels = noise._beside(device).cuda_stream
    assert travels not in {torch.cuda.Stream(device).cuda_stream for _ in range(70)}
    assert graphs._recording(device) is graphs._recording(device)


@pytest.mark.parametrize("count", [1, 2, 7, 32_768, 100_001])
def test_normals_of_a_gpu_are_those_of_the_host(count: int) -> None:
    here, there = (RandomStream(bytes(range(32))) for _ in range(2))
    for _ in range(3):
        found = there.normals_on(count, torch.device("cuda:0")).cpu().numpy()
        np.testing.assert_allclose(found, here.normals(count), rtol=1e-13, atol=1e-14)
    assert (here.words(4) == there.words(4)).all()


def test_graphs_follow_weights_that_are_loaded(world: Any) -> None:
    summer, replaying, parameters, data = replay("cnn", "float32")
    shown = examples(data)
    given = (
        tasks.inputs_of(shown.inputs[:20], data, "cuda:0"),
        tasks.targets_of(shown.targets[:20], data, "cuda:0"),
    )
    norms = []
    for turn in range(8):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.copy_(torch.randn(parameter.shape) * 0.1 * (turn + 1))
        found = [zeros(parameters) for _ in range(2)]
        for sums, adder in zip(found, (replaying, summer), strict=True):
            adder.add_(sums, *given)
        one, other = ({n: v.cpu().numpy() for n, v in sums.items()} for sums in found)
        assert distance(one, other) < 1e-5 * norm(other)
        norms.append(norm(one))
    assert replaying._graphs
    assert len({round(value, 6) for value in norms}) == 8


@pytest.mark.parametrize("by_graphs", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", NO_WAITS)
def test_nothing_inside_a_step_waits_for_the_gpu(
    case: str, precision: Any, by_graphs: bool
) -> None:
    summer, replaying, parameters, data = replay(case, precision)
    adder = replaying if by_graphs else summer
    optimizer = PrivateOptimizer(
        torch.optim.SGD(list(parameters.values()), lr=0.1),
        noise_multiplier=1.0,
        clip_norm=0.5,
        normaliser=20.0,
        stream=RandomStream(bytes(32)),
    )
    shown, drawing = examples(data), ThreadPoolExecutor(1)

    def step() -> None:
        sums = zeros(parameters)
        inputs = tasks.inputs_of(shown.inputs[:20], data, "cuda:0")
        adder.add_(sums, inputs, tasks.targets_of(shown.targets[:20], data, "cuda:0"))
        optimizer.draw_ahead(drawing)
        optimizer.put(list(sums.values()))
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):  # pinned memory, kernels and graphs are there after the first ones
        step()
    assert bool(replaying._graphs) == by_graphs
    with no_waits():
        step()


@pytest.mark.parametrize("by_graphs", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e15])
def test_no_example_adds_more_than_its_bound(precision: Any, size: float, by_graphs: bool) -> None:
    data, clip = GREY, 0.5
    model = models.build("cnn", data.shape, data.classes, {}).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(size)  # weights that a hostile server chose
    parameters = models.released_parameters(model)
    summer = clipped_sum(
        "book-keeping", model, partial(tasks.losses, task=data.task), clip, precision
    )
    adder = ReplayedSum(summer, parameters) if by_graphs else summer
    for row in range(8):
        sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
        shown = examples(data)
        adder.add_(
            sums,
            tasks.inputs_of(shown.inputs[row : row + 1], data, "cuda:0"),
            tasks.targets_of(shown.targets[row : row + 1], data, "cuda:0"),
        )
        assert math.sqrt(sum(float(v.square().sum()) for v in sums.values())) <= clip
    assert not by_graphs or adder._graphs


def test_trainers_share_the_device_and_the_products_keep_all_their_bits(world: Any) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    _, one = trained(world, "cnn", device="cuda:0")
    _, other = trained(world, "cnn", device="cuda:0")
    assert distance(one, other) <= 1e-6 * norm(one)
    a, b = torch.randn(256, 256, device="cuda"), torch.randn(256, 256, device="cuda")
    exact = a.double() @ b.double()
    assert float(((a @ b).double() - exact).norm() / exact.norm()) < 1e-5  # TF32: about 3e-4


def test_example_that_is_not_finite_adds_nothing() -> None:
    model: nn.Module = models.build("cnn", GREY.shape, GREY.classes, {}).cuda()
    parameters = models.released_parameters(model)
    summer = clipped_sum("book-keeping", model, partial(tasks.losses, task="classes"), 0.5)

    def added(inputs: Tensor) -> dict[str, Tensor]:
        sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
        summer.add_(sums, inputs.cuda(), torch.arange(len(inputs), device="cuda"))
        return sums

    shown = torch.rand(3, *GREY.shape)
    poisoned = torch.cat([shown, torch.full((1, *GREY.shape), math.nan)])
    for one, other in zip(added(shown).values(), added(poisoned).values(), strict=True):
        assert torch.isfinite(other).all()
        assert torch.allclose(one, other, atol=1e-6)
