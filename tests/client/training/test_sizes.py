"""A batch has a public size, whatever is in it: else one example would move all others' rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bract.client.training import admission
from bract.client.training.execution import Execution
from bract.client.training.gradients import zeros
from bract.client.training.randomness import RandomStream
from bract.client.training.sizes import LEAST, Sizes, fill, filled, planned
from bract.client.training.together import Job
from bract.client.training.trainer import Trainer
from bract.shared.data import Examples
from bract.shared.errors import ModelRejected
from bract.shared.terms import DataTerms, ModelTerms, TrainingTerms

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
IMAGES = DataTerms(name="made-up", shape=(1, 28, 28), classes=10, offset=72.9, scale=90.0)
MODES = ("book-keeping", "opacus-hooks", "opacus-ghost")
PLACED = """
import torch
from torch import nn

class Last(nn.Module):
    def forward(self, x):
        # as another kernel would round the last rows of a pass: by less than admission looks for
        last = torch.arange(len(x)) >= len(x) - 3
        return torch.where(last[:, None] & (len(x) > 1), x * (1 + 2**-22), x)

class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return 1.0 * x

    @staticmethod
    def backward(context, gradient):
        last = torch.arange(len(gradient)) >= len(gradient) - 3
        scaled = gradient * (1 + 2**-22)
        return torch.where(last[:, None] & (len(gradient) > 1), scaled, gradient)

class Behind(nn.Module):
    def forward(self, x):
        return Scaled.apply(x)

def by_place(shape, classes):
    return nn.Sequential(nn.Flatten(), Last(), nn.Linear(64, classes))

