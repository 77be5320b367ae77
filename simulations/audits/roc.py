"""How well a score tells members from others: the ROC curve, its area and single rates.

Each comes with its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
FALSE_POSITIVE_RATES = (0.001, 0.01, 0.05, 0.1)
LEAST_FALSE_POSITIVES = 10  # under it a rate says more of a few examples than of the attack
POINTS = 101  # of a curve that is kept
RESAMPLES = 300


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """What an attack reached.

    `rates` are true-positive rates by false-positive rate; `points` are (false-positive rate,
    true-positive rate) in steps of the former.
    """

    area: Interval
    rates: Mapping[float, Interval]
    points: tuple[tuple[float, float], ...]


def of_one_model(members: Floats, others: Floats) -> Curve:
    """Returns the curve of scores of one model, each example with one score.

    The area's interval is DeLong's (DeLong, DeLong & Clarke-Pearson 1988), a rate's Clopper and
    Pearson's, given the threshold that the non-members set.

    Args:
        members: scores of the examples that were trained on; higher says 'member'.
        others: scores of the others.
    """
    rates = {}
    for allowed in supported(len(others)):
        found = int((members > _threshold(others, allowed)).sum())
        rates[allowed] = clopper_pearson(found, len(members))
    return Curve(area=delong(members, others), rates=rates, points=_points(members, others))


def of_many_models(scores: Floats, member: npt.NDArray[np.bool_], *, seed: int) -> Curve:
    """Returns the curve of scores of many models over the same examples.

    One example's scores hang together, and so do one model's: the intervals are percentiles of a
    bootstrap that draws examples and models anew, which is wide rather than narrow (Owen 2007, The
    pigeonhole bootstrap).

    Args:
        scores: (models, examples); higher says 'member'.
        member: (models, examples), whether the model was trained on the example.
        seed: of the bootstrap.
    """
    # An example is a non-member once, however many models it was left out of.
    allowed = supported(int((~member).any(axis=0).sum()))
    generator = np.random.default_rng(seed)
    drawn = [_figures(*_drawn(scores, member, generator), allowed) for _ in range(RESAMPLES)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.array(drawn), [tail, 100 - tail], axis=0)
    value = _figures(scores, member, allowed)
    each = [
        Interval(float(v), float(min(v, lo)), float(max(v, hi)))
        for v, lo, hi in zip(value, low, high, strict=True)
    ]
    return Curve(
        area=each[0],
        rates=dict(zip(allowed, each[1:], strict=True)),
        points=_points(scores[member], scores[~member]),
    )


def supported(others: int) -> tuple[float, ...]:
    """Returns the false-positive rates that so many non-members can tell.

    Example:
        >>> supported(307), supported(1300)
        ((0.05, 0.1), (0.01, 0.05, 0.1))
    """
    return tuple(r for r in FALSE_POSITIVE_RATES if r * others >= LEAST_FALSE_POSITIVES)


def area(members: Floats, others: Floats) -> float:
    """Returns the probability that a member scores over another; a tie counts half.

    Example:
        >>> area(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
        0.875
    """
    return float(_placements(members, others).mean())


def delong(members: Floats, others: Floats) -> Interval:
    """Returns the area under the curve with DeLong's interval, cut to [0, 1]."""
    over = _placements(members, others)
    under = 1 - _placements(others, members)
    value = float(over.mean())
    variance = over.var(ddof=1) / len(over) + under.var(ddof=1) / len(under)
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(variance))
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0))


def clopper_pearson(found: int, trials: int) -> Interval:
    """Returns a proportion with Clopper and Pearson's interval (1934).

    Example:
        >>> one = clopper_pearson(0, 10)
        >>> round(one.low, 3), round(one.high, 3)
        (0.0, 0.308)
    """
    tail = (1 - CONFIDENCE) / 2
    low = stats.beta.ppf(tail, found, trials - found + 1) if found else 0.0
    high = stats.beta.ppf(1 - tail, found + 1, trials - found) if found < trials else 1.0
    return Interval(found / trials, float(low), float(high))


def _placements(scores: Floats, against: Floats) -> Floats:
    """Returns for each score the share of the others that it is over; a tie counts half."""
    order = np.sort(against)
    below = np.searchsorted(order, scores, side="left")
    up_to = np.searchsorted(order, scores, side="right")
    shares: Floats = (below + up_to) / (2 * len(order))
    return shares


def _threshold(others: Floats, allowed: float) -> float:
    """Returns the least score that at most the allowed share of the others is over."""
    count = int(np.floor(allowed * len(others)))
    return float(np.sort(others)[::-1][min(count, len(others) - 1)])


def _figures(scores: Floats, member: npt.NDArray[np.bool_], allowed: tuple[float, ...]) -> Floats:
    members, others = scores[member], scores[~member]
    rates = [float((members > _threshold(others, rate)).mean()) for rate in allowed]
    return np.array([area(members, others), *rates])


def _drawn(
    scores: Floats, member: npt.NDArray[np.bool_], generator: np.random.Generator
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    models, examples = scores.shape
    rows = generator.integers(0, models, size=(models, 1))
    columns = generator.integers(0, examples, size=(1, examples))
    return scores[rows, columns], member[rows, columns]


def _points(members: Floats, others: Floats) -> tuple[tuple[float, float], ...]:
    order = np.sort(others)[::-1]
    steps = np.linspace(0, 1, POINTS)
    places = np.minimum(np.floor(steps * len(order)).astype(int), len(order) - 1)
    # At a rate of 1 everything is called a member.
    hits = [(members > order[place]).mean() for place in places[:-1]]
    return tuple(zip(steps.tolist(), [*map(float, hits), 1.0], strict=True))
