from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.shared.errors import UsageError
from bract.shared.privacy import accounting, calibration, forecast
from bract.shared.privacy.events import Event, PoissonGaussian
from bract.shared.privacy.orders import best_order
from bract.shared.terms import LEAST_NOISE

SETTINGS = [
    (3.0, 1e-5, 0.1, 100),
    (1.0, 1e-6, 0.01, 1000),
    (8.0, 1e-5, 0.5, 20),
    (0.5, 1e-7, 0.05, 300),
    (20.0, 1e-3, 1.0, 1),
    # the root that the solver finds lies a digit above the least
    (3.0828361079500004, 3.012218943310965e-05, 0.03180264367278835, 18),
]


def one_digit(sigma: float) -> float:
    """Returns the last of sigma's four digits as a number."""
    return 10.0 ** (math.floor(math.log10(sigma)) - 3)


@pytest.mark.parametrize(("target", "delta", "rate", "steps"), SETTINGS)
def test_noise_is_the_least_of_four_digits_on_the_private_side(
    target: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibration.noise_multiplier(
        epsilon_target=target, delta=delta, sampling_rate=rate, steps=steps
    )
    assert sigma == float(f"{sigma:.4g}")
    less = sigma - one_digit(sigma)
    assert accounting.epsilon([PoissonGaussian(rate, sigma, steps)], delta) <= target
    assert accounting.epsilon([PoissonGaussian(rate, less, steps)], delta) > target


@pytest.mark.parametrize(("target", "delta", "rate", "steps"), SETTINGS)
def test_noise_for_a_filter_is_the_least_that_it_admits(
    target: float, delta: float, rate: float, steps: int
) -> None:
    order = best_order(target, delta)
    sigma = calibration.noise_for_filter(
        limit=target, delta=delta, order=order, sampling_rate=rate, steps=steps
    )
    less = sigma - one_digit(sigma)
    for noise, fits in ((sigma, True), (less, False)):
        found = accounting.filter_epsilon([PoissonGaussian(rate, noise, steps)], delta, order)
        assert (found <= target) is fits


@given(st.floats(1e-3, 1e4))
def test_digits_are_stepped_without_a_gap(root: float) -> None:
    sigma = calibration._round_up(root)
    assert sigma >= root * (1 - 1e-9)
    less = calibration._one_digit_less(sigma)
    assert less < sigma
    assert calibration._round_up(less) == less
    assert calibration._round_up((less + sigma) / 2) == sigma


@pytest.mark.parametrize("target", [math.nan, 0.0, -1.0, math.inf, -math.inf])
def test_an_epsilon_that_is_no_budget_is_refused(target: float) -> None:
    for call in (
        lambda: calibration.check_budget(target, 1e-5),
        lambda: calibration.noise_multiplier(
            epsilon_target=target, delta=1e-5, sampling_rate=0.1, steps=10
        ),
    ):
        with pytest.raises(UsageError, match=r"epsilon .* must be"):
            call()


@pytest.mark.parametrize("delta", [math.nan, 0.0, 1.0, -1e-5, 2.0, math.inf])
def test_a_delta_outside_zero_and_one_is_refused(delta: float) -> None:
    with pytest.raises(UsageError, match=r"delta .* must be"):
        calibration.noise_multiplier(epsilon_target=1.0, delta=delta, sampling_rate=0.1, steps=10)


def test_a_small_epsilon_of_many_steps_has_its_noise() -> None:
    """The rounding of PLD's grid adds up: its ε is over the filter's there."""
    sigma = calibration.noise_multiplier(
        epsilon_target=0.2, delta=1e-5, sampling_rate=0.286, steps=4800
    )
    spent = accounting.epsilon([PoissonGaussian(0.286, sigma, 4800)], 1e-5)
    assert 0.195 < spent <= 0.2


def test_a_ceiling_under_the_target_binds_both_ways_of_counting() -> None:
    """By a gate's rule, for a small ε of many steps too, where PLD tells more than the filter."""
    order = best_order(0.2, 1e-5)
    sigma = calibration.noise_within(
        epsilon_target=0.3, ceiling=(0.2, order), delta=1e-5, sampling_rate=0.286, steps=4800
    )
    events = [PoissonGaussian(0.286, sigma, 4800)]
    assert accounting.filter_epsilon(events, 1e-5, order) < accounting.epsilon(events, 1e-5)
    assert accounting.fits(events, limit=0.2, delta=1e-5, order=order)


def test_a_budget_that_no_noise_keeps_is_refused_with_a_remedy() -> None:
    with pytest.raises(UsageError, match="fewer steps or more epsilon"):
        calibration.noise_multiplier(
            epsilon_target=0.01, delta=1e-9, sampling_rate=1.0, steps=10**7
        )


@pytest.mark.parametrize("prior", [(), (PoissonGaussian(0.5, 2.0, 4),)], ids=["fresh", "spent"])
@pytest.mark.parametrize("order", [None, 8], ids=["pld", "filter"])
def test_the_most_steps_fit_and_one_more_does_not(
    prior: tuple[Event, ...], order: int | None
) -> None:
    terms = {"limit": 4.0, "delta": 1e-5, "order": order}

    def fits(steps: int) -> bool:
        return accounting.fits((*prior, PoissonGaussian(0.1, 1.2, steps)), **terms)

    most = forecast.greatest_that_fits(fits, 10**7)
    assert most > 1
    assert fits(most)
    assert not fits(most + 1)


def test_a_spent_budget_holds_no_step() -> None:
    prior = (PoissonGaussian(1.0, 0.5, 4),)

    def fits(steps: int) -> bool:
        events = (*prior, PoissonGaussian(0.1, 1.0, steps))
        return accounting.fits(events, limit=1.0, delta=1e-5, order=None)

    assert forecast.greatest_that_fits(fits, 10**7) == 0


def test_noise_leaves_room_for_what_else_the_budget_must_hold() -> None:
    beside = [PoissonGaussian(1.0, 8.0, 5)]
    wanted = {"delta": 1e-5, "sampling_rate": 0.1, "steps": 100}
    alone = calibration.noise_multiplier(epsilon_target=3.0, **wanted)
    sigma = calibration.noise_multiplier(epsilon_target=3.0, **wanted, beside=beside)
    assert sigma > alone
    for noise, fits in ((sigma, True), (sigma - one_digit(sigma), False)):
        total = accounting.epsilon([PoissonGaussian(0.1, noise, 100), *beside], 1e-5)
        assert (total <= 3.0) is fits
    order = best_order(3.0, 1e-5)
    for_filter = calibration.noise_for_filter(limit=3.0, order=order, **wanted, beside=beside)
    for noise, fits in ((for_filter, True), (for_filter - one_digit(for_filter), False)):
        events = [PoissonGaussian(0.1, noise, 100), *beside]
        assert (accounting.filter_epsilon(events, 1e-5, order) <= 3.0) is fits


def test_evaluations_that_take_the_whole_budget_are_named_in_the_error() -> None:
    with pytest.raises(UsageError, match=r"and 50 evaluations within epsilon 1.*noisier evalu"):
        calibration.noise_multiplier(
            epsilon_target=1.0,
            delta=1e-5,
            sampling_rate=0.1,
            steps=10,
            beside=[PoissonGaussian(1.0, 2.0, 50)],
        )


@pytest.mark.parametrize("target", [0.01, 0.015])
def test_a_small_epsilon_that_no_filter_tells_is_calibrated_by_pld(target: float) -> None:
    terms = {"delta": 1e-5, "sampling_rate": 0.05, "steps": 100}
    sigma = calibration.noise_multiplier(epsilon_target=target, **terms)
    events = [PoissonGaussian(0.05, sigma, 100)]
    assert 0.8 * target < accounting.epsilon(events, 1e-5) <= target


def test_no_noise_under_the_least_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate so small that any noise will do: there is no least."""
    terms = {"delta": 9e-4, "sampling_rate": 5e-4, "steps": 1}
    assert calibration.noise_multiplier(epsilon_target=1.0, **terms) == LEAST_NOISE
    with pytest.raises(UsageError, match=r"epsilon 1001 must be 1000 or less to find its noise"):
        calibration.noise_multiplier(epsilon_target=1001, **terms)
