"""Local evaluation: what is counted, how far one example reaches, and how much noise leaves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from bract.client.training import scoring
from bract.client.training.execution import Execution
from bract.client.training.noise import GRID_BITS
from bract.client.training.randomness import RandomStream, SecureRandomness
from bract.client.training.trainer import Trainer
from bract.shared.data import Examples
from bract.shared.terms import EvaluationTerms
from bract.shared.updates import ProtectedScore

SIGMA = 3.0
STDDEV = math.sqrt(2) * SIGMA


def plainly(examples: Examples, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    return (
        torch.from_numpy(examples.inputs[rows]).float(),
        torch.from_numpy(examples.targets[rows]),
    )


def made_up(count: int, *, seed: int = 1, classes: int = 10) -> Examples:
    generator = np.random.default_rng(seed)
    return Examples(
        inputs=generator.random((count, 64)).astype(np.float32),
        targets=generator.integers(0, classes, count),
    )


def only(examples: Examples, rows: Any) -> Examples:
    return Examples(inputs=examples.inputs[rows], targets=examples.targets[rows])


class Cancelling(nn.Module):
    """Two logits whose difference is rounding alone: what a server would choose to do harm."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = torch.randn((512, 64), generator=generator)
        large = 100 * torch.randn(512, generator=generator)
        self.outer = torch.stack([large, large * (1 + 1e-7)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.inner.T) @ self.outer.T


def scores(total: int, sigma: float, *, draws: int = 4000) -> np.ndarray:
    stream = RandomStream(bytes(32))
    made = [scoring.protect(7, total, noise_multiplier=sigma, stream=stream) for _ in range(draws)]
    return np.array([[score.correct - 7, score.total - total] for score in made])


def is_noise_of(values: np.ndarray, stddev: float) -> bool:
    return all(stats.kstest(column / stddev, "norm").pvalue > 1e-4 for column in values.T)


def test_noise_is_sigma_times_the_square_root_of_two_on_each_count() -> None:
    noise = scores(100, SIGMA)
    assert is_noise_of(noise, STDDEV)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.07
    # negative controls: noise for a sensitivity of 1, a tenth less, and one draw for both
    assert not is_noise_of(noise, SIGMA)
    assert not is_noise_of(scores(100, SIGMA * 0.9, draws=20_000), STDDEV)
    assert not is_noise_of(np.zeros((100, 2)), STDDEV)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 40.0])
def test_what_leaves_lies_on_a_public_grid_that_follows_the_noise_alone(sigma: float) -> None:
    step = 2.0 ** (math.floor(math.log2(math.sqrt(2) * sigma)) - GRID_BITS)
    for total in (1, 10**6):
        values = scores(total, sigma, draws=50) / step
        assert np.array_equal(values, np.rint(values))


def test_a_score_takes_two_draws_of_the_stream_and_no_more() -> None:
    one, other = RandomStream(bytes(32)), RandomStream(bytes(32))
    scoring.protect(1, 2, noise_multiplier=1.0, stream=one)
    other.normals(2)
    assert one.words(4).tolist() == other.words(4).tolist()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 150), st.data())
def test_one_example_more_or_less_moves_the_pair_by_the_sensitivity_at_most(
    count: int, data: Any
) -> None:
    examples, model = made_up(count, classes=2), Cancelling().eval()
    gone = data.draw(st.integers(0, count - 1))
    rest = only(examples, np.delete(np.arange(count), gone))
    correct, total = scoring.counts(model, examples, plainly)
    fewer, left = scoring.counts(model, rest, plainly)
    assert 0 <= correct - fewer <= 1
    assert total - left == 1
    assert math.hypot(correct - fewer, total - left) <= scoring.SENSITIVITY


def test_an_answer_is_the_same_whoever_is_scored_beside_it() -> None:
    examples, model = made_up(200, classes=2), Cancelling().eval()
    together, _ = scoring.counts(model, examples, plainly)
    alone = sum(scoring.counts(model, only(examples, [row]), plainly)[0] for row in range(200))
    assert together == alone
    # negative control: batches as large as what is there change answers by rounding
    with torch.inference_mode():
        inputs, _ = plainly(examples, np.arange(200))
        at_once = model(inputs).argmax(1)
        one_by_one = torch.cat([model(inputs[row : row + 1]) for row in range(200)]).argmax(1)
    assert int((at_once != one_by_one).sum()) > 1


