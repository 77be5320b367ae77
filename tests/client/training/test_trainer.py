"""A round at a site: what is drawn, how often, how it is scaled, and what leaves."""

from __future__ import annotations

import ast
import itertools
import multiprocessing
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from bract.client.training.execution import Execution
from bract.client.training.graphs import ReplayedSum
from bract.client.training.randomness import RandomStream, SecureRandomness
from bract.client.training.sums import BatchSums, Ready
from bract.client.training.together import Job
from bract.client.training.trainer import Trainer
from bract.shared import models
from bract.shared.contract import Contract
from bract.shared.data import Examples
from bract.shared.errors import ModelRejected
from bract.shared.terms import DataTerms, ModelTerms, TrainingTerms
from bract.shared.updates import ProtectedUpdate, UnprotectedUpdate

ROOT = Path(__file__).parents[3]
MODES = ("book-keeping", "opacus-hooks", "opacus-ghost")
STEPS, RATE = 4, 0.5
FACTORIES = """
import torch
from torch import nn

def partly(shape, classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, classes))
    model[1].weight.requires_grad_(False)
    return model

def twice(shape, classes):
    layer = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), layer, nn.Tanh(), layer, nn.Linear(64, classes))

def mixing(shape, classes):
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)
    return nn.Sequential(nn.Flatten(), Centred(), nn.Linear(64, classes))

def padded(shape, classes, vocabulary):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(vocabulary, 6, padding_idx=2)
            self.act, self.out = nn.ReLU(inplace=True), nn.Linear(6, classes)
        def forward(self, x):
            return self.out(self.act(self.tokens(x).mean(1)))
    return Padded()

def failing(shape, classes):
    class NotSixteen(nn.Module):
        def forward(self, x):
            if len(x) == 16:  # as many as a small batch is filled up to, and admission never asks
                raise ValueError("sixteen\\nexamples")
            return x
    return nn.Sequential(nn.Flatten(), NotSixteen(), nn.Linear(64, classes))
"""


class Watching(RandomStream):
    """A stream that remembers what was asked of it."""

    def __init__(self, key: bytes = bytes(32)) -> None:
        super().__init__(key)
        self.normal_counts: list[int] = []
        self.samples: list[tuple[int, float, int]] = []
        self.threads: set[int] = set()

    def normals(self, count: int) -> np.ndarray:
        self.threads.add(threading.get_ident())
        self.normal_counts.append(count)
        return super().normals(count)

    def poisson_sample(self, population: int, rate: float) -> np.ndarray:
        rows = super().poisson_sample(population, rate)
        self.samples.append((population, rate, len(rows)))
        return rows


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def examples(count: int = 60, value: float | None = None) -> Examples:
    generator = np.random.default_rng(3)
    inputs = generator.integers(0, 17, (count, 1, 8, 8)).astype(np.float32)
    if value is not None:
        inputs[:] = value
    return Examples(inputs=inputs, targets=generator.integers(0, 10, count))


def terms_of(world: Any, **changes: Any) -> Contract:
    training = {"local_steps": STEPS, "learning_rate": 0.5, **changes.pop("training", {})}
    privacy = {"sampling_rate": RATE, **changes.pop("privacy", {})}
    return world.contract(training=TrainingTerms(**training), privacy=privacy, **changes)


def zeros(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in trainer.shapes.items()}


def start(trainer: Trainer) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {
        name: generator.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in trainer.shapes.items()
    }


def train(
    trainer: Trainer, contract: Contract, data: Examples, stream: RandomStream, **more: Any
) -> dict[str, np.ndarray]:
    update = trainer.train(
        **{
            "terms": contract.cohort[0],
            "examples": data,
            "weights": start(trainer),
            "stream": stream,
            **more,
        }
    )
    return dict(update.arrays)


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)]).astype(np.float64)


def pure_noise(
    trainer: Trainer, contract: Contract, keys: list[bytes], **more: Any
) -> list[np.ndarray]:
    """Updates to which no example adds anything, since each of them holds NaN."""
    data = examples(value=np.nan)
    more = {"weights": zeros(trainer), **more}
    return [flat(train(trainer, contract, data, RandomStream(key), **more)) for key in keys]


def scale_holds(values: np.ndarray, stddev: float) -> bool:
    """χ² of the scale, by its normal limit, at five deviations either way; and the mean."""
    n = len(values)
    chi = (np.square(values / stddev).sum() - n) / (2 * n) ** 0.5
    return bool(abs(chi) < 5 and abs(values.mean() / stddev * n**0.5) < 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["linear", "cnn"])
