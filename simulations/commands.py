"""`bract simulate`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bract.shared import garbage
from bract.shared.cli import DATA_DIR, TRACK, print_json, shown
from bract.shared.errors import BractError, UsageError
from bract.shared.reports.runs import Summary
from bract.shared.terms import counted, of_rows_kept

if TYPE_CHECKING:
    from bract.simulations.engines import Engine

_SHOWN = 20  # sites and groups in a table


@click.command(epilog="Example: bract simulate digits --sites 5 --rounds 20 --out runs/mine")
@click.argument("experiment", required=False)
@click.option("--set", "settings", multiple=True, metavar="key=value", help="Change any key.")
@click.option("--sites", type=int, metavar="N", help="How many sites share the data.")
@click.option("--rounds", type=int, metavar="R", help="How many rounds.")
@click.option(
    "--model", metavar="M", help="One that bract knows (cnn, transformer, …), or module:factory."
)
@click.option("--data", metavar="NAME", help="A data set, or module:factory of your own.")
@click.option("--data-file", metavar="FILE", help="The one file that holds the data.")
@click.option("--schema", metavar="FILE", help="A TOML file with the public preparation of it.")
@click.option("--image-dir", metavar="DIR", help="A folder of images, one folder for each label.")
@click.option("--group-column", metavar="NAME", help="Rows with equal cells there are a person's.")
@click.option("--rows-per-group", type=int, metavar="M", help="How many of them are used.")
@click.option("--device", metavar="D", help="auto, cpu or cuda:N.")
@click.option("--workers", type=int, metavar="W", help="Processes that train; default: the cores.")
@click.option("--seed", type=int, metavar="S", help="Repeats partition, start, batches and noise.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="What carries messages: this machine's processes, or Flower's engine on Ray.",
)
@click.option(
    "--ray-address",
    metavar="A",
    help="The Ray cluster to join; default: $RAY_ADDRESS, or one started here.",
)
@DATA_DIR
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The sites' lasting ledgers, over runs.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The run folder; default: runs/NAME-TIME.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Go on with a run that was stopped.",
)
@TRACK
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def simulate(
    experiment: str | None,
    settings: tuple[str, ...],
    sites: int | None,
    rounds: int | None,
    model: str | None,
    data: str | None,
    data_file: str | None,
    schema: str | None,
    image_dir: str | None,
    group_column: str | None,
    rows_per_group: int | None,
    device: str | None,
    workers: int | None,
    seed: int | None,
    engine: str,
    ray_address: str | None,
    data_dir: Path | None,
    state: Path | None,
    out: Path | None,
    resume: Path | None,
    track: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a shared model over many sites on this machine.

    Each site's gate charges its own ledger before any example is read. EXPERIMENT is a name
    (digits, fashion-mnist, heart-disease, sst2, sst2-scratch, shakespeare; text, table and images
    for files of your own) or a TOML file; digits where none is given.
    """
    with garbage.unwatched():
        from bract.shared import tracking
        from bract.simulations import experiment as experiments
        from bract.simulations import simulation

    tracking.check(track)
    count, carrier = _workers(workers), _engine(engine, ray_address, workers)
    if resume is not None:
        of_data = [data, data_file, schema, image_dir, group_column, rows_per_group, data_dir]
        named = [*settings, *of_data, sites, rounds, model, device, seed, state, out]
        if any(value is not None for value in named):
            raise UsageError(
                f"--resume {resume} takes only --workers, --engine, --ray-address, --track and "
                "--json"
            )
        run = simulation.resume(resume, workers=count)
        _check_noise(engine, run.begun.experiment.privacy.mechanism)
        _leave_gpus(run.begun.experiment.device)
        if experiment not in (None, run.begun.experiment.name):
            raise UsageError(
                f"{resume} holds the experiment {run.begun.experiment.name!r}, not {experiment!r}"
            )
    else:
        chosen = experiments.load(
            experiment or "digits",
            model=model,
            overrides={
                "sites": sites,
                "rounds": rounds,
                "device": device,
                "seed": seed,
                "data.name": data,
                "data.file": data_file,
                "data.schema_file": schema,
                "data.dir": image_dir,
                "data.group_column": group_column,
                "data.rows_per_group": rows_per_group,
            },
            settings=settings,
        )
        _leave_gpus(chosen.device)
        folder = out or Path("runs") / f"{chosen.name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
        _check_noise(engine, chosen.privacy.mechanism)
        run = simulation.begin(chosen, out=folder, state=state, data_dir=data_dir, workers=count)
    summary = run.complete(carrier, track)
    _table(summary)
    if as_json and summary.rounds:
        print_json(summary.model_dump(mode="json"))
    if summary.rounds == 0:
        reasons = sorted({refusal.reason for refusal in summary.refused})
        raise BractError(
            f"no round was completed: {len({r.site for r in summary.refused})} of {summary.sites} "
            f"sites refused ({', '.join(reasons)}); see bract audit budget "
            f"{run.out}/ledgers/*.sqlite"
        )


