"""The tests of an audit are as strict as they say, on scores whose law is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bract.shared.errors import UsageError
from bract.simulations.audits import checks, estimates
from bract.simulations.audits.checks import STEP, Check
from bract.simulations.audits.settings import Setting, suite
from bract.simulations.audits.trial import Answers, Trial

SETTING = replace(suite(canaries=200, rounds=16).main, void=150)


def trial(setting: Setting, seed: int, *, rate: float = 0.25, noise: float = 0.8) -> Trial:
    """Returns what a mechanism with these parameters would have released."""
    made_up = np.random.default_rng(seed)
    shape = (setting.rounds, setting.rows + 1)
    sites, held = [], []
    for site in range(setting.sites):
        inside = made_up.random(setting.canaries) < 0.5
        bank = noise * np.sqrt(setting.local_steps) * made_up.standard_normal(shape)
        drawn = made_up.binomial(setting.local_steps, rate, (setting.rounds, setting.canaries))
        bank[:, : setting.canaries] += STEP * drawn * inside
        sites.append(Answers(f"canary-{site}", bank=list(bank)))
        held.append(inside)
    return Trial(setting=setting, included=held, sites=sites, blank=None)


def test_p_values_of_a_correct_mechanism_are_not_smaller_than_they_say() -> None:
    found: dict[str, list[float]] = {}
    for seed in range(150):
        for check in checks.of_main(trial(SETTING, seed)):
            found.setdefault(check.key, []).append(check.p)
    assert len(found) == 2 * 7 + 4
    for key, values in found.items():
        for level in (0.01, 0.1):
            most = stats.binom.ppf(1 - 1e-4, len(values), level)
            assert sum(p < level for p in values) <= most, (key, level)
    assert min(len(set(values)) for values in found.values()) > 1


@pytest.mark.parametrize(
    ("wrong", "test"),
    [({"rate": 0.35}, "included mass"), ({"noise": 0.7}, "noise of the void")],
)
def test_a_wrong_parameter_fails_the_test_that_is_for_it(
    wrong: dict[str, float], test: str
) -> None:
    failed = checks.failed(list(checks.of_main(trial(SETTING, 1, **wrong))))
    assert test in {check.name for check in failed}


def test_parameters_come_back_within_their_errors() -> None:
    steps = replace(SETTING, name="steps", local_steps=3)
    found, error = (
        of(trial(SETTING, 2, rate=0.3), trial(steps, 3))
        for of in (estimates.recover, estimates.error)
    )
    for name, truth in {"noise_multiplier": 0.8, "sampling_rate": 0.3, "steps": 3.0}.items():
        assert abs(getattr(found, name) - truth) < 4 * getattr(error, name), name
    assert found.clip_norm == pytest.approx(SETTING.clip_norm, rel=4 * (error.clip_norm or 0))


def test_nothing_is_recovered_where_no_site_answered() -> None:
    empty = Trial(SETTING, [], [], None)
    assert estimates.recover(empty, empty) == estimates.Parameters(None, None, None, None)


def test_more_tests_make_each_one_stricter() -> None:
    one = Check("a", "main", "all", "nothing", 4e-4)
    assert checks.failed([one]) == [one]
    assert checks.failed([one, one, one]) == []


def test_the_same_noise_in_two_rounds_is_seen() -> None:
    made = trial(SETTING, 4)
    made.sites[0].bank[3] = made.sites[0].bank[9].copy()
    failed = {check.name for check in checks.failed(list(checks.of_main(made)))}
    assert "correlation of rounds" in failed
    assert "correlation of sites" not in failed


def test_a_suite_too_small_to_tell_anything_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 100 canaries"):
        suite(canaries=10)
