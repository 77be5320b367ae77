"""Areas and rates against other implementations, and intervals that cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from bract.simulations.audits import roc


def scores(seed: int, members: int, others: int, shift: float = 1.0) -> tuple[roc.Floats, ...]:
    generator = np.random.default_rng(seed)
    return generator.normal(shift, 1, members), generator.normal(0, 1, others)


@pytest.mark.parametrize("decimals", [6, 0])
def test_the_area_is_scikit_learns_with_ties_too(decimals: int) -> None:
    members, others = (np.round(part, decimals) for part in scores(1, 300, 200))
    labels = np.repeat([1, 0], [300, 200])
    expected = metrics.roc_auc_score(labels, np.concatenate([members, others]))
    assert roc.area(members, others) == pytest.approx(expected)
    assert roc.delong(members, others).value == pytest.approx(expected)


def test_delongs_interval_covers_the_true_area_as_often_as_it_says() -> None:
    truth = stats.norm.cdf(1 / np.sqrt(2))
    found = [roc.delong(*scores(seed, 80, 60)) for seed in range(400)]
    covered = sum(one.low <= truth <= one.high for one in found)
    assert 360 <= covered <= 396  # 380 of 400 expected; the interval is asymptotic


def test_clopper_and_pearsons_interval_is_scipys() -> None:
    for found, trials in ((0, 12), (12, 12), (3, 40)):
        one = roc.clopper_pearson(found, trials)
        exact = stats.binomtest(found, trials).proportion_ci(method="exact")
        assert (one.low, one.high) == pytest.approx((exact.low, exact.high))


def test_a_rate_is_told_only_where_ten_non_members_would_be_false_positives() -> None:
    members, others = scores(2, 500, 999)
    assert list(roc.of_one_model(members, others).rates) == [0.05, 0.1]
    assert list(roc.of_one_model(members, np.append(others, 0.0)).rates) == [0.01, 0.05, 0.1]
    assert roc.of_one_model(members, others[:99]).rates == {}


def test_no_more_non_members_are_false_positives_than_the_rate_allows() -> None:
    members, others = scores(3, 20_000, 30_000)
    curve = roc.of_one_model(members, others)
    assert list(curve.rates) == [0.001, 0.01, 0.05, 0.1]
    for rate, found in curve.rates.items():
        threshold = roc._threshold(others, rate)
        assert (others > threshold).mean() <= rate
        assert found == roc.clopper_pearson(int((members > threshold).sum()), 20_000)
        exact = 1 - stats.norm.cdf(stats.norm.ppf(1 - rate) - 1)
        assert found.value == pytest.approx(exact, abs=0.01)
    rates = np.array(curve.points)
    assert (np.diff(rates, axis=0) >= 0).all()
    assert rates[0, 0] == 0
    assert tuple(rates[-1]) == (1, 1)


def test_examples_that_many_models_share_do_not_count_as_many() -> None:
    """One example's scores are all alike: twenty models of fifty examples tell as much as one."""
    generator = np.random.default_rng(4)
    shared = np.repeat(generator.normal(0, 1, (1, 50)), 20, axis=0)
    member = generator.integers(0, 2, (20, 50)).astype(bool)
    curve = roc.of_many_models(shared, member, seed=1)
    assert curve.rates == {}, "fifty non-members cannot tell one in ten"
    naive = roc.delong(shared[member], shared[~member])
    assert curve.area.high - curve.area.low > naive.high - naive.low


def test_the_bootstrap_covers_one_half_where_nothing_is_remembered() -> None:
    covered = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        found = generator.normal(0, 1, (12, 120)) + generator.normal(0, 1, (1, 120))
        member = generator.integers(0, 2, found.shape).astype(bool)
        area = roc.of_many_models(found, member, seed=seed).area
        covered += area.low <= 0.5 <= area.high
    assert covered >= 17