def _engine(name: str, address: str | None, workers: int | None) -> Engine:
    from bract.simulations.engines import LocalEngine, RayEngine

    if name == "local":
        if address is not None:
            raise UsageError(f"--ray-address {address} needs --engine ray beside it")
        return LocalEngine()
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None and workers is not None:
        raise UsageError(
            f"--workers {workers} is not for a cluster, which has its own number: leave it out, or "
            f"the address {address}"
        )
    return RayEngine(address)


def _check_noise(engine: str, mechanism: str) -> None:
    """Returns where an engine has the noise that a mechanism's sum needs.

    Raises:
        UsageError: otherwise, before any site is asked: each would be charged in vain.
    """
    if engine == "ray" and mechanism == "user-level":
        raise UsageError("--engine ray carries no user-level noise: use --engine local")


def _leave_gpus(device: str) -> None:
    """Sees to it that workers can be forked: torch must not know of a GPU that is not used."""
    if device == "cpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def _workers(asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise UsageError(f"--workers {asked} must be at least 1")
    return asked or (os.cpu_count() or 1)


def _table(report: Summary) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("site", "ε of this run", "ε of its ledger", "charges", title=report.run)
    for name, site in list(report.per_site.items())[:_SHOWN]:
        table.add_row(name, _spent(site.epsilon_run), _spent(site.epsilon), str(site.charges))
    console = Console(stderr=True, soft_wrap=True)
    console.print(table)
    console.print(f"{report.rounds} rounds in {report.seconds:.1f} s   {report.line}")
    if report.test_accuracy_by_group:
        console.print(
            f"test accuracy by group: {_each(report.test_accuracy_by_group)}   "
            f"mean {shown(report.test_accuracy_mean_of_groups)}"
        )
    if report.test_auc_by_group:
        console.print(f"test AUC by group: {_each(report.test_auc_by_group)}")
    if report.local_accuracy_worst_site is not None:
        worst = report.local_accuracy_worst_site
        error = (report.local_accuracy_error_by_site or {})[worst]
        console.print(
            f"local accuracy of round {report.local_accuracy_round}: "
            f"{shown(report.local_accuracy)}, the worst {shown(report.local_accuracy_worst)} "
            f"± {error:.4f} at {worst}"
        )
    console.print(
        f"ε {_spent(report.epsilon)} at δ {report.delta:g}, {report.adjacency}, per "
        f"{report.unit}   guarantee: {report.guarantee}"
    )
    if report.rows_per_person is not None:
        rows = counted(report.rows_per_person, "row")
        console.print(f"a person with {rows}: ε ≤ {shown(report.epsilon_person)}")
    if report.rows_kept is not None:
        console.print(of_rows_kept(report.rows_kept, _spent(report.epsilon_replaced)))
    if report.refused:
        console.print(f"{len(report.refused)} refusals; the first: {report.refused[0]}")
    console.print(f"{report.out}: contract.json, metrics.jsonl, model.safetensors, ledgers/")


def _spent(epsilon: float | None) -> str:
    return "unbounded" if epsilon is None else shown(epsilon)


def _each(figures: Mapping[str, float | None]) -> str:
    return "   ".join(f"{name} {shown(value)}" for name, value in list(figures.items())[:_SHOWN])
