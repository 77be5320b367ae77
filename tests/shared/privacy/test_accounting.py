from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.shared.privacy import accounting, prv
from bract.shared.privacy.events import PoissonGaussian, Spent, Unbounded
from bract.shared.privacy.orders import conversion

DELTA = 1e-5
# size, batch, σ, steps, and ε by Opacus' RDP and by PLD
TABLE = [
    (600, 32, 1.0, 950, 12.54, 11.505),
    (2000, 32, 1.0, 3100, 6.04, 5.529),
    (2000, 256, 2.0, 400, 7.07, 6.516),
    (10000, 32, 0.6, 1000, 4.05, 3.145),
    (10000, 256, 2.0, 1950, 2.74, 2.512),
]
EVENTS = st.builds(
    PoissonGaussian,
    sampling_rate=st.sampled_from([0.01, 0.1, 0.5]),
    noise_multiplier=st.sampled_from([0.8, 1.0, 2.0]),
    steps=st.integers(1, 300),
)


@pytest.mark.parametrize(("size", "batch", "noise", "steps", "rdp", "pld"), TABLE)
def test_epsilon_is_that_of_the_table(
    size: int, batch: int, noise: float, steps: int, rdp: float, pld: float
) -> None:
    event = PoissonGaussian(batch / size, noise, steps)
    found = accounting.epsilon([event], DELTA)
    assert found == pytest.approx(pld, abs=0.02)
    thorough = accounting.epsilon([event], DELTA, interval=accounting.THOROUGH_INTERVAL)
    assert thorough == pytest.approx(found, abs=2e-3)
    filtered = [accounting.filter_epsilon([event], DELTA, order) for order in range(2, 41)]
    assert min(filtered) == pytest.approx(rdp, rel=0.05)  # Opacus asks fractional orders too
    assert found <= min(filtered)
    by_prv = prv.epsilon_prv([event], DELTA)
    assert by_prv is not None
    assert 0 <= by_prv - found <= prv.AGREEMENT


def closed_form(epsilon: float, noise: float) -> float:
    """δ(ε) of one Gaussian release: Balle & Wang 2018 (arXiv 1805.06530), theorem 8."""

    def tail(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    half = 1 / (2 * noise)
    return tail(half - epsilon * noise) - math.exp(epsilon) * tail(-half - epsilon * noise)


def test_gaussian_accountants_agree_with_the_closed_form_of_one_release() -> None:
    noise = 2.0
    epsilon = accounting.epsilon([PoissonGaussian(1.0, noise, 1)], DELTA)
    delta = closed_form(epsilon, noise)
    assert delta == pytest.approx(DELTA, rel=0.02)
    assert delta <= DELTA


# noise, steps, δ, and ε of one example added or removed, and of one replaced: the root of
# closed_form at 1/σ·√steps, by bisection in mpmath with 60 digits.
EXACT = [
    (12.5, 100_000, 1e-9, 470.836753223635, 1582.52276234487),
    (1.0, 10_000, 1e-9, 5598.80957147303, 21198.5761120329),
    (4.0, 16, 1e-5, 4.37717809568122, 9.9972561464343),
    (20.0, 1, 1e-9, 0.260196773718019, 0.535148231553173),
    (0.3, 1, 0.01, 12.5580409757933, 36.8766712694499),
]


@pytest.mark.parametrize(("noise", "steps", "delta", "one", "replaced"), EXACT)
def test_steps_over_all_examples_never_cost_less_than_the_one_gaussian_that_they_are(
    noise: float, steps: int, delta: float, one: float, replaced: float
) -> None:
    events = [PoissonGaussian(1.0, noise, steps)]
    for found, exact in (
        (accounting.epsilon(events, delta), one),
        (accounting.epsilon_replace_one(events, delta), replaced),
    ):
        assert exact * (1 - 1e-9) <= found <= exact * (1 + 1e-3)


@pytest.mark.parametrize(("noise", "steps", "delta", "one", "replaced"), EXACT)
def test_the_closed_form_is_solved_to_many_digits(
    noise: float, steps: int, delta: float, one: float, replaced: float
) -> None:
    distance = math.sqrt(steps) / noise
    for apart, exact in ((distance, one), (2 * distance, replaced)):
        assert accounting._epsilon_of_gaussian(apart, delta) == pytest.approx(exact, rel=1e-9)


def test_kinds_of_steps_over_all_examples_are_one_gaussian_together() -> None:
    events = [PoissonGaussian(1.0, 2.0, 3), PoissonGaussian(1.0, 12.5, 100_000)]
    exact = 471.300581359976  # as above
    assert exact * (1 - 1e-9) <= accounting.epsilon(events, 1e-9) <= exact * (1 + 1e-3)


def test_the_filter_charges_the_divergence_at_its_one_order() -> None:
    event, order = PoissonGaussian(1.0, 2.0, 7), 9
    divergence = 7 * order / (2 * 2.0**2)
    expected = divergence + conversion(order, DELTA)
    assert accounting.filter_epsilon([event], DELTA, order) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.lists(EVENTS, min_size=2, max_size=4))
