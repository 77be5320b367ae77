"""The tests of an audit: each a p-value under the claim, with what it is given.

Thresholds are fixed beforehand: a test fails where its p-value is under 1e-3 / (number of tests).
A p-value that is the least of several looks is multiplied by their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import special, stats

from bract.client.training.clipping import SLACK
from bract.shared.privacy import accounting
from bract.simulations.audits import p_values
from bract.simulations.audits.estimates import Scored, Scores, matrix, scored
from bract.simulations.audits.settings import DELTA, FAMILY, Setting
from bract.simulations.audits.trial import Answers, Trial

STEP = 1 - SLACK  # what a canary adds to its coordinate, in units of C


@dataclass(frozen=True, slots=True)
class Check:
    """One test: `p` is the probability of so much, were the claim true given `given`."""

    name: str
    setting: str
    site: str
    given: str
    p: float

    @property
    def key(self) -> str:
        """Its name among all tests of an audit."""
        return f"{self.setting}/{self.site}/{self.name}"


def every(trials: Mapping[str, Trial]) -> list[Check]:
    """Returns all tests of the contracts of an audit, by the names of the settings."""
    main = trials["main"]
    alone = [of_main(main), of_blank(main), of_steps(trials["steps"])]
    alone += [of_joint(trials["joint"]), of_sparse(trials["sparse"])]
    both = [of(trial) for trial in trials.values() for of in (of_messages, of_ledger)]
    # what cannot be computed is no evidence for anything: it fails
    return [
        check if math.isfinite(check.p) else replace(check, p=0.0)
        for found in (*alone, *both)
        for check in found
    ]


def failed(checks: Sequence[Check]) -> list[Check]:
    """Returns the tests that no correct mechanism fails, but for one audit in a thousand."""
    return [check for check in checks if check.p < threshold(checks)]


def threshold(checks: Sequence[Check]) -> float:
    """Returns the p-value under which one of so many tests fails."""
    return FAMILY / max(1, len(checks))


def of_main(trial: Trial) -> Iterator[Check]:
    """Yields what the register alone tells: noise, mass, distribution, batches, correlations."""
    setting, sites = trial.setting, scored(trial)
    for site in sites:
        yield from _of_scores(setting, site)
    if len(sites) > 1:
        inside = np.concatenate([site.inside for site in sites], axis=1)
        void = np.concatenate([site.void for site in sites], axis=1)
        yield Check("included mass", "main", "all", "q, C, σ", _mass(setting, inside))
        yield Check(
            "variance over an epoch", "main", "all", "q, C / σ", _epochs(setting, inside, void)
        )
    yield from _correlations(trial)


def of_steps(trial: Trial) -> Iterator[Check]:
    """Yields what more local steps tell, given the mechanism of one."""
    for site in scored(trial):
        given = "q, C, σ of one step"
        yield Check("noise of all steps", "steps", site.site, given, _scale(trial.setting, site))
        yield Check("included mass", "steps", site.site, given, _mass(trial.setting, site.inside))


def of_sparse(trial: Trial) -> Iterator[Check]:
    """Yields whether rounds with an empty batch are like others: each must be noised."""
    for answers, site in zip(trial.sites, scored(trial), strict=False):
        yield Check("empty batches", "sparse", site.site, "nothing", float(not answers.silent))
        yield Check("noise of the void", "sparse", site.site, "σC", _scale(trial.setting, site))


def of_blank(trial: Trial) -> Iterator[Check]:
    """Yields whether every released tensor is noise alone where no example has a gradient."""
    blank, stddev = trial.blank, trial.setting.noise_multiplier
    if blank is None or not blank.tensors:
        return
    rounds = {
        name: np.array([tensors[name].ravel() for tensors in blank.tensors])
        for name in blank.tensors[0]
    }
    for name, values in rounds.items():
        p = p_values.chi_square(float(np.square(values).sum()) / stddev**2, values.size)
        yield Check(f"noise of {name}", "main", blank.site, "σC, no gradient", p)
    for one, other in combinations(sorted(rounds), 2):
        width = min(rounds[one].shape[1], rounds[other].shape[1])
        p = p_values.correlation(rounds[one][:, :width].ravel(), rounds[other][:, :width].ravel())
        yield Check(f"{one} with {other}", "main", blank.site, "no gradient", p)


def of_joint(trial: Trial) -> Iterator[Check]:
    """Yields whether every tensor holds the sum of gradients that are clipped by their whole norm.

    Every example is in every step, so what is released is known but for the noise: along the known
    sum it is a normal number.
    """
    expected, stddev = trial.expected, trial.setting.noise_multiplier
    if expected is None:
        return
    for answers in trial.sites:
        if not answers.tensors:
            continue
        for name, sums in expected.items():
            mean = np.mean([tensors[name] for tensors in answers.tensors], axis=0)
            error = mean - sums
            length = float(np.linalg.norm(sums))
            given = "q = 1, C, σ, gradients by plain autograd"
            if length > 0:
                along = float((error * sums).sum()) / length
                z = along * math.sqrt(len(answers.tensors)) / stddev
                yield Check(
                    f"clipped sum of {name}", "joint", answers.site, given, p_values.normal(z)
                )
            square = float(np.square(error).sum()) * len(answers.tensors) / stddev**2
            yield Check(
                f"rest of {name}",
                "joint",
                answers.site,
                given,
                p_values.chi_square(square, error.size),
            )


def of_messages(trial: Trial) -> Iterator[Check]:
    """Yields whether every answer came and held the contract's parameters and nothing else."""
    for answers in (*trial.sites, *([trial.blank] if trial.blank else [])):
        p = float(not answers.faults)
        yield Check("answers hold what they should", trial.setting.name, answers.site, "nothing", p)