def test_released_noise_has_the_scale_of_the_contract(world: Any, model: str, mode: str) -> None:
    contract = terms_of(world, model=ModelTerms(name=model))
    trainer = Trainer(contract, Execution(mode=mode))
    noise = np.concatenate(pure_noise(trainer, contract, [key(n) for n in range(12)]))
    privacy, size = contract.privacy, contract.cohort[0].nominal_size
    a_step = 0.5 * privacy.noise_multiplier * privacy.clip_norm / (RATE * size)
    stddev = a_step * STEPS**0.5
    assert scale_holds(noise, stddev)
    for factor in (0.8, 1.2, 0.0):
        assert not scale_holds(factor * noise, stddev)
    assert not scale_holds(noise, stddev * 1.1)


def test_every_tensor_has_noise_of_the_same_scale_and_of_its_own(world: Any) -> None:
    contract = terms_of(world, model=ModelTerms(name="mlp", options={"hidden": 8}))
    trainer = Trainer(contract, Execution())
    stddev = 0.5 * 1.5 / (RATE * 100) * STEPS**0.5
    rounds = [
        train(
            trainer, contract, examples(value=np.nan), RandomStream(key(n)), weights=zeros(trainer)
        )
        for n in range(30)
    ]
    for name in trainer.shapes:
        assert scale_holds(np.concatenate([r[name].ravel() for r in rounds]), stddev), name
    heads = [np.concatenate([r[n].ravel()[:8] for r in rounds]) for n in trainer.shapes]
    assert not any(correlated(a, b) for a, b in itertools.combinations(heads, 2))


