"""ε by the ledger's accountant beside two others', over settings that federated runs use.

Run: python -m bract.simulations.audits.agreement --json

dp-accounting's own PLD accountant composes the events that it makes itself (Poisson-sampled
Gaussians, on a grid four times as fine); Opacus' PRV accountant is another method by another hand.
What is compared is the path that a ledger's ε takes: merged events on the grid of 1e-3.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import dp_accounting
from dp_accounting.pld import pld_privacy_accountant

from bract.shared.privacy import accounting, prv
from bract.shared.privacy.events import PoissonGaussian
from bract.shared.privacy.prv import AGREEMENT

DELTA = 1e-5
# (examples, batch, σ, steps) that others measured too, evaluations of whole sets as (σ, times), and
# a grid around what runs use.
PUBLISHED = (
    (600, 32, 1.0, 950),
    (2000, 32, 1.0, 3100),
    (2000, 256, 2.0, 400),
    (10_000, 32, 0.6, 1000),
    (10_000, 256, 2.0, 1950),
)
EVALUATIONS = ((4.0, 1), (4.0, 20), (10.0, 50))
RATES = (0.002, 0.01, 0.05, 0.2, 0.5)
NOISES = (0.8, 1.5, 4.0)
STEPS = (1, 20, 200)


@dataclass(frozen=True, slots=True)
class Row:
    """One setting, and its ε at δ = 1e-5 by each accountant."""

    sampling_rate: float
    noise_multiplier: float
    steps: int
    epsilon: float
    epsilon_dp_accounting: float
    epsilon_prv: float

    @property
    def apart(self) -> float:
        """The greatest difference of the ledger's ε from another's."""
        others = (self.epsilon_dp_accounting, self.epsilon_prv)
        return max(abs(self.epsilon - other) for other in others)

    @property
    def agrees(self) -> bool:
        """Whether the others say the same, and each errs to its own side.

        PRV reports its upper bound, PLD rounds up: neither is far under another.
        """
        upward = self.epsilon_prv >= self.epsilon - 0.001
        return (
            self.apart <= AGREEMENT and upward and self.epsilon >= self.epsilon_dp_accounting - 1e-6
        )


def settings() -> Iterator[PoissonGaussian]:
    """Yields at least 50 settings, none twice."""
    for examples, batch, noise, steps in PUBLISHED:
        yield PoissonGaussian(batch / examples, noise, steps)
    for noise, times in EVALUATIONS:
        yield PoissonGaussian(1.0, noise, times)
    for rate in RATES:
        for noise in NOISES:
            for steps in STEPS:
                yield PoissonGaussian(rate, noise, steps)


def compare(event: PoissonGaussian, delta: float = DELTA) -> Row:
    """Returns one setting's ε by each accountant.

    Raises:
        ValueError: where PRV says nothing, which is above 500.
    """
    second = prv.epsilon_prv([event], delta)
    if second is None:
        raise ValueError(f"{event} is beyond the second accountant")
    return Row(
        sampling_rate=event.sampling_rate,
        noise_multiplier=event.noise_multiplier,
        steps=event.steps,
        epsilon=accounting.epsilon([event], delta),
        epsilon_dp_accounting=_by_dp_accounting(event, delta),
        epsilon_prv=second,
    )


def table() -> list[Row]:
    """Returns every setting's row."""
    return [compare(event) for event in settings()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and ends with 1 where accountants do not agree."""
    parser = argparse.ArgumentParser(description="ε by three accountants.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = parser.parse_args(arguments)
    rows = table()
    agree = all(row.agrees for row in rows)
    if chosen.json:
        found = {"passed": agree, "delta": DELTA, "rows": [asdict(row) for row in rows]}
        print(json.dumps(found))
    else:
        print("| q | σ | steps | ε | dp-accounting | PRV |\n|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row.sampling_rate:.4g} | {row.noise_multiplier:g} | {row.steps} | "
                f"{row.epsilon:.4f} | {row.epsilon_dp_accounting:.4f} | {row.epsilon_prv:.4f} |"
            )
    if not agree:
        raise SystemExit(1)


def _by_dp_accounting(event: PoissonGaussian, delta: float) -> float:
    gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
    accountant = pld_privacy_accountant.PLDAccountant(
        value_discretization_interval=accounting.ONLINE_INTERVAL / 4
    )
    accountant.compose(step, event.steps)
    return float(accountant.get_epsilon(delta))


if __name__ == "__main__":
    main()
