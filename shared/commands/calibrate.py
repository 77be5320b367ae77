"""`bract calibrate`."""

from __future__ import annotations

import click

from bract.shared import garbage
from bract.shared.cli import AS_JSON, print_json, shown
from bract.shared.errors import UsageError
from bract.shared.reports import Calibration
from bract.shared.terms import ADJACENCY

GREATEST_STEPS = 10**7


@click.command(
    epilog="Example: bract calibrate --examples 6000 --batch 300 --rounds 100 "
    "--steps 1 --epsilon 3 --delta 1e-5"
)
@click.option("--examples", type=int, required=True, help="Nominal size of the site.")
@click.option("--batch", type=float, required=True, help="Expected logical batch.")
@click.option("--rounds", type=int, required=True, help="Rounds, crashed ones included.")
@click.option("--steps", type=int, required=True, help="Local steps a round.")
@click.option("--epsilon", type=float, required=True, help="The budget ε.")
@click.option("--delta", type=float, required=True, help="The failure probability δ.")
@AS_JSON
def calibrate(
    examples: int,
    batch: float,
    rounds: int,
    steps: int,
    epsilon: float,
    delta: float,
    as_json: bool,
) -> None:
    """Print the least σ that keeps a run within (ε, δ), and what it buys."""
    with garbage.unwatched():
        from bract.shared.policy import check_delta
        from bract.shared.privacy import accounting, calibration, forecast, orders, prv
        from bract.shared.privacy.events import PoissonGaussian

    calibration.check_budget(epsilon, delta)
    for name, value in (("examples", examples), ("rounds", rounds), ("steps", steps)):
        if value < 1:
            raise UsageError(f"--{name} {value} must be at least 1")
    if not 0 < batch <= examples:
        raise UsageError(f"--batch {batch:g} must be above 0 and at most --examples {examples}")
    check_delta(delta, examples)
    rate, total = batch / examples, rounds * steps
    sigma = calibration.noise_multiplier(
        epsilon_target=epsilon, delta=delta, sampling_rate=rate, steps=total
    )

    def within(total: int) -> bool:
        events = [PoissonGaussian(rate, sigma, total)]
        return accounting.fits(events, limit=epsilon, delta=delta, order=None)

    event, order = PoissonGaussian(rate, sigma, total), orders.best_order(epsilon, delta)
    report = Calibration(
        noise_multiplier=sigma,
        epsilon=accounting.epsilon([event], delta),
        epsilon_prv=prv.epsilon_prv([event], delta),
        epsilon_filter=accounting.filter_epsilon([event], delta, order),
        filter_order=order,
        delta=delta,
        sampling_rate=rate,
        steps=total,
        max_steps=forecast.greatest_that_fits(within, GREATEST_STEPS),
        adjacency=ADJACENCY,
    )
    if as_json:
        print_json(report.model_dump())
        return
    click.echo(f"noise multiplier  {report.noise_multiplier:g}")
    click.echo(f"sampling rate     {rate:.6g}   steps {total} (budget holds {report.max_steps})")
    click.echo(f"epsilon           {report.epsilon:.4f} PLD, {shown(report.epsilon_prv)} PRV")
    click.echo(
        f"under a filter    {report.epsilon_filter:.4f} at order {order:g}: what an adaptive "
        "site is charged"
    )
    click.echo(f"delta             {delta:g}, {ADJACENCY}, per example")