class Uneven(nn.Module):
    """Cancels to the rounding of one operation, which differs by the place where threads cut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.shift = width, 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.selu(x[:, :1].repeat(1, self.width))
        turned = 1000 * (hidden.sum(1) - self.shift)
        return torch.stack([turned, -turned], 1)


@pytest.mark.parametrize("width", [513, 1025, 2049])
def test_an_answer_is_the_same_whatever_its_place_in_a_batch(width: int) -> None:
    model, before = Uneven(width), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        differing = 0
        for value in np.linspace(-3, -0.1, 200):
            examples = Examples(np.full((64, 64), value, np.float32), np.zeros(64, np.int64))
            with torch.inference_mode():
                inputs, _ = plainly(examples, np.arange(64))
                sums = nn.functional.selu(inputs[:, :1].repeat(1, width)).sum(1)
            differing += len(sums.unique()) > 1
            model.shift = float(sums.double().mean())
            assert scoring.counts(model, examples, plainly)[0] in (0, 64)
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    if not differing:
        pytest.skip("every place of a batch has the same numbers here")


def test_nothing_to_score_is_no_answer_of_none() -> None:
    assert scoring.counts(Cancelling(), made_up(0), plainly) == (0, 0)


class Echo(nn.Module):
    """Logits are the first inputs."""

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return x[:, :3]


def test_logits_that_are_not_numbers_and_unknown_labels_are_counted_and_never_right() -> None:
    nan, inf = math.nan, math.inf
    rows = [[0, 1, 0], [nan, nan, nan], [0, nan, 0], [nan, 1, 0], [0, inf, 0], [0, 1, 0], [0, 1, 0]]
    inputs = np.zeros((7, 64), dtype=np.float32)
    inputs[:, :3] = rows
    examples = Examples(inputs=inputs, targets=np.array([1, 0, 1, 1, 1, -100, 7]))
    model = Echo().train()
    assert scoring.counts(model, examples, plainly) == (2, 7)
    assert model.training


def test_a_model_that_was_training_goes_on_training_though_it_failed() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError

    model = Failing().train()
    with pytest.raises(RuntimeError):
        scoring.counts(model, made_up(3), plainly)
    assert model.training


def trainer(world: Any, **changes: Any) -> Trainer:
    asked = EvaluationTerms(every=1, noise_multiplier=SIGMA)
    return Trainer(world.contract(**{"evaluation": asked, **changes}), Execution())


def test_the_received_weights_are_scored_and_not_the_trained_ones(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: list[tuple[int, int]] = []

    def protect(correct: int, total: int, **rest: Any) -> ProtectedScore:
        exact.append((correct, total))
        assert rest["noise_multiplier"] == SIGMA
        return ProtectedScore(0.0, 0.0)

    monkeypatch.setattr(scoring, "protect", protect)
    examples, agreed = world.examples(), world.contract()
    weights = world.order(world.sign(agreed)).weights  # zeros: the first class is the answer
    made = trainer(world)
    stream = SecureRandomness().stream(1)
    made.train(terms=agreed.cohort[0], examples=examples, weights=weights, stream=stream)
    made.score(examples=examples, weights=weights, stream=stream)
    assert exact == [(int((examples.targets == 0).sum()), 100)]


@pytest.mark.parametrize("mode", ["opacus-hooks", "opacus-ghost"])
def test_scoring_changes_nothing_of_what_is_trained_before_or_after(world: Any, mode: Any) -> None:
    agreed = world.contract(evaluation=EvaluationTerms(every=1, noise_multiplier=SIGMA))
    examples, weights = world.examples(), world.order(world.sign(agreed)).weights
    made = Trainer(agreed, Execution(mode=mode))

    def update() -> list[float]:
        stream = RandomStream(bytes(32))
        made_update = made.train(
            terms=agreed.cohort[0], examples=examples, weights=weights, stream=stream
        )
        return [float(value.sum()) for value in made_update.arrays.values()]

    before = update()
    made.score(examples=examples, weights=weights, stream=RandomStream(bytes(32)))
    assert update() == before


def test_without_terms_nothing_is_scored(world: Any) -> None:
    weights = world.order(world.sign(world.contract())).weights
    with pytest.raises(ValueError, match="asks for no evaluation"):
        trainer(world, evaluation=None).score(
            examples=world.examples(), weights=weights, stream=RandomStream(bytes(32))
        )
