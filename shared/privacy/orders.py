"""The Rényi order of a filter: fixed once in a ledger's first entry."""

from __future__ import annotations

import math
from functools import lru_cache


def conversion(order: int, delta: float) -> float:
    """Returns ε − RDP(α) at failure probability δ.

    Canonne, Kamath & Steinke 2020, arXiv 2004.00010, proposition 12:
    ε = RDP(α) + log(1 − 1/α) − log(δ·α) / (α − 1).
    """
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@lru_cache(maxsize=256)
def best_order(epsilon: float, delta: float) -> int:
    """Returns the order at which a budget (ε, δ) admits the most Gaussian steps.

    A Gaussian step costs RDP(α) = c·α, so the steps within the budget are (ε − conversion(α)) / α
    up to a constant; maximised over whole orders, at which the subsampled Gaussian's divergence is
    a finite sum.

    Example:
        >>> best_order(3.0, 1e-5) > best_order(14.0, 1e-5) > 1
        True
    """
    return max(range(2, 257), key=lambda order: (epsilon - conversion(order, delta)) / order)
