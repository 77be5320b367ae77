"""`bract audit experiment`."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bract.shared import garbage
from bract.shared.cli import AS_JSON, DATA_DIR, fail_reported, print_json, shown
from bract.shared.errors import UsageError

if TYPE_CHECKING:
    from bract.shared.audits import MechanismAudit
    from bract.simulations.audits.mechanism import Findings
    from bract.simulations.audits.proposal import Subject
    from bract.simulations.audits.settings import Suite


@click.command(epilog="Example: bract audit experiment digits --out audits/digits")
@click.argument("name", metavar="EXPERIMENT")
@click.option("--set", "settings", multiple=True, metavar="key=value", help="Change any key.")
@click.option("--model", metavar="M", help="Another model than the experiment's.")
@click.option("--canaries", type=int, default=1000, show_default=True, help="At each site.")
@click.option("--rounds", type=int, default=20, show_default=True, help="Of the main contract.")
@click.option("--seed", type=int, metavar="S", help="Repeats canaries, batches and noise.")
@click.option("--made-up", is_flag=True, help="Make canaries of random numbers, not of the data.")
@click.option(
    "--federation", is_flag=True, help="Over TLS, each site a bract client of its own; needs --out."
)
@click.option(
    "--show-epsilon",
    type=float,
    metavar="E",
    help="Refuse where the one-run bound could not show as much, and say what it takes.",
)
@DATA_DIR
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Keep audit.json and ledgers."
)
@AS_JSON
def experiment(
    name: str,
    settings: tuple[str, ...],
    model: str | None,
    canaries: int,
    rounds: int,
    seed: int | None,
    made_up: bool,
    federation: bool,
    show_epsilon: float | None,
    data_dir: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Does the private training of an experiment's model do what its contract says?

    Canaries go through gate, ledger, ClientApp and trainer of two sites, beside a third without any
    gradient; what they release is held against the claim. EXPERIMENT is a name or a TOML file; the
    contracts are the audit's own, with the experiment's model, data and clip norm.
    """
    with garbage.unwatched():
        from bract.simulations import experiment as experiments
        from bract.simulations.audits import bounds, mechanism
        from bract.simulations.audits.settings import CONFIDENCES, suite

    started = time.monotonic()
    chosen = experiments.load(name, model=model, overrides={}, settings=settings)
    subject = mechanism.subject_of(chosen, data_dir, made_up=made_up)
    asked = suite(clip_norm=chosen.privacy.clip_norm, canaries=canaries, rounds=rounds)
    if show_epsilon is not None:
        bounds.check_reach(show_epsilon, asked.main.sites * canaries, CONFIDENCES[0])
    _check_out(out)
    mechanism.admit(subject, asked)
    drawn = secrets.randbits(32) if seed is None else seed
    findings = _findings(subject, asked, seed=drawn, out=out, federation=federation)
    report = mechanism.report(
        findings, subject, experiment=chosen.name, seed=drawn, started=started
    )
    if out is not None:
        mechanism.save(report, findings, out)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _show(report)
    if not report.passed:
        fail_reported(
            f"{len(report.failed)} of {len(report.checks)} tests failed, the first: "
            f"{report.failed[0]}: the mechanism does not do what its contract says"
        )


def _findings(
    subject: Subject, asked: Suite, *, seed: int, out: Path | None, federation: bool
) -> Findings:
    from bract.simulations.audits import mechanism

    if not federation:
        return mechanism.audit(subject, asked, seed=seed, folder=out)
    from bract.simulations.audits import federation as loopback

    if out is None:
        raise UsageError("--federation needs --out DIR, for the sites' keys, ledgers and logs")
    return loopback.audit(subject, asked, seed=seed, folder=out)


def _check_out(out: Path | None) -> None:
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and isn't empty: name another --out")


def _show(report: MechanismAudit) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    console.print(
        f"{report.experiment}: {report.model} on {report.data}, {report.canaries} canaries at each "
        f"of {report.sites} sites, {report.rounds} rounds, in {report.seconds:.1f} s"
    )
    parameters = Table("", "claimed", "recovered")
    for field in type(report.claimed).model_fields:
        parameters.add_row(
            field.replace("_", " "),
            shown(getattr(report.claimed, field)),
            f"{shown(getattr(report.recovered, field))} ± "
            f"{shown(getattr(report.recovered_error, field))}",
        )
    console.print(parameters)
    worst = Table("test", "setting", "site", "p", "given", title="the tests that fit least")
    for check in sorted(report.checks, key=lambda check: check.p)[:8]:
        worst.add_row(
            check.name,
            check.setting,
            check.site,
            f"{check.p:.2g}{'' if check.passed else '  FAILED'}",
            check.given,
        )
    console.print(worst)
    console.print(
        f"{len(report.checks) - len(report.failed)} of {len(report.checks)} tests passed; one "
        f"fails under p = {report.threshold:.2g}, so a correct mechanism fails 1 audit in 1000"
    )
    console.print(
        f"ε of the ledger {shown(report.epsilon_ledger)} at δ {report.delta:g}; by the recovered "
        f"parameters {shown(report.epsilon_recovered)}"
    )
    for method, values in report.epsilon_lower.items():
        found = ", ".join(f"{value:.2f} at {confidence}" for confidence, value in values.items())
        console.print(f"ε at least {found}, {method.replace('_', ' ')}")
    for rate in report.true_positive_rates:
        if rate.true_positive_rate is not None:
            console.print(
                f"canaries found {rate.true_positive_rate:.3f} [{rate.low:.3f}, {rate.high:.3f}] "
                f"where {rate.false_positive_rate:g} of {rate.strangers} strangers are too"
            )
    console.print(f"not checked: {'; '.join(report.not_checked)}")
