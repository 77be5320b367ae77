"""Noise, grid and scale of one step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bract.client.training.noise import GRID_BITS, on_grid_, tensor_on_grid
from bract.client.training.optimizer import PrivateOptimizer, Sgd
from bract.client.training.randomness import RandomStream

SIGMA, CLIP, NORMALISER = 1.3, 0.7, 8.0
STDDEV = SIGMA * CLIP


class Counting(RandomStream):
    """A stream that remembers how many normals were drawn."""

    def __init__(self) -> None:
        super().__init__(bytes(32))
        self.drawn: list[int] = []

    def normals(self, count: int) -> np.ndarray:
        self.drawn.append(count)
        return super().normals(count)


def stepper(
    *shapes: tuple[int, ...], momentum: float = 0.0, sigma: float = SIGMA
) -> tuple[PrivateOptimizer, list[nn.Parameter], Counting]:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    stream = Counting()
    optimizer = PrivateOptimizer(
        torch.optim.SGD(parameters, lr=1.0, momentum=momentum),
        noise_multiplier=sigma,
        clip_norm=CLIP,
        normaliser=NORMALISER,
        stream=stream,
    )
    return optimizer, parameters, stream


@pytest.mark.parametrize("last", [4, 5])
def test_step_is_sum_plus_noise_over_the_public_normaliser(last: int) -> None:
    optimizer, parameters, stream = stepper((3, 1), (last,))
    sums = [torch.full((3, 1), 5.0, dtype=torch.float64), torch.arange(last, dtype=torch.float64)]
    optimizer.put(sums)
    optimizer.step()
    again = RandomStream(bytes(32))
    for parameter, value in zip(parameters, sums, strict=True):
        noise = again.normals(value.numel()).reshape(value.shape)
        expected = -(value.numpy() + STDDEV * noise) / NORMALISER
        np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=1e-6)
    assert len(stream.drawn) == 1


def test_a_gradient_that_is_one_number_seen_many_times_is_divided_too() -> None:
    optimizer, (parameter,), _ = stepper((4,), sigma=0.0)
    optimizer.put([torch.ones(()).expand(4)])  # as autograd gives of a plain sum
    optimizer.step()
    np.testing.assert_array_equal(parameter.detach().numpy(), np.full(4, -1 / NORMALISER))


def on_public_grid(values: np.ndarray) -> bool:
    multiples = values.astype(np.float64) / 2.0 ** (np.floor(np.log2(STDDEV)) - GRID_BITS)
    return bool(np.array_equal(multiples, np.rint(multiples)))


def test_released_sum_lies_on_the_public_grid() -> None:
    optimizer, (parameter,), _ = stepper((2000,))
    value = torch.rand(2000, dtype=torch.float64)
    optimizer.put([value])
    optimizer.add_noise()
    released = parameter.grad.numpy()
    assert on_public_grid(released)
    assert not on_public_grid(value.numpy() + STDDEV * RandomStream(bytes(32)).normals(2000))


@pytest.mark.parametrize("stddev", [1e-9, 0.7, 1.0, 3.0, 1e6])
def test_grid_is_a_power_of_two_that_follows_the_noise_and_not_the_values(stddev: float) -> None:
    values = stddev * RandomStream(bytes(32)).normals(1000)
    rounded = on_grid_(values.copy(), stddev)
    assert np.abs(rounded - values).max() <= stddev * 2.0**-GRID_BITS / 2
    step = np.min(np.diff(np.unique(np.abs(rounded))))
    assert np.frexp(2.0 ** np.floor(np.log2(stddev)))[0] == 0.5
    assert step >= stddev * 2.0 ** -(GRID_BITS + 1)


def test_without_noise_nothing_is_rounded() -> None:
    values = np.array([0.1, 1e-30])
    assert on_grid_(values, 0.0) is values


def test_noise_is_made_in_float64() -> None:
    """Noise of float32 beside this sum would vanish in it or move in steps of 64."""
    optimizer, (parameter,), _ = stepper((500,))
    optimizer.put([torch.full((500,), 2.0**40, dtype=torch.float64)])
    kept = {}

    def keep(values: np.ndarray, stddev: float) -> np.ndarray:
        kept["noise"] = values - 2.0**40
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bract.client.training.noise.on_grid_", keep)
        optimizer.add_noise()
    assert kept["noise"].std() == pytest.approx(STDDEV, rel=0.15)
    assert parameter.grad.dtype == torch.float32


def test_one_sum_is_never_noised_twice() -> None:
    optimizer, _, _ = stepper((3,))
    optimizer.put([torch.zeros(3)])
    optimizer.step()
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.step()


def test_sums_must_match_the_parameters() -> None:
    optimizer, _, _ = stepper((3,), (2,))
    with pytest.raises(ValueError, match="shorter"):
        optimizer.put([torch.zeros(3)])


def test_no_step_is_skipped_for_an_empty_batch() -> None:
    optimizer, (parameter,), stream = stepper((400,))
    optimizer.signal_skip_step(True)  # Opacus' way to skip one
    optimizer.put([torch.zeros(400)])
    optimizer.step()
    assert stream.drawn == [400]
    assert float(parameter.detach().std()) == pytest.approx(STDDEV / NORMALISER, rel=0.2)


def test_momentum_works_on_the_noised_gradient() -> None:
    optimizer, (parameter,), _ = stepper((50,), momentum=0.5)
    for _ in range(2):
        optimizer.put([torch.zeros(50)])
        optimizer.step()
        optimizer.zero_grad()
    first, second = np.split(RandomStream(bytes(32)).normals(100), 2)
    expected = -STDDEV / NORMALISER * (1.5 * first + second)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("stddev", [0.0, 1e-9, 0.7, 12345.0])
def test_the_grid_is_the_same_where_the_sums_are(stddev: float) -> None:
    values = stddev * np.random.default_rng(0).normal(size=1000) * 10
    released = tensor_on_grid(torch.from_numpy(values), stddev).numpy()
    assert np.array_equal(released, on_grid_(values, stddev))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_our_steps_are_those_of_torch(momentum: float) -> None:
    torch.manual_seed(1)
    ours = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    one = Sgd(ours, lr=0.1, momentum=momentum)
    other = torch.optim.SGD(theirs, lr=0.1, momentum=momentum)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    one.zero_grad()
    assert all(p.grad is None for p in ours)
