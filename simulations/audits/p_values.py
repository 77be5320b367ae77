"""P-values of the laws that an audit's tests go by."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special, stats

Scores = npt.NDArray[np.float64]


def kolmogorov(below: Scores) -> float:
    """Returns the p-value of Kolmogorov and Smirnov's distance, by its limit law.

    Args:
        below: the claimed distribution function at the values in order.
    """
    count = len(below)
    above = np.arange(1, count + 1) / count - below
    distance = max(float(above.max()), float((below - np.arange(count) / count).max()))
    return float(stats.kstwobign.sf(distance * math.sqrt(count)))


def correlation(one: Scores, other: Scores) -> float:
    """Returns the p-value of two rows of standard normals as independent; 1 where one is empty."""
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return of_correlation(abs(float(one @ other)) / lengths, len(one)) if lengths > 0 else 1.0


def of_correlation(found: float, count: int) -> float:
    """Returns the p-value of a correlation of so many independent normal pairs of mean 0."""
    if count < 2:
        return 1.0  # one pair is always in line
    found = min(found, 1.0)
    # r² is Beta(½, (n − 1)/2) where the mean is known
    return float(stats.beta.sf(found**2, 0.5, (count - 1) / 2))


def chi_square(value: float, freedom: int) -> float:
    """Returns the two-sided p-value of a sum of so many squares of standard normals."""
    return two_sided(stats.chi2.cdf(value, freedom), stats.chi2.sf(value, freedom))


def normal(z: float) -> float:
    """Returns the two-sided p-value of a standard normal."""
    return float(2 * special.ndtr(-abs(z)))


def two_sided(below: float, above: float) -> float:
    """Returns the two-sided p-value, of the probabilities of as little and of as much."""
    return min(1.0, 2 * min(float(below), float(above)))
