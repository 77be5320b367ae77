"""Lower bounds on ε from who is told apart, and the ledger's own trade-off held against it.

A canary's score is the log-likelihood ratio of its rounds, in against out. All sites count as one
mechanism: no canary is at two of them. A bound says nothing of ε above it: it is reported beside
the ledger's, and nothing is gated on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from dp_accounting.pld import privacy_loss_distribution
from scipy import special, stats

from bract.client.training.clipping import SLACK
from bract.shared.errors import UsageError
from bract.shared.privacy.events import Event, PoissonGaussian
from bract.simulations.audits.estimates import Scored, Scores
from bract.simulations.audits.settings import DELTA, Setting

GUESSED = 0.3  # of the canaries, half of them as in and half as out; fixed beforehand
THRESHOLDS = (0.0, 1.0, 2.0, 4.0)  # of the score; fixed beforehand
FALSE_POSITIVE_RATES = (0.1, 0.01, 0.001)
LEAST_COUNT = 10  # false positives under which a rate of true ones means nothing
_STEP = 1 - SLACK
_GREATEST = 60.0
_SIZES = [round(100 * 2 ** (power / 4)) for power in range(40)]


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """Scores of canaries that are in, of those that are not, and of coordinates without one."""

    inside: Scores
    outside: Scores
    void: Scores

    @property
    def strangers(self) -> Scores:
        """Everything that was never in."""
        return np.concatenate([self.outside, self.void])

    @property
    def canaries(self) -> int:
        """How many had a coin tossed."""
        return len(self.inside) + len(self.outside)


@dataclass(frozen=True, slots=True)
class Rate:
    """How many canaries are found at a rate of false alarms, with a 95 % interval."""

    false_positive_rate: float
    true_positive_rate: float | None
    low: float | None
    high: float | None
    strangers: int


def told(setting: Setting, sites: Iterable[Scored]) -> Told:
    """Returns the score of every coordinate over all rounds, sites together."""
    kinds: dict[str, list[Scores]] = {"inside": [], "outside": [], "void": []}
    for site in sites:
        for kind, found in kinds.items():
            found.append(_likelihood(setting, getattr(site, kind)))
    return Told(**{kind: np.concatenate(found or [np.zeros(0)]) for kind, found in kinds.items()})


def lower_bounds(found: Told, confidence: float) -> dict[str, float]:
    """Returns lower bounds on ε at δ = 1e-5 that hold with a confidence, by method."""
    guesses, right = _guesses(found)
    return {
        "one_run": one_run(found.canaries, guesses, right, confidence),
        "one_run_f_dp": one_run_f_dp(found.canaries, guesses, right, confidence),
        "gaussian": gaussian(found, confidence),
    }


def one_run(canaries: int, guesses: int, right: int, confidence: float) -> float:
    """Returns ε from one run's guesses.

    Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846), theorem 5.2.

    Args:
        canaries: each was in with probability ½.
        guesses: how many were guessed at all.
        right: how many guesses are.
        confidence: with which the bound holds.
    """

    def plausible(epsilon: float) -> bool:
        return _one_run_p(canaries, guesses, right, epsilon) >= 1 - confidence

    return _refuted_up_to(plausible)


def one_run_f_dp(canaries: int, guesses: int, right: int, confidence: float) -> float:
    """Returns ε of the greatest Gaussian trade-off that one run's guesses refute.

    Mahloujifar, Melis & Chaudhuri 2024 (arXiv 2410.22235), theorem 9 and algorithm 3.

    Args:
        canaries: each was in with probability ½.
        guesses: how many were guessed at all.
        right: how many guesses are.
        confidence: with which the bound holds, if the trade-off is Gaussian.
    """
    share = guesses / canaries
    doubt = (1 - confidence) * share

    def plausible(mu: float) -> bool:
        r, h = doubt * right / guesses, doubt * (guesses - right) / guesses
        for i in range(right - 1, -1, -1):
            following = max(h, float(special.ndtr(special.ndtri(r) - mu)))
            r += i / (guesses - i) * (following - h)
            h = following
            if r + h > share:
                return False
        return True

    return epsilon_of_gaussian(_refuted_up_to(plausible, tolerance=5e-3))


def gaussian(found: Told, confidence: float) -> float:
    """Returns ε of the Gaussian trade-off between the rates of true and of false alarms.

    Both at the first fixed threshold, by Clopper & Pearson; Dong, Roth & Su 2019 (arXiv
    1905.02383) for μ = Φ⁻¹(true) − Φ⁻¹(false) and its ε.
    """
    doubt = (1 - confidence) / 2
    true, false = _alarms(found, THRESHOLDS[0])
    low, high = _at_least(*true, doubt), _at_most(*false, doubt)
    mu = float(special.ndtri(low) - special.ndtri(high))
    return epsilon_of_gaussian(mu) if mu > 0 else 0.0


def falsification(found: Told, events: tuple[Event, ...]) -> float:
    """Returns the p-value of the ledger's trade-off curve, by Clopper & Pearson.

    Under (ε, δ(ε)) for every ε no threshold tells canaries from strangers with
    true > e^ε·false + δ(ε), nor the other way round.
    """
    if not events or not all(isinstance(event, PoissonGaussian) for event in events):
        return 1.0
    least = 1.0
    for threshold in THRESHOLDS:
        (true, inside), (false, strangers) = _alarms(found, threshold)
        for one, other in (
            ((true, inside), (false, strangers)),
            ((strangers - false, strangers), (inside - true, inside)),
        ):
            least = min(least, _curve_p(one, other, events))
    return min(1.0, least * 2 * len(THRESHOLDS))


def rates(found: Told) -> list[Rate]:
    """Returns true-positive rates, only where enough strangers give as many false alarms."""
    strangers, made = np.sort(found.strangers), []
    for rate in FALSE_POSITIVE_RATES:
        count = len(strangers)
        if rate * count < LEAST_COUNT or not len(found.inside):
            made.append(Rate(rate, None, None, None, count))
            continue
        threshold = strangers[count - math.floor(rate * count) - 1]
        hits, of = int((found.inside > threshold).sum()), len(found.inside)
        made.append(
            Rate(rate, hits / of, _at_least(hits, of, 0.025), _at_most(hits, of, 0.025), count)
        )
    return made


def check_reach(epsilon: float, canaries: int, confidence: float) -> None:
    """Returns where the one-run bound of so many canaries could show an ε, were all guesses right.

    Raises:
        UsageError: naming how many canaries it takes.
    """
    if _reach(canaries, confidence) >= epsilon:
        return
    need = next((n for n in _SIZES if n > canaries and _reach(n, confidence) >= epsilon), None)
    enough = f"it takes {need}" if need else f"no number does at delta {DELTA:g}"
    raise UsageError(
        f"{canaries} canaries cannot show epsilon {epsilon:g} at {confidence:g}, even if every "
        f"guess is right: {enough}"
    )


def _reach(canaries: int, confidence: float) -> float:
    guesses = 2 * int(canaries * GUESSED / 2)
    return one_run(canaries, guesses, guesses, confidence)


def epsilon_of_gaussian(mu: float, delta: float = DELTA) -> float:
    """Returns ε at δ of a Gaussian trade-off of parameter μ.

    Example:
        >>> round(epsilon_of_gaussian(1.0), 2)
        4.38
    """
    if mu <= 0:
        return 0.0

    def over(epsilon: float) -> bool:
        upper = special.ndtr(-epsilon / mu + mu / 2)
        lower = math.exp(min(700.0, epsilon + float(special.log_ndtr(-epsilon / mu - mu / 2))))
        return float(upper) - lower > delta

    return _refuted_up_to(lambda epsilon: not over(epsilon), greatest=mu * mu + 20 * mu)


def _likelihood(setting: Setting, scores: Scores) -> Scores:
    rate, variance = setting.sampling_rate, setting.noise_multiplier**2
    drawn = (scores * _STEP - _STEP**2 / 2) / variance + math.log(rate)
    total: Scores = np.logaddexp(math.log1p(-rate), drawn).sum(0)
    return np.nan_to_num(total, nan=0.0, posinf=1e300, neginf=-1e300)


def _guesses(found: Told) -> tuple[int, int]:
    """Returns how many canaries are guessed, and how many of them rightly."""
    scores = np.concatenate([found.inside, found.outside])
    held = np.arange(len(scores)) < len(found.inside)
    each = int(len(scores) * GUESSED / 2)
    order = np.argsort(scores, kind="stable")
    right = int(held[order[len(order) - each :]].sum()) + int((~held[order[:each]]).sum())
    return 2 * each, right


def _one_run_p(canaries: int, guesses: int, right: int, epsilon: float) -> float:
    q = 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, q))
    alpha = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return float(stats.binom.sf(right - 1, guesses, q)) + alpha * DELTA * 2 * canaries


def _refuted_up_to(
    plausible: Callable[[float], bool], *, greatest: float = _GREATEST, tolerance: float = 1e-3
) -> float:
    """Returns the greatest value that is not plausible, 0 where none is refuted."""
    if plausible(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < greatest and not plausible(high):
        low, high = high, 2 * high
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (low, middle) if plausible(middle) else (middle, high)
    return low


def _alarms(found: Told, threshold: float) -> tuple[tuple[int, int], tuple[int, int]]:
    strangers = found.strangers
    true, false = (found.inside > threshold).sum(), (strangers > threshold).sum()
    return (int(true), len(found.inside)), (int(false), len(strangers))


def _at_least(hits: int, of: int, doubt: float) -> float:
    return float(special.betaincinv(hits, of - hits + 1, doubt)) if hits else 0.0


def _at_most(hits: int, of: int, doubt: float) -> float:
    return float(special.betaincinv(hits + 1, of - hits, 1 - doubt)) if hits < of else 1.0


def _curve_p(one: tuple[int, int], other: tuple[int, int], events: tuple[Event, ...]) -> float:
    """Returns the least doubt at which two rates contradict the curve."""
    epsilons, deltas = _curve(events)

    def contradicts(doubt: float) -> bool:
        low, high = _at_least(*one, doubt / 2), _at_most(*other, doubt / 2)
        return low > float((np.exp(epsilons) * high + deltas).min())

    if not contradicts(1.0):
        return 1.0
    low, high = -300.0, 0.0  # powers of ten
    while high - low > 0.05:
        middle = (low + high) / 2
        low, high = (low, middle) if contradicts(10.0**middle) else (middle, high)
    return math.pow(10.0, high)


@lru_cache(maxsize=64)
def _curve(
    events: tuple[PoissonGaussian, ...],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns ε and δ(ε) of what a ledger was charged, by its accountant's distributions."""
    total = privacy_loss_distribution.identity(value_discretization_interval=1e-3)
    for event in events:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=event.noise_multiplier,
            sampling_prob=event.sampling_rate,
            value_discretization_interval=1e-3,
        )
        total = total.compose(one.self_compose(event.steps))
    epsilons = np.linspace(0.0, min(_GREATEST, float(total.get_epsilon_for_delta(1e-9))), 400)
    return epsilons, np.asarray(total.get_delta_for_epsilon(list(epsilons)), dtype=np.float64)
