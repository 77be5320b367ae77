"""ε by a second hand: Opacus' PRV accountant, to hold against the first."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
from opacus.accountants import PRVAccountant

from bract.shared import canonical
from bract.shared.privacy.accounting import epsilon, lost
from bract.shared.privacy.events import Event, PoissonGaussian, merge

# Above this the PRV accountant's domain grows until its time and memory have no bound.
GREATEST = 500.0
AGREEMENT = 0.02


def epsilon_prv(events: Iterable[Event], delta: float) -> float | None:
    """Returns ε at δ by PRV (Gopi, Lee & Wutschitz 2021, arXiv 2106.02848), or None over 500.

    Its upper bound, whose error is set to 0.01. None too where entries were lost.
    """
    merged = merge(events)
    if not merged:
        return 0.0
    known = epsilon(merged, delta)
    if not known < GREATEST or lost(merged) is not None:
        return None
    accountant = PRVAccountant()
    accountant.history = [
        (event.noise_multiplier, event.sampling_rate, event.steps)
        for event in merged
        if isinstance(event, PoissonGaussian)
    ]
    # At q = 1 Opacus takes log(1 − q), whose limit is right; and it warns of the Rényi orders by
    # which it sizes its grid, which makes that grid larger and no ε wrong.
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        value = float(accountant.get_epsilon(delta=delta))
    return canonical.finite(value)
