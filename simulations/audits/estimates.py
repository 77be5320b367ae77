"""What per-round scores say of the mechanism: noise, clip norm, rate and steps by their moments.

A score is what one round added to one coordinate of the register, in units of the claimed clip
norm: noise of stddev s alone for a coordinate that no example has; c·b + noise, with b = 1 where
the example was drawn, for a canary that is in. So its mean is q·c and its variance
s² + c²·q·(1 − q), which give c, then q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from bract.shared import canonical
from bract.simulations.audits.trial import Answers, Trial

Scores = npt.NDArray[np.float64]
_GROUPS = 20


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a mechanism does, claimed or recovered; None where the scores cannot tell.

    `noise_multiplier` is relative to `clip_norm`.
    """

    noise_multiplier: float | None
    clip_norm: float | None
    sampling_rate: float | None
    steps: float | None


_FIELDS = fields(Parameters)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The scores of one site, (rounds, coordinates) each.

    `inside` are canaries that are in, `outside` those that are not, `void` coordinates that no
    canary has.
    """

    site: str
    inside: Scores
    outside: Scores
    void: Scores


def scored(trial: Trial) -> list[Scored]:
    """Returns the scores of each site with canaries that answered at all."""
    found = []
    for answers, held in zip(trial.sites, trial.included, strict=True):
        bank = matrix(answers)
        if not len(bank):
            continue
        canaries, void = bank[:, : len(held)], bank[:, len(held) :]
        found.append(Scored(answers.site, canaries[:, held], canaries[:, ~held], void))
    return found


def matrix(answers: Answers) -> Scores:
    """Returns what a site added to the register, (rounds, rows + 1)."""
    return np.array(answers.bank, dtype=np.float64)


def recover(main: Trial, steps: Trial) -> Parameters:
    """Returns the parameters by moments, all sites together.

    Args:
        main: of the contract with one local step: noise, clip and rate, given that step.
        steps: of the contract with more: their number, given the noise of one.
    """
    return _recovered(scored(main), scored(steps), main.setting.clip_norm)


def error(main: Trial, steps: Trial) -> Parameters:
    """Returns the standard errors of what `recover` returns, by leaving out coordinates in turn.

    The jackknife over groups, Efron & Stein 1981.
    """
    sites, more = scored(main), scored(steps)
    each = [
        _recovered(_without(sites, group), _without(more, group), main.setting.clip_norm)
        for group in range(_GROUPS)
    ]
    return Parameters(**{f.name: _spread([getattr(p, f.name) for p in each]) for f in _FIELDS})


def _recovered(sites: list[Scored], more: list[Scored], unit: float) -> Parameters:
    if not sites or not more:
        return Parameters(None, None, None, None)
    inside = np.concatenate([site.inside.ravel() for site in sites])
    noise, later = _noise(sites), _noise(more)
    first, spread = float(inside.mean()), float(inside.var()) - noise
    clip = first + spread / first if first > 0 and spread > 0 else None
    return Parameters(
        noise_multiplier=canonical.finite(math.sqrt(noise) / clip) if clip else None,
        clip_norm=canonical.finite(clip * unit) if clip else None,
        sampling_rate=canonical.finite(first / clip) if clip else None,
        steps=canonical.finite(later / noise) if noise > 0 else None,
    )


def _without(sites: list[Scored], group: int) -> list[Scored]:
    """Returns the scores without every so-manieth coordinate."""

    def kept(values: Scores) -> Scores:
        return values[:, np.arange(values.shape[1]) % _GROUPS != group]

    return [
        Scored(site.site, kept(site.inside), kept(site.outside), kept(site.void)) for site in sites
    ]


def _spread(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < _GROUPS:
        return None
    return canonical.finite(math.sqrt((_GROUPS - 1) * float(np.var(known))))


def _noise(sites: list[Scored]) -> float:
    return _mean_square([values for site in sites for values in (site.void, site.outside)])


def _mean_square(parts: list[Scores]) -> float:
    together = np.concatenate([part.ravel() for part in parts])
    return float(np.square(together).mean())