def correlated(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(abs(np.corrcoef(one, other)[0, 1]) > 5 / len(one) ** 0.5)


def test_noise_of_two_rounds_is_uncorrelated(world: Any) -> None:
    contract = terms_of(world, training={"local_steps": 1})
    trainer = Trainer(contract, Execution())
    secure = SecureRandomness()
    data, weights = examples(value=np.nan), zeros(trainer)
    one, other = (
        flat(train(trainer, contract, data, secure.stream(1), weights=weights)) for _ in range(2)
    )
    assert abs(np.corrcoef(one, other)[0, 1]) < 7 / len(one) ** 0.5  # not a fixed stream
    a, b, again = pure_noise(trainer, contract, [key(1), key(2), key(1)])
    assert not correlated(a, b)
    assert correlated(a, again)  # a key used again is flagged


def test_noise_of_the_steps_of_one_round_is_uncorrelated(world: Any) -> None:
    """Else the variance of a round would not be the sum over its steps."""
    contract = terms_of(world, training={"local_steps": 1})
    single = Trainer(contract, Execution())
    stream = RandomStream(key(4))
    a, b = (
        flat(train(single, contract, examples(value=np.nan), stream, weights=zeros(single)))
        for _ in range(2)
    )
    assert not correlated(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_pieces_change_neither_the_update_nor_what_is_drawn(world: Any, mode: str) -> None:
    contract = terms_of(world, model=ModelTerms(name="mlp"))
    updates, drawn = [], []
    for size in (1, 7, 256):
        trainer, stream = Trainer(contract, Execution(mode=mode, physical_batch=size)), Watching()
        updates.append(flat(train(trainer, contract, examples(), stream)))
        drawn.append((stream.normal_counts, stream.samples))
    parameters = sum(v.size for v in start(trainer).values())
    assert all(draw == drawn[0] for draw in drawn)
    assert sum(drawn[0][0]) == STEPS * parameters
    for update in updates[:-1]:
        np.testing.assert_allclose(update, updates[-1], atol=1e-6)
    other = flat(train(trainer, contract, examples(), Watching(key(9))))
    assert np.abs(other - updates[-1]).max() > 1e-3


@pytest.mark.parametrize("model", ["linear", "cnn"])
def test_noise_that_a_thread_draws_ahead_is_that_of_the_step(world: Any, model: str) -> None:
    contract = terms_of(world, model=ModelTerms(name=model))
    updates, drawn = [], []
    for ahead in (True, False):
        trainer, stream = Trainer(contract, Execution(noise_ahead=ahead)), Watching()
        updates.append(flat(train(trainer, contract, examples(), stream)))
        drawn.append((stream.normal_counts, stream.samples))
        here = stream.threads == {threading.get_ident()}
        assert here is not ahead
    assert drawn[0] == drawn[1]
    np.testing.assert_array_equal(*updates)


def test_a_forked_process_draws_ahead_by_a_thread_of_its_own(world: Any) -> None:
    """A thread does not outlive a fork, and work that is given to it then waits for ever."""
    contract = terms_of(world)
    trainer = Trainer(contract, Execution(noise_ahead=True))
    expected = flat(train(trainer, contract, examples(), RandomStream(key(1))))
    forked = multiprocessing.get_context("fork")
    ours, theirs = forked.Pipe()

    def work() -> None:
        theirs.send(flat(train(trainer, contract, examples(), RandomStream(key(1)))))

    process = forked.Process(target=work)
    process.start()
    assert ours.poll(60)
    np.testing.assert_array_equal(ours.recv(), expected)
    process.join()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_empty_batches_are_noised_steps_like_any_other(world: Any, count: int) -> None:
    contract = terms_of(world, privacy={"sampling_rate": 1e-3}, training={"local_steps": 6})
    trainer, stream = Trainer(contract, Execution()), Watching()
    update = flat(train(trainer, contract, examples(count), stream))
    assert stream.samples == [(count, 1e-3, 0)] * 6
    assert sum(stream.normal_counts) == 6 * 650
    assert scale_holds(update, 0.5 * 1.5 / (1e-3 * 100) * 6**0.5)


def test_sample_is_drawn_once_a_step_at_the_rate_of_the_contract(world: Any) -> None:
    contract = terms_of(world, privacy={"sampling_rate": 0.3}, training={"local_steps": 50})
    trainer, stream = Trainer(contract, Execution(physical_batch=4)), Watching()
    train(trainer, contract, examples(80), stream)
    assert [(n, q) for n, q, _ in stream.samples] == [(80, 0.3)] * 50
    sizes = np.array([size for _, _, size in stream.samples])
    assert len(set(sizes)) > 5
    assert abs(sizes.mean() - 24) < 5 * (80 * 0.3 * 0.7 / 50) ** 0.5


def test_at_rate_one_every_example_is_in_every_step(world: Any) -> None:
    contract = terms_of(world, privacy={"sampling_rate": 1.0})
    trainer, stream = Trainer(contract, Execution()), Watching()
    train(trainer, contract, examples(33), stream)
    assert stream.samples == [(33, 1.0, 33)] * STEPS


def test_normaliser_is_public_and_tells_nothing_of_the_true_size(world: Any) -> None:
    contract = terms_of(world)
    trainer = Trainer(contract, Execution())
    weights = zeros(trainer)
    few, many = (
        flat(train(trainer, contract, examples(n, np.nan), Sampling(n), weights=weights))
        for n in (5, 400)
    )
    np.testing.assert_array_equal(few, many)
    larger = contract.cohort[0].model_copy(update={"nominal_size": 200})
    halved = flat(
        train(trainer, contract, examples(5, np.nan), Sampling(5), weights=weights, terms=larger)
    )
    np.testing.assert_allclose(halved, few / 2, rtol=1e-5)


class Sampling(RandomStream):
    """A stream whose samples come from another one, so that normals do not depend on n."""

    def __init__(self, population: int) -> None:
        super().__init__(bytes(32))
        self._other = RandomStream(key(population))

    def poisson_sample(self, population: int, rate: float) -> np.ndarray:
        return self._other.poisson_sample(population, rate)


class Silent(RandomStream):
    """A stream whose normals are zero, to see the sums."""

    def normals(self, count: int) -> np.ndarray:
        return np.zeros(count)


@pytest.mark.parametrize("mode", MODES)
def test_one_example_moves_the_update_by_no_more_than_its_bound(world: Any, mode: str) -> None:
    contract = terms_of(
        world, training={"local_steps": 1}, privacy={"sampling_rate": 1.0, "clip_norm": 0.01}
    )
    trainer, data = Trainer(contract, Execution(mode=mode)), examples(40)
    bound = 0.5 * 0.01 / 100
    with_all = flat(train(trainer, contract, data, Silent(key(1))))
    moves = [
        np.linalg.norm(
            with_all
            - flat(train(trainer, contract, data.take(np.delete(np.arange(40), r)), Silent(key(1))))
        )
        for r in range(5)
    ]
    assert 0.9 * bound < max(moves) <= bound


@pytest.mark.parametrize("mode", MODES)
def test_example_that_cannot_be_used_adds_nothing_and_tells_nothing(world: Any, mode: str) -> None:
    """NaN, infinities and labels that do not exist: the site trains, as if they were not there."""
    contract = terms_of(world, privacy={"sampling_rate": 1.0}, model=ModelTerms(name="mlp"))
    trainer, good = Trainer(contract, Execution(mode=mode)), examples(20)
    expected = flat(train(trainer, contract, good, Silent(key(1))))
    inputs = np.concatenate([good.inputs, good.inputs[:6]])
    for row, value in enumerate((np.nan, np.inf, -np.inf)):
        inputs[20 + row, 0, 3, 3] = value
    targets = np.concatenate([good.targets, [1, 2, 3, 10, -1, 2**40]])
    found = flat(train(trainer, contract, Examples(inputs, targets), Silent(key(1))))
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert np.abs(expected).max() > 1e-3


def test_update_is_exactly_the_released_parameters(world: Any, made: Callable[..., str]) -> None:
    contract = terms_of(world, model=ModelTerms(name=made("partly")))
    trainer = Trainer(contract, Execution())
    update = trainer.train(
        terms=contract.cohort[0],
        examples=examples(),
        weights=zeros(trainer),
        stream=RandomStream(key(1)),
    )
    assert type(update) is ProtectedUpdate
    assert {name: value.shape for name, value in update.arrays.items()} == {
        "1.bias": (8,),
        "3.weight": (10, 8),
        "3.bias": (10,),
    }
    assert all(value.dtype == np.float32 for value in update.arrays.values())


def test_weights_of_the_order_are_where_the_round_begins(world: Any) -> None:
    """Nothing of an earlier round is left in a model kept warm, nor in its momentum."""
    contract = terms_of(world, training={"momentum": 0.9})
    trainer = Trainer(contract, Execution())
    first = flat(train(trainer, contract, examples(), RandomStream(key(1))))
    train(trainer, contract, examples(), RandomStream(key(2)))
    np.testing.assert_array_equal(
        first, flat(train(trainer, contract, examples(), RandomStream(key(1))))
    )


@pytest.mark.parametrize("pieces_of", [7, 256])
def test_mechanism_none_is_plain_sgd_on_the_same_poisson_batches(
    world: Any, pieces_of: int
) -> None:
    contract = terms_of(
        world,
        simulation=True,
        model=ModelTerms(name="mlp"),
        privacy={"mechanism": "none", "noise_multiplier": 0.0, "clip_norm": 1e-3},
    )
    trainer, data = Trainer(contract, Execution(physical_batch=pieces_of)), examples()
    weights = start(trainer)
    update = trainer.train(
        terms=contract.cohort[0], examples=data, weights=weights, stream=RandomStream(key(3))
    )
    assert type(update) is UnprotectedUpdate

    stream = RandomStream(key(3))
    model = models.build("mlp", (1, 8, 8), 10, {})
    model.load_state_dict({name: torch.from_numpy(v.copy()) for name, v in weights.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        rows = stream.poisson_sample(len(data), RATE)
        logits = model(torch.from_numpy(data.inputs[rows]) / 16.0)
        loss = functional.cross_entropy(
            logits, torch.from_numpy(data.targets[rows]), reduction="sum"
        )
        optimizer.zero_grad()
        (loss / (RATE * 100)).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value.numpy() - weights[name], update.arrays[name], atol=1e-6)


@pytest.mark.parametrize("mechanism", ["dp-sgd", "user-level", "none"])
@pytest.mark.parametrize("task", ["classes", "next-token", "value"])
def test_what_is_made_ready_once_gives_the_very_numbers(
    world: Any, monkeypatch: pytest.MonkeyPatch, mechanism: str, task: str
) -> None:
    """Whatever cannot be read, which adds nothing: tokens, labels and values out of range."""
    text = task == "next-token"
    data = DataTerms(
        name="made-up",
        shape=(8,) if text else (1, 8, 8),
        classes=1 if task == "value" else 10,
        scale=2.0,
        task=task,
        vocabulary=10 if text else None,
    )
    generator = np.random.default_rng(5)
    shape = (60, *data.shape) if text else (60,)
    targets: np.ndarray = generator.integers(-1, 11, shape)
    if task == "value":
        targets = np.where(targets < 0, np.nan, targets)
    given = Examples(inputs=generator.integers(-1, 12, (60, *data.shape)), targets=targets)
    contract = terms_of(
        world,
        data=data,
        model=ModelTerms(name="transformer" if text else "mlp"),
        simulation=True,
        privacy={
            "mechanism": mechanism,
            "unit": "client" if mechanism == "user-level" else "example",
        },
    )
    trainer, made = Trainer(contract, Execution()), []

    def ready(summing: BatchSums, found: Examples) -> Any:
        made.append(original(summing, found))
        return made[-1] if len(made) == 1 else found

    original = BatchSums.ready
    monkeypatch.setattr(BatchSums, "ready", ready)
    once, each = (flat(train(trainer, contract, given, Watching())) for _ in range(2))
    assert all(isinstance(found, Ready) for found in made)
    assert np.array_equal(once, each)


@pytest.mark.parametrize(
    ("training", "count"),
    [
        pytest.param({"local_steps": 1}, 60, id="fewer are drawn than there are"),
        pytest.param({"augmentation": "shift-flip", "views": 2}, 60, id="each draw has its views"),
        pytest.param({}, 2**18 // 64 + 1, id="many"),
    ],
)
def test_what_is_not_drawn_again_is_made_ready_batch_by_batch(
    world: Any, training: dict[str, Any], count: int
) -> None:
    trainer = Trainer(terms_of(world, training=training), Execution())
    given = examples(count)
    assert trainer._sums.ready(given) is given


class Scarce:
    """A sum that lacks memory for more than `limit` examples, after some of the work is done."""

    def __init__(self, inner: Any, limit: int) -> None:
        self.inner, self.limit, self.failed = inner, limit, 0

    def add_(self, sums: dict[str, torch.Tensor], inputs: Any, targets: Any, counted: Any) -> None:
        if len(inputs) > self.limit:
            self.failed += 1
            self.inner.add_(sums, inputs[:1], targets[:1], counted[:1])
            raise torch.OutOfMemoryError("made up")
        self.inner.add_(sums, inputs, targets, counted)


@pytest.mark.parametrize("mode", MODES)
def test_lack_of_memory_makes_smaller_pieces_of_the_same_batch(world: Any, mode: str) -> None:
    contract = terms_of(world, model=ModelTerms(name="mlp"))
    trainer, plenty = Trainer(contract, Execution(mode=mode)), Watching()
    expected = flat(train(trainer, contract, examples(), plenty))
    scarce = Scarce(trainer._sums._adder, 3)
    trainer._sums._adder = scarce
    stream = Watching()
    np.testing.assert_allclose(
        flat(train(trainer, contract, examples(), stream)), expected, atol=1e-6
    )
    assert scarce.failed == 7  # from pieces of 256 to pieces of 2, in the first step alone
    assert stream.normal_counts == plenty.normal_counts
    assert stream.samples == plenty.samples


def test_graphs_go_where_memory_is_short(world: Any) -> None:
    """They hold memory of their own, which smaller pieces alone would not give back."""

    class Holding(ReplayedSum):
        forgotten = 0

        def add_(self, sums: dict[str, torch.Tensor], inputs: Any, *more: Any) -> None:
            if len(inputs) > 3:
                raise torch.OutOfMemoryError("made up")
            super().add_(sums, inputs, *more)

        def forget(self) -> None:
            self.forgotten += 1

    trainer = Trainer(terms_of(world), Execution())
    trainer._sums._adder = Holding(trainer._sums._summer, trainer._sums.parameters)
    trainer._sums._adder._records = False
    train(trainer, trainer._contract, examples(), Watching())
    assert trainer._sums._adder.forgotten == 7


def test_lack_of_memory_for_one_example_is_raised(world: Any) -> None:
    contract = terms_of(world)
    trainer, stream = Trainer(contract, Execution(noise_ahead=False)), Watching()
    trainer._sums._adder = Scarce(trainer._sums._adder, 0)
    with pytest.raises(torch.OutOfMemoryError):
        train(trainer, contract, examples(), stream)
    assert stream.normal_counts == []


@pytest.mark.parametrize(
    ("factory", "mode", "reason"),
    [
        ("twice", "opacus-ghost", "use the mode opacus-hooks"),
        ("mixing", "opacus-hooks", "mixes examples"),
        ("mixing", "opacus-ghost", "mixes examples"),
        ("mixing", "book-keeping", "mixes examples"),
        ("failing", "book-keeping", r"failing' fails on zeros: ValueError: sixteen examples"),
        ("failing", "opacus-hooks", r"failing' fails on zeros: ValueError: sixteen examples"),
    ],
)
def test_model_that_a_mode_cannot_take_is_refused_before_any_round(
    world: Any, made: Callable[..., str], factory: str, mode: str, reason: str
) -> None:
    with pytest.raises(ModelRejected, match=reason):
        Trainer(terms_of(world, model=ModelTerms(name=made(factory))), Execution(mode=mode))


@pytest.mark.parametrize("mode", ["book-keeping", "opacus-hooks"])
def test_parameter_used_twice_is_trained(world: Any, made: Callable[..., str], mode: str) -> None:
    contract = terms_of(world, model=ModelTerms(name=made("twice")))
    trainer = Trainer(contract, Execution(mode=mode))
    assert set(train(trainer, contract, examples(), Watching())) == set(trainer.shapes)
    assert len(trainer.shapes) == 4


def test_inputs_are_normalised_by_the_constants_of_the_contract(world: Any) -> None:
    raw = examples()
    shifted = Examples(inputs=raw.inputs * 3 + 5, targets=raw.targets)
    terms = {"name": "digits", "shape": (1, 8, 8), "classes": 10}
    updates = []
    for data, offset, scale in ((raw, 0.0, 16.0), (shifted, 5.0, 48.0)):
        contract = terms_of(world, data=DataTerms(offset=offset, scale=scale, **terms))
        trainer = Trainer(contract, Execution())
        updates.append(flat(train(trainer, contract, data, Silent(key(1)))))
    np.testing.assert_allclose(*updates, atol=1e-6)


def test_low_precision_products_are_off(world: Any) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    Trainer(terms_of(world), Execution())
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def makers(source: str) -> set[str]:
    """The kinds of update that a source file makes, whatever the module is called there."""
    kinds = {"ProtectedUpdate", "ClippedUpdate", "UnprotectedUpdate", "KINDS", "_KINDS"}
    calls = [n.func for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    called = [call.value if isinstance(call, ast.Subscript) else call for call in calls]
    names = {c.attr if isinstance(c, ast.Attribute) else getattr(c, "id", "") for c in called}
    aliases = [
        alias.asname
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in kinds and alias.asname
    ]
    assert not aliases
    return names & kinds


def test_only_training_makes_updates_and_only_gate_and_wire_restore_them() -> None:
    assert makers("updates.ProtectedUpdate({})") == {"ProtectedUpdate"}
    assert makers("updates.KINDS['none']({})") == {"KINDS"}
    found = {
        str(path.relative_to(ROOT))
        for floor in ("client", "server", "shared", "simulations")
        for path in (ROOT / floor).rglob("*.py")
        if makers(path.read_text())
    }
    planted = "simulations/audits/faults.py"  # which client and server cannot import
    assert found <= {"client/training/trainer.py", "client/gate.py", "shared/wire.py", planted}
    assert "client/training/trainer.py" in found


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Names of factories of installed code, as a contract gives them."""
    (tmp_path / "made_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_factories", raising=False)
    return lambda factory: f"made_factories:{factory}"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("mode", MODES)
def test_the_padding_of_an_embedding_stays_as_it_is_and_all_else_is_noised(
    world: Any, install: Callable[[str, str], None], mode: Any, momentum: float
) -> None:
    install("padded_factory", FACTORIES)
    contract = world.contract(
        model=ModelTerms(name="padded_factory:padded"),
        data=DataTerms(name="made-up", shape=(5,), classes=2, vocabulary=9),
        training=TrainingTerms(local_steps=3, learning_rate=0.5, momentum=momentum),
    )
    trainer = Trainer(contract, Execution(mode=mode))
    generator = np.random.default_rng(1)
    shapes = trainer.shapes.items()
    weights = {n: generator.normal(0, 0.1, s).astype(np.float32) for n, s in shapes}
    examples = Examples(generator.integers(0, 9, (40, 5)), generator.integers(0, 2, 40))
    jobs = [Job(contract.cohort[0], examples, SecureRandomness().stream(1)) for _ in range(2)]
    (update, _) = trainer.train_together(jobs, weights)
    moved = update.arrays["tokens.weight"] != 0
    assert not moved[2].any()
    assert np.delete(moved, 2, 0).all()