def test_merged_events_cost_what_the_same_steps_cost_one_by_one(
    events: list[PoissonGaussian],
) -> None:
    single = [PoissonGaussian(e.sampling_rate, e.noise_multiplier, 1) for e in events]
    halves = [e for e in events for _ in range(2)]
    doubled = [PoissonGaussian(e.sampling_rate, e.noise_multiplier, 2 * e.steps) for e in events]
    assert accounting.epsilon(halves, DELTA) == accounting.epsilon(doubled, DELTA)
    assert accounting.epsilon(single, DELTA) == accounting.epsilon(single[::-1], DELTA)


def test_composing_event_by_event_gives_what_the_merged_one_gives() -> None:
    # The library's own composition, without merge, is the other side of the comparison.
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        accounting._ADD_OR_REMOVE_ONE, value_discretization_interval=accounting.ONLINE_INTERVAL
    )
    step = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    for _ in range(6):
        accountant.compose(step, 5)
    merged = accounting.epsilon([PoissonGaussian(0.1, 1.0, 5)] * 6, DELTA)
    assert merged == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(EVENTS, st.integers(1, 300))
def test_more_steps_never_cost_less(event: PoissonGaussian, more: int) -> None:
    longer = PoissonGaussian(event.sampling_rate, event.noise_multiplier, event.steps + more)
    assert accounting.epsilon([longer], DELTA) >= accounting.epsilon([event], DELTA)
    assert accounting.filter_epsilon([longer], DELTA, 8) > accounting.filter_epsilon(
        [event], DELTA, 8
    )


@settings(max_examples=10, deadline=None)
@given(EVENTS, st.sampled_from([4, 16, 64]), st.sampled_from([1e-7, 1e-5]))
def test_the_filter_never_reports_less_than_pld(
    event: PoissonGaussian, order: int, delta: float
) -> None:
    assert accounting.filter_epsilon([event], delta, order) >= accounting.epsilon([event], delta)


def test_nothing_released_costs_nothing() -> None:
    assert accounting.epsilon([], DELTA) == 0.0
    assert accounting.filter_epsilon([], DELTA, 8) == 0.0
    assert prv.epsilon_prv([], DELTA) == 0.0


def test_one_release_without_noise_leaves_no_bound() -> None:
    events = [PoissonGaussian(0.1, 1.0, 1), Unbounded()]
    assert accounting.is_unbounded(events)
    assert accounting.epsilon(events, DELTA) == math.inf
    assert accounting.filter_epsilon(events, DELTA, 8) == math.inf
    assert prv.epsilon_prv(events, DELTA) is None
    assert not accounting.fits(events, limit=1e9, delta=DELTA, order=None)


def test_prv_is_not_asked_where_its_cost_has_no_bound() -> None:
    assert prv.epsilon_prv([PoissonGaussian(1.0, 0.1, 10)], DELTA) is None


def test_a_budget_must_hold_by_the_filter_and_by_pld() -> None:
    event = PoissonGaussian(0.1, 1.0, 100)
    pld = accounting.epsilon([event], DELTA)
    filtered = accounting.filter_epsilon([event], DELTA, 8)
    assert pld < filtered
    between = (pld + filtered) / 2
    assert accounting.fits([event], limit=between, delta=DELTA, order=None)
    assert not accounting.fits([event], limit=between, delta=DELTA, order=8)
    assert accounting.fits([event], limit=filtered, delta=DELTA, order=8)
    assert not accounting.fits([event], limit=pld - 1e-6, delta=DELTA, order=None)


GROUPS = [(0.3, 4.0, 32), (1.0, 20.0, 10)]


@pytest.mark.parametrize(("rate", "noise", "steps"), GROUPS)
@pytest.mark.parametrize("rows", [2, 3])
def test_a_persons_bound_is_above_the_tight_one_and_grows_with_rows(
    rate: float, noise: float, steps: int, rows: int
) -> None:
    """Tight: the binomial mixture of Ganesh 2024 (arXiv 2401.10294), composed numerically."""
    from dp_accounting.pld import privacy_loss_distribution

    event = PoissonGaussian(rate, noise, steps)
    counts = range(rows + 1)
    mixture = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        standard_deviation=noise,
        sensitivities=[float(count) for count in counts],
        sampling_probs=[math.comb(rows, c) * rate**c * (1 - rate) ** (rows - c) for c in counts],
        value_discretization_interval=1e-3,
    )
    tight = mixture.self_compose(steps).get_epsilon_for_delta(1e-5)
    bound = accounting.epsilon_of_person([event], 1e-5, rows)
    assert tight * (1 - 1e-3) <= bound
    assert bound <= 6 * rows * accounting.epsilon([event], 1e-5)
    assert accounting.epsilon_of_person([event], 1e-5, rows + 1) > bound


