"""`bract audit membership`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bract.shared import garbage
from bract.shared.cli import AS_JSON, DATA_DIR, print_json
from bract.shared.errors import UsageError

if TYPE_CHECKING:
    from bract.shared.reports.audits import Membership, MembershipAttack

FILE = "membership.json"


@click.command(epilog="Example: bract audit membership heart-disease --models 32")
@click.argument("experiment")
@click.option(
    "--models",
    type=click.IntRange(min=0),
    metavar="N",
    help="Reference models of each kind; default: 32 of a linear model, else none.",
)
@click.option("--set", "settings", multiple=True, metavar="key=value", help="Change any key.")
@click.option("--workers", type=int, metavar="W", help="Processes that train; default: the cores.")
@DATA_DIR
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder that gets membership.json; a run's, for its report.",
)
@AS_JSON
def membership(
    experiment: str,
    models: int | None,
    settings: tuple[str, ...],
    workers: int | None,
    data_dir: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Attack models that an experiment on public data trains, with privacy and without.

    By their loss on what they were trained on, against held-out examples; and by reference models,
    which tell of random halves of the examples. Refused for data that are not known to be public.
    """
    from rich.console import Console
    from rich.progress import Progress

    with garbage.unwatched():
        from bract.shared import canonical, new_file
        from bract.simulations.audits import membership as audits

    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} must be at least 1")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        new_file.check(out / FILE)
    plan = audits.planned(
        experiment,
        settings=settings,
        models=models,
        data_dir=data_dir,
        workers=workers or os.cpu_count() or 1,
    )
    # No refreshing thread: workers are forked while this is shown.
    progress = Progress(console=Console(file=sys.stderr), auto_refresh=False)
    task = progress.add_task("reference models", total=2 * plan.models)
    found = audits.audit(plan, told=lambda: progress.update(task, advance=1, refresh=True))
    report = found.model_dump(mode="json")
    if out is not None:
        new_file.write(canonical.encode(report), out / FILE)
    if as_json:
        print_json(report)
    else:
        _print(found)


def _print(found: Membership) -> None:
    spent = "unbounded" if found.epsilon is None else f"{found.epsilon:.4f}"
    click.echo(f"{found.experiment}, {found.model}: ε {spent} at δ {found.delta:g}")
    for attack in found.attacks:
        click.echo(
            f"by {attack.attack}: {attack.models} attacked of each kind, {attack.members} members, "
            f"{attack.non_members} non-members"
        )
        for line in _lines(attack):
            click.echo(f"  {line}")
    click.echo(found.meaning)


def _lines(attack: MembershipAttack) -> list[str]:
    lines = []
    for kind, curve in (("private", attack.private), ("without", attack.unprotected)):
        area = curve.auc
        lines.append(f"{kind:<8} AUC {area.value:.3f} ({area.low:.3f} to {area.high:.3f})")
        lines += [
            f"{'':<8} {rate:>4} false positives: {one.value:.3f} found "
            f"({one.low:.3f} to {one.high:.3f})"
            for rate, one in curve.true_positive_rates.items()
        ]
    return lines
