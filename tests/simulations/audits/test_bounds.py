"""Lower bounds hold for the mechanism they are asked of, and fall short of nothing they show."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bract.shared.errors import UsageError
from bract.shared.privacy import accounting
from bract.shared.privacy.events import PoissonGaussian
from bract.simulations.audits import bounds
from bract.simulations.audits.bounds import Told


def told(mu: float, count: int = 1000, seed: int = 0) -> Told:
    made_up = np.random.default_rng(seed)
    return Told(
        inside=mu * (made_up.standard_normal(count) + mu / 2),
        outside=mu * (made_up.standard_normal(count) - mu / 2),
        void=mu * (made_up.standard_normal(count) - mu / 2),
    )


def test_epsilon_of_a_gaussian_is_that_of_the_accountant() -> None:
    for mu in (0.5, 1.0, 3.0):
        exact = accounting.epsilon([PoissonGaussian(1.0, 1 / mu, 1)], 1e-5)
        assert bounds.epsilon_of_gaussian(mu) == pytest.approx(exact, abs=0.01)
    assert bounds.epsilon_of_gaussian(0.0) == 0.0


def test_one_run_bound_is_exact_where_all_guesses_are_right_and_delta_is_negligible() -> None:
    # p = (e^ε / (1 + e^ε))^m, but for δ's part
    found = bounds.one_run(canaries=1000, guesses=300, right=300, confidence=0.95)
    right = 0.05 ** (1 / 300)
    assert 0 < math.log(right / (1 - right)) - found < 0.1


def test_one_run_p_value_covers_randomised_response() -> None:
    made_up, epsilon = np.random.default_rng(1), 1.0
    share = math.exp(epsilon) / (1 + math.exp(epsilon))
    right = made_up.binomial(300, share, size=300)
    over = sum(bounds.one_run(300, 300, int(v), 0.95) > epsilon for v in right)
    assert over <= stats.binom.ppf(0.999, 300, 0.05)


@pytest.mark.parametrize("mu", [0.5, 1.5, 3.0])
def test_no_bound_exceeds_the_epsilon_of_the_gaussian_it_is_asked_of(mu: float) -> None:
    exact = bounds.epsilon_of_gaussian(mu)
    found = [bounds.lower_bounds(told(mu, seed=seed), 1 - 1e-5) for seed in range(20)]
    assert all(value <= exact for each in found for value in each.values())


def test_bounds_grow_with_what_is_told_apart() -> None:
    weak, strong = (bounds.lower_bounds(told(mu), 0.99) for mu in (0.5, 3.0))
    assert all(strong[method] > weak[method] for method in weak)
    assert strong["gaussian"] > strong["one_run_f_dp"] > strong["one_run"] > 1


def test_f_dp_recursion_rises_with_right_guesses_and_is_void_at_chance() -> None:
    found = [bounds.one_run_f_dp(1000, 300, right, 0.95) for right in (150, 200, 260, 300)]
    assert found[0] == 0.0
    assert found == sorted(found)


def test_ledger_that_charges_too_little_is_contradicted_and_an_honest_one_is_not() -> None:
    mu = 2.0
    found = told(mu, 4000)
    honest = (PoissonGaussian(1.0, 1 / mu, 1),)
    assert bounds.falsification(found, honest) > 1e-3
    assert bounds.falsification(found, (PoissonGaussian(1.0, 2 / mu, 1),)) < 1e-9


def test_true_positive_rate_is_told_only_where_strangers_suffice() -> None:
    rates = {rate.false_positive_rate: rate for rate in bounds.rates(told(2.0, 900))}
    assert rates[0.01].true_positive_rate is not None
    assert rates[0.01].low is not None
    assert rates[0.01].low < rates[0.01].true_positive_rate
    assert rates[0.001].true_positive_rate is None


def test_too_few_canaries_for_a_bound_say_how_many_it_takes() -> None:
    bounds.check_reach(2.0, 2000, 0.99)
    with pytest.raises(UsageError, match=r"200 canaries cannot show epsilon 4 .* it takes \d+$"):
        bounds.check_reach(4.0, 200, 0.99)
    with pytest.raises(UsageError, match="no number does"):
        bounds.check_reach(40.0, 200, 0.99)