def test_a_person_of_one_row_costs_what_a_row_does_and_nothing_is_known_of_lost_releases() -> None:
    event = PoissonGaussian(0.1, 1.5, 50)
    assert accounting.epsilon_of_person([event], 1e-5, 1) == pytest.approx(
        accounting.epsilon([event], 1e-5)
    )
    assert accounting.epsilon_of_person([], 1e-5, 3) == 0
    assert math.isinf(accounting.epsilon_of_person([event, Unbounded()], 1e-5, 2))
    assert math.isinf(accounting.epsilon_of_person([event, Spent(3.0)], 1e-5, 2))


@pytest.mark.parametrize(
    ("delta", "noise", "rows"),
    [(1e-3, 500.0, 3), (1e-3, 500.0, 30), (1e-4, 5000.0, 2), (1e-5, 1e5, 1000), (2e-9, 1e9, 10)],
)
def test_a_person_costs_what_the_closed_form_says_where_one_row_costs_nothing(
    delta: float, noise: float, rows: int
) -> None:
    event = PoissonGaussian(1.0, noise, 1)
    assert accounting.epsilon([event], delta) == 0
    bound = accounting.epsilon_of_person([event], delta, rows)
    assert bound > 0
    assert closed_form(bound, noise / rows) <= delta
    assert bound <= accounting.epsilon([PoissonGaussian(1.0, noise / rows, 1)], delta)


def test_a_sampled_person_costs_no_less_than_the_mixture_where_one_row_costs_nothing() -> None:
    rate, delta, rows = 0.0025, 1e-3, 2
    event = PoissonGaussian(rate, 1.0, 1)
    assert accounting.epsilon([event], delta) == 0
    bound = accounting.epsilon_of_person([event], delta, rows)
    taken = [math.comb(rows, c) * rate**c * (1 - rate) ** (rows - c) for c in range(rows + 1)]

    def above(least: float, mean: int) -> float:
        return 0.5 * math.erfc((least - mean) / math.sqrt(2))

    # What tells the person's presence apart is a sum over some line: δ(ε) is that of the best.
    lines = [line / 100 for line in range(-200, 1000)]
    told = [
        sum(share * above(line, c) for c, share in enumerate(taken))
        - math.exp(bound) * above(line, 0)
        for line in lines
    ]
    assert 0 < max(told) <= delta


def test_a_person_costs_nothing_where_a_row_does_not_at_a_share_of_the_delta() -> None:
    event = PoissonGaussian(1.0, 1e5, 1)
    assert accounting.epsilon_of_person([event], 1e-3, 10) == 0
    assert closed_form(0.0, 1e5 / 10) <= 1e-3


def test_a_replaced_example_costs_what_is_published_of_it() -> None:
    """Measured by another: 4.86 and 8.26 at q = 0.0128, σ = 1, 3900 steps."""
    step = PoissonGaussian(0.0128, 1.0, 3900)
    assert accounting.epsilon([step], 1e-5) == pytest.approx(4.86, abs=0.005)
    assert accounting.epsilon_replace_one([step], 1e-5) == pytest.approx(8.26, abs=0.005)


@settings(max_examples=10, deadline=None)
@given(EVENTS, st.sampled_from([1e-7, 1e-5]))
def test_a_replaced_example_costs_more_than_one_and_no_more_than_two(
    event: PoissonGaussian, delta: float
) -> None:
    """One removed and one added: two examples at the most."""
    one = accounting.epsilon([event], delta)
    replaced = accounting.epsilon_replace_one([event], delta)
    assert one - 1e-3 <= replaced <= accounting.epsilon_of_person([event], delta, 2) + 1e-3


def test_nothing_bounds_a_replaced_example_where_entries_were_lost_or_noise_was_none() -> None:
    for event in (Spent(3.0), Unbounded()):
        assert accounting.epsilon_replace_one([event], 1e-5) == math.inf
    assert accounting.epsilon_replace_one([], 1e-5) == 0.0


def test_a_person_of_very_many_rows_is_bounded_without_gigabytes() -> None:
    """A noise of σ/m under 0.1 is not asked for: its ε says nothing, and its grid is endless."""
    steps = [PoissonGaussian(0.001, 1.0, 100)]
    assert accounting.epsilon_of_person(steps, 1e-5, 11) < 5
    assert accounting.epsilon_of_person(steps, 1e-5, 100_000) == math.inf
