"""ε as a pure function of events: dp-accounting's privacy loss distributions are the authority.

Koskela, Jälkö & Honkela 2020 (arXiv 1906.03049) and Doroshenko et al. 2022 (arXiv 2207.04380):
privacy loss distributions composed numerically, rounded to the pessimistic side. Steps over all
examples are one Gaussian together, whose ε is known exactly: no less than that is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache, reduce

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from scipy.special import log_ndtr, ndtri

from bract.shared.privacy.events import Event, PoissonGaussian, Spent, Unbounded, merge
from bract.shared.terms import LEAST_DELTA, LEAST_NOISE

ONLINE_INTERVAL = 1e-3
THOROUGH_INTERVAL = 1e-4

_ORDERS = (*range(2, 33), *range(36, 129, 4), 160, 192, 224, 256)
_GREATEST_EXPONENT = 600.0  # e to it is still a float
_ADD_OR_REMOVE_ONE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
_REPLACE_ONE = dp_accounting.NeighboringRelation.REPLACE_ONE


def epsilon(events: Iterable[Event], delta: float, *, interval: float = ONLINE_INTERVAL) -> float:
    """Returns ε at δ of all events together, adjacency add-or-remove-one; inf where unbounded.

    Args:
        events: what was released, in any order.
        delta: the failure probability, in (0, 1).
        interval: the grid of the privacy loss; 1e-3 within 1e-3 of 1e-4 on the table of the README.

    Example:
        >>> step = PoissonGaussian(sampling_rate=32 / 600, noise_multiplier=1.0, steps=950)
        >>> round(epsilon([step], 1e-5), 1)
        11.5
    """
    return _epsilon(merge(events), delta, interval)


def epsilon_replace_one(
    events: Iterable[Event], delta: float, *, interval: float = ONLINE_INTERVAL
) -> float:
    """Returns ε at δ where one example is replaced by another, not added or removed; inf if none.

    The same events tell more so: two examples differ where one did. No ceiling of lost entries
    bounds it, since the gate counts in the other adjacency.

    Example:
        >>> step = PoissonGaussian(sampling_rate=0.0128, noise_multiplier=1.0, steps=3900)
        >>> round(epsilon([step], 1e-5), 2), round(epsilon_replace_one([step], 1e-5), 2)
        (4.86, 8.26)
    """
    merged = merge(events)
    return math.inf if lost(merged) is not None else _epsilon(merged, delta, interval, _REPLACE_ONE)


def epsilon_of_person(events: Iterable[Event], delta: float, rows: int) -> float:
    """Returns a bound of ε at δ of a person with up to `rows` examples; inf where none is known.

    The lesser of two. (ε, δ') of one example is (mε, δ'·(e^mε − 1)/(e^ε − 1)) of m (Vadhan 2017,
    The Complexity of Differential Privacy, lemma 2.2). And a step that samples each example at rate
    q takes some of the m with probability 1 − (1−q)^m, which then add at most mC: by convexity it
    tells no more than one example of that rate at a noise of σ/m.
    """
    merged = merge(events)
    if not all(isinstance(event, PoissonGaussian) for event in merged):
        return math.inf
    together = [
        PoissonGaussian(1 - (1 - e.sampling_rate) ** rows, e.noise_multiplier / rows, e.steps)
        for e in merged
        if isinstance(e, PoissonGaussian)
    ]
    of_group = _epsilon_of_group(merged, delta, rows)
    if any(event.noise_multiplier < LEAST_NOISE for event in together):
        return of_group  # by the other bound ε is in the hundreds, and takes gigabytes to tell
    return min(of_group, epsilon(together, delta))


def _epsilon_of_group(events: tuple[Event, ...], delta: float, rows: int) -> float:
    """Returns mε where (ε, δ·(e^ε − 1)/(e^mε − 1)) holds of one example, inf where none is found.

    ε grows until it is enough for the δ that it itself asks for. That is δ/m at ε 0, and less at
    any other: (0, δ) of one example is (0, mδ) of m, not (0, δ).
    """
    asked = _surely(events, delta / rows)
    if asked == 0:
        return 0.0
    while rows * asked < _GREATEST_EXPONENT:
        found = _surely(events, delta * math.expm1(asked) / math.expm1(rows * asked))
        if found <= asked:
            return rows * asked
        asked = found * (1 + 1e-3)
    return math.inf


def _surely(events: tuple[Event, ...], delta: float) -> float:
    """Returns ε at δ, by Rényi divergence where δ is too small for PLD's float64."""
    if delta >= LEAST_DELTA:
        return epsilon(events, delta)
    return min(_filter_epsilon(events, delta, order) for order in _ORDERS)


def filter_epsilon(events: Iterable[Event], delta: float, order: int) -> float:
    """Returns ε at δ by Rényi divergence at ONE order; sound for adaptively chosen events.

    Feldman & Zrnic 2021 (arXiv 2008.11193); Mironov, Talwar & Zhang 2019 (arXiv 1908.10530) for
    the Poisson-subsampled Gaussian.
    """
    return _filter_epsilon(merge(events), delta, order)


