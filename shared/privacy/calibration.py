"""From a budget to a noise multiplier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from scipy import optimize

from bract.shared.errors import UsageError
from bract.shared.privacy.accounting import epsilon, filter_epsilon
from bract.shared.privacy.events import Event, PoissonGaussian
from bract.shared.privacy.orders import best_order
from bract.shared.terms import GREATEST_NOISE, LEAST_DELTA, LEAST_NOISE

GREATEST_EPSILON = 1000.0  # more protects nothing, and PLD takes gigabytes to tell it
DIGITS = 4


def check_budget(epsilon_target: float, delta: float) -> None:
    """Returns for 0 < ε < ∞ and 1e-9 ≤ δ < 1; raises `UsageError` otherwise, NaN included."""
    if not 0 < epsilon_target < math.inf:
        raise UsageError(f"epsilon {epsilon_target} must be a finite number above 0")
    if not LEAST_DELTA <= delta < 1:
        raise UsageError(f"delta {delta} must be {LEAST_DELTA:g} or more, and below 1")


def check_target(epsilon_target: float) -> None:
    """Returns for an ε whose noise can be found; raises `UsageError` otherwise."""
    if epsilon_target > GREATEST_EPSILON:
        raise UsageError(
            f"epsilon {epsilon_target:g} must be {GREATEST_EPSILON:g} or less to find its noise: "
            "lower it, or set noise_multiplier"
        )


def noise_multiplier(
    *,
    epsilon_target: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    beside: Sequence[Event] = (),
) -> float:
    """Returns the least σ of four digits with which `steps` Poisson-Gaussian steps keep to (ε, δ).

    Rounded up, so that the ε bought is at most the ε asked for. `beside` are events that the same
    budget must hold, whose noise is settled: evaluations.

    Raises:
        UsageError: where ε or δ is out of range, or no σ up to 1e5 is enough.

    No σ is under 0.1, though it might do.

    Example:
        >>> sigma = noise_multiplier(
        ...     epsilon_target=3.0, delta=1e-5, sampling_rate=0.1, steps=100)
        >>> epsilon([PoissonGaussian(0.1, sigma, 100)], 1e-5) <= 3.0
        True
    """
    check_budget(epsilon_target, delta)
    check_target(epsilon_target)

    def excess(log_sigma: float) -> float:
        event = PoissonGaussian(sampling_rate, math.exp(log_sigma), steps)
        return math.log(max(epsilon([event, *beside], delta), 1e-9) / epsilon_target)

    # The filter's ε costs little and is an upper bound, but for the rounding of PLD's grid, which
    # adds up over many steps: it brackets σ, or nearly, before PLD is asked.
    order = best_order(epsilon_target, delta)
    try:
        found = noise_for_filter(
            limit=epsilon_target,
            delta=delta,
            order=order,
            sampling_rate=sampling_rate,
            steps=steps,
            beside=beside,
        )
    except UsageError:
        found = GREATEST_NOISE  # no order up to 256 tells so small an ε: PLD may
        if excess(math.log(found)) > 0:
            raise
    high = math.log(max(found, 1.5 * LEAST_NOISE))
    low = high - math.log(1.5)
    while excess(low) <= 0:
        if low <= math.log(LEAST_NOISE):
            return LEAST_NOISE
        low = max(low - math.log(2), math.log(LEAST_NOISE))
    while excess(high) > 0:
        low, high = high, high + math.log(1.5)
        if high > math.log(GREATEST_NOISE):
            raise UsageError(_out_of_reach(epsilon_target, sampling_rate, steps, beside))
    return _least(excess, math.exp(optimize.brentq(excess, low, high, xtol=1e-4)))


def noise_for_filter(
    *,
    limit: float,
    delta: float,
    order: int,
    sampling_rate: float,
    steps: int,
    beside: Sequence[Event] = (),
) -> float:
    """Returns the least σ of four digits with which a site's filter admits all `steps`.

    Raises:
        UsageError: where no σ up to 1e5 is enough; `beside` alone may be too much.
    """
    check_budget(limit, delta)

    def excess(log_sigma: float) -> float:
        event = PoissonGaussian(sampling_rate, math.exp(log_sigma), steps)
        return filter_epsilon([event, *beside], delta, order) - limit

    low, high = math.log(0.05), 0.0
    while excess(high) > 0:
        high += 1.0
        if high > math.log(GREATEST_NOISE):
            raise UsageError(_out_of_reach(limit, sampling_rate, steps, beside))
    if excess(low) <= 0:
        return math.exp(low)
    return _least(excess, math.exp(optimize.brentq(excess, low, high, xtol=1e-6)))


def noise_within(
    *,
    epsilon_target: float,
    ceiling: tuple[float, int] | None,
    delta: float,
    sampling_rate: float,
    steps: int,
    beside: Sequence[Event] = (),
) -> float:
    """Returns the least σ for a target by PLD that a site's filter admits too.

    Args:
        epsilon_target: what all steps may cost by PLD.
        ceiling: the sites' limit and the order of their filter; None where there is no filter.
        delta: the failure probability.
        sampling_rate: q of every step.
        steps: of the whole run, crashed rounds and all.
        beside: events of the same budget whose noise is settled.
    """
    terms: dict[str, Any] = {"delta": delta, "sampling_rate": sampling_rate, "steps": steps}
    if ceiling is None:
        return noise_multiplier(epsilon_target=epsilon_target, beside=beside, **terms)
    limit, order = ceiling  # which a gate asks PLD for too
    sigma = noise_multiplier(epsilon_target=min(epsilon_target, limit), beside=beside, **terms)
    return max(sigma, noise_for_filter(limit=limit, order=order, beside=beside, **terms))


def rate_of(batch: float, nominal_sizes: Sequence[int]) -> float:
    """Returns the sampling rate q of every site: the expected batch over the mean nominal size.

    Raises:
        UsageError: where it would be over 1.
    """
    mean = sum(nominal_sizes) / len(nominal_sizes)
    if batch > mean:
        raise UsageError(
            f"privacy.batch {batch:g} is over the mean nominal size {mean:g}: lower it, or use "
            "fewer sites"
        )
    return batch / mean


def _out_of_reach(limit: float, rate: float, steps: int, beside: Sequence[Event]) -> str:
    return (
        f"no noise multiplier up to {GREATEST_NOISE:g} keeps {steps} steps at rate {rate:g}"
        f"{_with(beside)} within epsilon {limit}: ask for fewer steps or more epsilon"
        f"{', or for fewer or noisier evaluations' if beside else ''}"
    )


def _with(beside: Sequence[Event]) -> str:
    return f" and {sum(getattr(event, 'steps', 0) for event in beside)} evaluations" * bool(beside)


def _least(excess: Callable[[float], float], root: float) -> float:
    # The root is known to a tolerance only: its digit may be one too low, or one too high.
    sigma = _round_up(root)
    while excess(math.log(sigma)) > 0:
        sigma = _round_up(sigma * (1 + 10.0**-DIGITS))
    while excess(math.log(less := _one_digit_less(sigma))) <= 0:
        sigma = less
    return sigma


def _round_up(sigma: float) -> float:
    scale = 10.0 ** (DIGITS - 1 - math.floor(math.log10(sigma)))
    return math.ceil(sigma * scale - 1e-9) / scale


def _one_digit_less(sigma: float) -> float:
    # Just under a power of ten the digit is ten times finer.
    scale = 10.0 ** (DIGITS - math.ceil(math.log10(sigma) - 1e-12))
    return math.floor(sigma * scale - 1 + 1e-9) / scale