def of_ledger(trial: Trial) -> Iterator[Check]:
    """Yields whether each ledger was charged at least the ε of what its site released."""
    for answers, rounds in _rounds(trial):
        claimed = trial.claimed(rounds)
        enough = answers.events == claimed or (
            accounting.epsilon(answers.events, DELTA) >= accounting.epsilon(claimed, DELTA)
        )
        given = "the contract's q, σ and steps, rounds released"
        yield Check(
            "charged for what was released", trial.setting.name, answers.site, given, float(enough)
        )


def _rounds(trial: Trial) -> Iterator[tuple[Answers, int]]:
    for answers in (*trial.sites, *([trial.blank] if trial.blank else [])):
        yield answers, len(answers.bank)


def _of_scores(setting: Setting, site: Scored) -> Iterator[Check]:
    stddev, name = setting.noise_multiplier, site.site
    noise = np.concatenate([site.void.ravel(), site.outside.ravel()])
    yield Check("noise of the void", "main", name, "σC", _square(site.void, stddev))
    yield Check("noise of canaries left out", "main", name, "σC", _square(site.outside, stddev))
    yield Check("included mass", "main", name, "q, C, σ", _mass(setting, site.inside))
    yield Check(
        "distribution of noise",
        "main",
        name,
        "σC",
        p_values.kolmogorov(special.ndtr(np.sort(noise) / stddev)),
    )
    yield Check("distribution of canaries", "main", name, "q, C, σ", _mixture(setting, site.inside))
    p = _epochs(setting, site.inside, site.void)
    yield Check("variance over an epoch", "main", name, "q, C / σ", p)
    p = _each_round(setting, site.inside, site.void)
    yield Check("variance in each round", "main", name, "q, C / σ", p)


def _scale(setting: Setting, site: Scored) -> float:
    stddev = setting.noise_multiplier * math.sqrt(setting.local_steps)
    return _square(np.concatenate([site.void, site.outside], axis=1), stddev)


def _square(noise: Scores, stddev: float) -> float:
    return p_values.chi_square(float(np.square(noise).sum()) / stddev**2, noise.size)


def _mass(setting: Setting, inside: Scores) -> float:
    """Returns the p-value of the mean of included canaries, normal by its number."""
    rate = setting.sampling_rate
    steps = setting.local_steps
    variance = steps * (setting.noise_multiplier**2 + STEP**2 * rate * (1 - rate))
    error = float(inside.mean()) - steps * rate * STEP
    return p_values.normal(error * math.sqrt(inside.size / variance))


def _mixture(setting: Setting, inside: Scores) -> float:
    rate, stddev = setting.sampling_rate, setting.noise_multiplier
    values = np.sort(inside.ravel())
    below = (1 - rate) * special.ndtr(values / stddev) + rate * special.ndtr(
        (values - STEP) / stddev
    )
    return p_values.kolmogorov(below)


def _epochs(setting: Setting, inside: Scores, void: Scores) -> float:
    """Returns the p-value of the spread over as many rounds as show each example once.

    Batches that are dealt out show an example once in an epoch, neither twice nor never: what is
    left of the spread is the noise.
    """
    length = setting.epoch
    sums = [_blocks(values, length) for values in (inside, void)]
    return _ratio(setting, length, *sums)


def _each_round(setting: Setting, inside: Scores, void: Scores) -> float:
    """Returns the least p-value of the spread in single rounds, times their number."""
    each = [_ratio(setting, 1, one, other) for one, other in zip(inside, void, strict=True)]
    return min(1.0, min(each) * len(each))


def _blocks(values: Scores, length: int) -> Scores:
    whole = len(values) // length * length
    sums: Scores = values[:whole].reshape(-1, length, values.shape[1]).sum(1)
    return sums


def _ratio(setting: Setting, rounds: int, inside: Scores, void: Scores) -> float:
    """Returns the p-value of the variance of sums over rounds, included against void.

    A variance of sums of a mixture has the degrees of freedom that its fourth moment leaves
    (Satterthwaite 1946); the ratio of two has an F distribution.
    """
    rate, noise = setting.sampling_rate, setting.noise_multiplier**2
    spread = rate * (1 - rate) * STEP**2
    fourth = STEP**4 * rate * (1 - rate) * (1 - 6 * rate * (1 - rate))
    excess = fourth / (noise + spread) ** 2 / rounds
    freedom = 2 * (inside.size - 1) / (2 + excess)
    below = float(np.square(void).mean())
    if below == 0:
        return 0.0
    ratio = float(inside.var(ddof=1)) / below / (1 + spread / noise)
    return p_values.two_sided(*(f(ratio, freedom, void.size) for f in (stats.f.cdf, stats.f.sf)))


def _correlations(trial: Trial) -> Iterator[Check]:
    """Yields whether the noise of any two rounds is alike, at one site or at two."""
    every = [a for a in (*trial.sites, trial.blank) if a is not None and len(a.bank) > 1]
    if not every:
        return
    void = [matrix(answers)[:, trial.setting.canaries :] for answers in every]
    rows = np.concatenate(void)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    found = np.abs(rows @ rows.T)
    owners = np.repeat(np.arange(len(void)), [len(values) for values in void])
    same = owners[:, None] == owners[None]
    upper = np.triu(np.ones_like(same), 1)
    for name, kept in (("rounds", upper & same), ("sites", upper & ~same)):
        if not kept.any():
            continue
        p = p_values.of_correlation(float(found[kept].max()), rows.shape[1])
        yield Check(
            f"correlation of {name}", "main", "all", "nothing", min(1.0, p * int(kept.sum()))
        )