def behind(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Behind(), nn.Linear(8, classes))
"""


@pytest.mark.parametrize("most", [1, 7, 16, 60, 256])
def test_size_holds_its_batch_and_is_not_over_what_memory_holds(most: int) -> None:
    for count in range(1, most + 1):
        size = filled(count, most)
        assert count <= size <= most
        assert size <= max(LEAST, count + 3, 1.125 * count)
        assert filled(size, most) == size


def test_plan_holds_nearly_every_batch_that_may_be_drawn() -> None:
    generator = np.random.default_rng(1)
    for expected in (1.0, 20.0, 64.0, 150.0):
        drawn = generator.binomial(int(100 * expected), 0.01, 1000)
        assert (drawn <= planned(expected, 1000)).mean() > 0.97


def even(size: int) -> bool:
    return True


class Kernels:
    """Gives sizes from `switch` on other numbers than those below."""

    def __init__(self, switch: int, factor: float = 1 + 2**-23) -> None:
        self.switch, self.factor, self.asked = switch, factor, list[int]()

    def probe(self, size: int) -> list[Tensor]:
        self.asked.append(size)
        found = torch.linspace(0.5, 1.0, 40, dtype=torch.float64)
        return [found * (self.factor if size >= self.switch else 1.0)]


@pytest.mark.parametrize("switch", [1, 24, 70, 97, 10_000])
@pytest.mark.parametrize("most", [1, 16, 60, 256])
def test_no_piece_has_another_kernel_than_the_planned_size(switch: int, most: int) -> None:
    kernels = Kernels(switch)
    sizes = Sizes(kernels.probe, even)
    plan = planned(64.0, most)
    for count in range(3 * most + 70):
        pieces = list(sizes.pieces(count, expected=64.0, most=most))
        rows = [row for part, _ in pieces for row in range(part.start, part.stop)]
        assert rows == list(range(count))
        for part, size in pieces:
            assert part.stop - part.start <= size <= most
            assert (size >= switch) == (plan >= switch)
    assert len(kernels.asked) <= 1 + len({filled(n, most) for n in range(1, most + 1)})


@pytest.mark.parametrize("factor", [0.0, np.nan, np.inf])
def test_numbers_that_prove_nothing_leave_the_planned_size_alone(factor: float) -> None:
    sizes = Sizes(Kernels(1, factor).probe, even)
    assert {size for _, size in sizes.pieces(500, expected=64.0, most=256)} == {planned(64.0, 256)}


def contract_of(world: Any, name: str, data: DataTerms = IMAGES, **more: Any) -> Any:
    return world.contract(
        model=ModelTerms(name=name, options=more.pop("options", {})),
        data=data,
        training=TrainingTerms(local_steps=3, learning_rate=0.1),
        privacy={"sampling_rate": 1.0, "noise_multiplier": 1.5, "clip_norm": 1.0, **more},
    )


def kernel_of(trainer: Trainer, count: int) -> Tensor:
    layer = next(layer for layer in trainer._model.modules() if isinstance(layer, nn.Linear))
    blank = torch.full((count, layer.in_features), float(np.float32(-IMAGES.offset / IMAGES.scale)))
    with torch.no_grad():
        return layer(blank)[0].double()


def hostile(trainer: Trainer) -> tuple[dict[str, np.ndarray], int]:
    """Returns weights by which a blank image's class says how many lie beside it, and that number.

    What a hidden unit is given cancels to rounding, which is another from some size on.
    """
    generator = np.random.default_rng(0)
    weights = {name: np.zeros(shape, np.float32) for name, shape in trainer.shapes.items()}
    into, _, out, bias = weights
    for row in weights[into]:
        places = generator.permutation(784)
        row[places[:392]] = generator.random(392) * 1000
        row[places[392:]] = -row[places[:392]]
    trainer._load(weights)
    below = {count: kernel_of(trainer, count) for count in range(8, 150)}
    found = [n for n in range(9, 150) if not torch.equal(below[n], below[n - 1])]
    if not found:
        pytest.skip("every size has the same kernel here")
    first, second = (below[count].numpy() for count in (found[0] - 1, found[0]))
    turned = 1000 * np.sign(second - first)
    middle = float((turned * (np.tanh(first) + np.tanh(second)) / 2).sum())
    weights[out][0], weights[out][1] = turned, -turned
    weights[bias][:] = -1000
    weights[bias][0], weights[bias][1] = -middle, middle
    return weights, found[0]


def sums(trainer: Trainer, examples: Examples, count: int) -> Tensor:
    found = trainer._sums.of(examples, np.arange(count), None, 64.0)
    return torch.cat([value.flatten() for value in found])


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_turn_rounding_into_classes_move_one_example_and_no_other(
    world: Any, mode: Any
) -> None:
    contract = contract_of(world, "mlp", options={"hidden": 128, "activation": "tanh"})
    trainer = Trainer(contract, Execution(mode=mode))
    weights, switch = hostile(trainer)
    trainer.check(weights)
    blank = Examples(np.zeros((switch, *IMAGES.shape), np.uint8), np.zeros(switch, np.int64))
    trainer._load(weights)
    moved = sums(trainer, blank, switch) - sums(trainer, blank, switch - 1)
    assert float(moved.norm()) <= 1.0

    # That is what the attack would do to a batch of its own size.
    found = []
    for count in (switch, switch - 1):
        totals = zeros(trainer._sums.parameters)
        trainer._sums._summer.add_(totals, *trainer._sums.batch(blank, np.arange(count)))
        found.append(torch.cat([value.flatten() for value in totals.values()]))
    assert float((found[0] - found[1]).norm()) > 2.0


VALUES = DataTerms(name="arrays", shape=(4,), classes=1, task="value")
ROWS = 64 * 3


def by_place(trainer: Trainer, size: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """Returns weights by which equal rows of a pass answer otherwise at its end, and those rows.

    The answers differ by rounding alone, which 1,000 times a hidden unit makes the larger part of.
    """
    generator = np.random.default_rng(0)
    weights = {name: np.zeros(shape, np.float32) for name, shape in trainer.shapes.items()}
    into, _, out, bias = weights
    ones = torch.ones(size, *VALUES.shape)
    for _ in range(4000):
        weights[into][:] = generator.normal(size=weights[into].shape)
        weights[out][:] = 1000 * np.sign(generator.normal(size=weights[out].shape))
        weights[bias][:] = 0
        trainer._load(weights)
        with torch.no_grad():
            answers = trainer._model(ones).unique()
            if len(answers) < 2 or float(answers.abs().max()) > 999:
                continue
            weights[bias][:] = -float(answers[0] + answers[-1]) / 2
            trainer._load(weights)
            found = trainer._model(ones)[:, 0]
        if found.min() < 0 < found.max():
            return weights, torch.nonzero(found != found[0]).flatten().tolist()
    pytest.skip("every place of a pass has the same numbers here")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("nominal", "physical"), [(ROWS, 20), (20, None), (30, 24), (ROWS, 100)])
def test_weights_that_turn_the_place_into_signs_move_one_example_and_no_other(
    world: Any, mode: Any, nominal: int, physical: int | None
) -> None:
    """The rows behind an example move up by one where it is gone."""
    contract = contract_of(
        world, "mlp", VALUES, options={"hidden": 3, "activation": "selu"}, clip_norm=1e-3
    )
    trainer = Trainer(contract, Execution(mode=mode, physical_batch=physical))
    size = planned(float(nominal), physical or 256)
    weights, odd = by_place(trainer, size)
    trainer.check(weights)
    trainer._load(weights)
    # Those whose neighbour before them answers otherwise would all turn; the others add nothing.
    turning = [
        row
        for row in range(1, nominal)
        if row % size in odd and (row % size == 0 or (row - 1) % size not in odd)
    ]
    targets = np.full(nominal, np.nan, np.float32)
    targets[turning] = 0
    data = Examples(np.ones((nominal, *VALUES.shape), np.float32), targets)
    fewer = Examples(data.inputs[1:], data.targets[1:])

    def summed(examples: Examples, by: Any) -> Tensor:
        found = by(examples, np.arange(len(examples)), None, float(nominal))
        return torch.cat([value.flatten() for value in found])

    moved = summed(data, trainer._sums.of) - summed(fewer, trainer._sums.of)
    assert float(moved.norm()) <= 1e-3

    def at_its_place(examples: Examples, rows: Any, *_: Any) -> list[Tensor]:
        totals = zeros(trainer._sums.parameters)
        for start in range(0, len(rows), size):
            inputs, wanted = trainer._sums.batch(examples, rows[start : start + size])
            counted = torch.arange(size) < len(inputs)
            trainer._sums._summer.add_(totals, fill(inputs, size), fill(wanted, size), counted)
        return list(totals.values())

    # That is what the attack would do where sizes followed the batch alone.
    assert turning
    moved = summed(data, at_its_place) - summed(fewer, at_its_place)
    assert float(moved.norm()) > 1e-3


@pytest.mark.parametrize("most", [1, 7, 64, 100, 256])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 500])
def test_sizes_are_multiples_of_their_unit_or_one(most: int, count: int) -> None:
    sizes = Sizes(Kernels(10_000).probe, even, 64)
    pieces = list(sizes.pieces(count, expected=64.0, most=most))
    assert [row for part, _ in pieces for row in range(part.start, part.stop)] == [*range(count)]
    assert {size % 64 == 0 and size <= most for _, size in pieces} == {most >= 64}
    if most < 64:
        assert {size for _, size in pieces} == {1}


def test_where_equal_examples_differ_in_one_pass_each_has_its_own() -> None:
    sizes = Sizes(Kernels(10_000).probe, lambda size: size == 1)
    pieces = sizes.pieces(5, expected=64.0, most=256)
    assert list(pieces) == [(slice(row, row + 1), 1) for row in range(5)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["placed:by_place", "placed:behind"])
def test_a_model_that_answers_by_the_place_runs_each_example_alone(
    world: Any, mode: Any, name: str, install: Callable[[str, str], None]
) -> None:
    install("placed", PLACED)
    data = DataTerms(name="made-up", shape=(1, 8, 8), classes=10)
    trainer = Trainer(contract_of(world, name, data, sampling_rate=0.2), Execution(mode=mode))
    pieces = trainer._sums._trials.sizes.pieces(3, expected=20.0, most=256)
    assert [size for _, size in pieces] == [1, 1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_passes_have_public_sizes_and_count_what_was_drawn(world: Any, mode: Any) -> None:
    contract = contract_of(world, "linear", sampling_rate=0.4)
    trainer = Trainer(contract, Execution(mode=mode, physical_batch=64))
    generator = np.random.default_rng(2)
    inputs = generator.integers(0, 256, (200, *IMAGES.shape)).astype(np.uint8)
    data, inner, seen = Examples(inputs, generator.integers(0, 10, 200)), trainer._sums._adder, []

    class Noting:
        def add_(self, totals: Any, inputs: Tensor, targets: Tensor, counted: Tensor) -> None:
            seen.append((len(inputs), int(counted.sum())))
            assert not inputs[~counted].any()
            inner.add_(totals, inputs, targets, counted)

    trainer._sums._adder = Noting()
    drawn = [len(RandomStream(bytes(32)).poisson_sample(200, 0.4))]
    weights = {name: np.zeros(shape, np.float32) for name, shape in trainer.shapes.items()}
    terms, stream = contract.cohort[0], RandomStream(bytes(32))
    trainer.train(terms=terms, examples=data, weights=weights, stream=stream)
    assert sum(counted for _, counted in seen[:2]) == drawn[0]
    assert all(size == filled(counted, 64) for size, counted in seen)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_what_tries_a_size_leaves_the_weights_as_they_were(world: Any, name: str) -> None:
    contract = contract_of(world, name, sampling_rate=0.3)
    generator = np.random.default_rng(2)
    inputs = generator.integers(0, 256, (120, *IMAGES.shape)).astype(np.uint8)
    data = Examples(inputs, generator.integers(0, 10, 120))
    trainer, updates = Trainer(contract, Execution()), []
    shapes = trainer.shapes.items()
    weights = {n: generator.normal(0, 0.1, s).astype(np.float32) for n, s in shapes}
    for _ in range(2):  # the second tries no size any more
        job = Job(contract.cohort[0], data, RandomStream(bytes(32)))
        updates.append(
            trainer.train(terms=job.terms, examples=data, weights=weights, stream=job.stream).arrays
        )
    assert trainer._sums._trials.sizes._alike
    for value in updates[0]:
        np.testing.assert_array_equal(updates[0][value], updates[1][value])


@pytest.mark.parametrize("model", [nn.Linear(30, 7), nn.Embedding(20, 5), nn.LayerNorm(12)])
def test_made_up_weights_are_of_their_layers_size(model: nn.Module) -> None:
    weights, one = admission.trial(model.parameters(), IMAGES)
    for parameter, found in zip(model.parameters(), weights, strict=True):
        assert found.shape == parameter.shape
        assert 0.01 < float(found.norm()) / len(parameter) ** 0.5 < 3.0
    assert (one.inputs.shape, one.targets.shape) == ((1, 1, 28, 28), (1,))
    assert abs(one.inputs.mean() - 72.9) < 20  # as it is read, before it is normalised


FACTORY = """
from torch import nn

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.out = nn.Embedding(50, 8, max_norm=1.0), nn.Linear(8, 2)

    def forward(self, rows):
        return self.out(self.tokens(rows).mean(1))

def tokens(shape, classes, *, vocabulary):
    return Tokens()
"""


def test_weight_that_a_pass_writes_into_is_never_released(
    world: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding that shortens the rows it is asked for would tell which ones those are."""
    (tmp_path / "shortening.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = DataTerms(name="made-up", shape=(6,), classes=2, vocabulary=50)
    contract = contract_of(world, "shortening:tokens", data)
    with pytest.raises(ModelRejected, match=r"'tokens\.weight' while it answers.*max_norm"):
        Trainer(contract, Execution())

    admitted: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    monkeypatch.setattr(admission, "admit_once", admitted)
    with pytest.raises(ModelRejected, match="changes its weights while it answers"):
        Trainer(contract, Execution())