def fits(events: Iterable[Event], *, limit: float, delta: float, order: int | None) -> bool:
    """Returns whether events keep to a budget: by the filter where an order is given, and by PLD.

    The filter is asked first, since it costs a thousandth.
    """
    merged = merge(events)
    if lost(merged) is not None:
        return False
    if order is not None and _filter_epsilon(merged, delta, order) > limit:
        return False
    return _epsilon(merged, delta, ONLINE_INTERVAL) <= limit


def is_unbounded(events: Iterable[Event]) -> bool:
    """Returns whether any event has no noise."""
    return any(isinstance(event, Unbounded) for event in events)


def lost(events: Iterable[Event]) -> float | None:
    """Returns the ceiling under which releases were lost from the record, None where none were.

    The gate kept every charge within it, and nothing is charged afterwards: it is the total.
    """
    return max((event.epsilon for event in events if isinstance(event, Spent)), default=None)


@lru_cache(maxsize=4096)
def _epsilon(
    events: tuple[Event, ...],
    delta: float,
    interval: float,
    neighbours: dp_accounting.NeighboringRelation = _ADD_OR_REMOVE_ONE,
) -> float:
    if not events:
        return 0.0
    if is_unbounded(events):
        return math.inf
    if (ceiling := lost(events)) is not None:
        return ceiling
    composed = [_all_steps(event, interval, neighbours) for event in _steps(events)]
    total = reduce(lambda one, other: one.compose(other), composed)
    # The rounding of PLD's transform can tell less than it is, at the least δ: never where the
    # figure is known.
    exact = _epsilon_of_gaussian(_distance(events, neighbours), delta)
    return max(float(total.get_epsilon_for_delta(delta)), exact)


def _distance(events: tuple[Event, ...], neighbours: dp_accounting.NeighboringRelation) -> float:
    """Returns μ of the one Gaussian that steps over all examples are, 0 where some are sampled."""
    steps = list(_steps(events))
    if any(event.sampling_rate < 1 for event in steps):
        return 0.0
    apart = 2 if neighbours == _REPLACE_ONE else 1
    return apart * math.hypot(*(math.sqrt(e.steps) / e.noise_multiplier for e in steps))


def _epsilon_of_gaussian(distance: float, delta: float) -> float:
    """Returns ε at δ of one normal value that is μ standard deviations off, to the last digits.

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ): Balle & Wang 2018 (arXiv 1805.06530), theorem 8.
    """
    if distance == 0 or _log_delta(0.0, distance) <= math.log(delta):
        return 0.0
    # The first term alone is δ at this ε.
    low, high = 0.0, distance**2 / 2 + distance * max(0.0, -float(ndtri(delta)))
    while low < (middle := (low + high) / 2) < high:
        if _log_delta(middle, distance) > math.log(delta):
            low = middle
        else:
            high = middle
    return high


def _log_delta(epsilon: float, distance: float) -> float:
    """Returns the logarithm of δ(ε), by those of its terms: e^ε alone can be over all floats."""
    first = float(log_ndtr(distance / 2 - epsilon / distance))
    less = epsilon + float(log_ndtr(-distance / 2 - epsilon / distance)) - first
    return first + math.log(-math.expm1(less)) if less < 0 else -math.inf


def _steps(events: tuple[Event, ...]) -> Iterator[PoissonGaussian]:
    for event in events:
        if not isinstance(event, PoissonGaussian):
            raise TypeError(f"no accountant for {event}")
        yield event


# A tenth of a megabyte each at 1e-3: what a forecast asks again and again is there already.
@lru_cache(maxsize=128)
def _all_steps(
    event: PoissonGaussian, interval: float, neighbours: dp_accounting.NeighboringRelation
) -> privacy_loss_distribution.PrivacyLossDistribution:
    one = _one_step(event.sampling_rate, event.noise_multiplier, interval, neighbours)
    return one.self_compose(event.steps)


@lru_cache(maxsize=64)
def _one_step(
    sampling_rate: float,
    noise_multiplier: float,
    interval: float,
    neighbours: dp_accounting.NeighboringRelation,
) -> privacy_loss_distribution.PrivacyLossDistribution:
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        sampling_prob=sampling_rate,
        value_discretization_interval=interval,
        neighboring_relation=neighbours,
    )


@lru_cache(maxsize=4096)
def _filter_epsilon(events: tuple[Event, ...], delta: float, order: int) -> float:
    if not events:
        return 0.0
    if is_unbounded(events):
        return math.inf
    if (ceiling := lost(events)) is not None:
        return ceiling
    accountant = RdpAccountant([order], _ADD_OR_REMOVE_ONE)
    for event in _steps(events):
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        step = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
        accountant.compose(step, event.steps)
    return float(accountant.get_epsilon(delta))
