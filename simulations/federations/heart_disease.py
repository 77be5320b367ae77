"""Four real hospitals in a real federation on this machine: `heart-disease/run`.

Each hospital's process opens a folder with its own training patients alone, the server's one with
public patients alone; they meet over TLS on loopback. Terms and budgets are the experiment's of the
same name, so that `bract simulate heart-disease` is the same run with noise that can be repeated.
"""

from __future__ import annotations

import logging
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from bract.client import offline
from bract.shared import canonical, cli, contract
from bract.shared.data import load_part
from bract.shared.data.heart_disease import HOSPITALS, split_files
from bract.shared.data.locations import folder_of
from bract.shared.data.partitions import nominal_size
from bract.shared.errors import BractError, UsageError
from bract.shared.privacy.head_file import HeadFile
from bract.shared.reports.runs import FederationSummary, MetricsLine, Repeats, Summary
from bract.simulations import experiment as experiments
from bract.simulations import simulation, summary
from bract.simulations.engines import LocalEngine
from bract.simulations.experiment import Experiment
from bract.simulations.federations import loopback
from bract.simulations.federations.loopback import Layout, Processes, SitePlan

NAME = "heart-disease"
# Five processes may have to start on one core; none of this is waited for where all goes well.
DEADLINES = {"gather": 300.0, "sites": 300.0, "round": 300.0, "reply": 240.0, "close": 30.0}
LIMIT_SECONDS = 1800.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.1


@click.command(epilog="Example: simulations/federations/heart-disease/run --runs 5 --json")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder of the federation; default: runs/heart-disease-TIME.",
)
@click.option("--epsilon", type=float, metavar="E", help="Every hospital's ceiling; default: 3.")
@click.option("--rounds", type=int, metavar="R", help="How many rounds; default: 20.")
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Repeat it in folders of their own: new keys, new ledgers, as if each were the first.",
)
@click.option("--alone", is_flag=True, help="Simulate each hospital alone too, as a table.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    metavar="ROOT",
    help="A folder of data sets; default: $BRACT_DATA.",
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
@cli.AS_JSON
def heart_disease(
    out: Path | None,
    epsilon: float | None,
    rounds: int | None,
    runs: int,
    alone: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Run a server and four hospitals over TLS, then read each hospital's own ledger."""
    out = out or Path("runs") / f"{NAME}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and isn't empty: name another --out")
    changes = {"privacy.epsilon": epsilon, "policy.epsilon": epsilon, "rounds": rounds}
    source = folder_of(NAME, folder=None, root=data_dir)
    chosen = _experiment(source, changes)
    folders = (
        [out.resolve()] if runs == 1 else [out.resolve() / f"run-{n + 1}" for n in range(runs)]
    )
    done = [federate(chosen, folder, source) for folder in folders]
    _say("without privacy, simulated:")
    plain = _simulated(_experiment(source, changes, "privacy.mechanism=none"))
    report = FederationSummary(
        **done[-1].model_dump(),
        plain_accuracy=plain.test_accuracy,
        plain_accuracy_mean_of_groups=plain.test_accuracy_mean_of_groups,
        repeats=_repeats(done),
    )
    canonical.write_atomically(
        out / "summary.json", canonical.encode(report.model_dump(mode="json"))
    )
    click.echo("\n".join(_lines(report, chosen)), err=as_json)
    if alone:
        _tell_alone(report, source, changes)
    if as_json:
        cli.print_json(report.model_dump(mode="json"))


def federate(experiment: Experiment, out: Path, source: Path | None) -> Summary:
    """Returns the summary of one real run: every process was started, served and stopped.

    Args:
        experiment: the terms; its ceiling is every hospital's own.
        out: the folder of the federation, made here.
        source: holds the four published files; found or downloaded where it is None.

    Raises:
        BractError: where a process failed, or a ledger is not what its head file says.
    """
    layout = lay_out(experiment, out, source)
    _check_each(layout)
    with Processes(layout, stop_seconds=STOP_SECONDS) as processes:
        processes.start_server()
        for hospital in HOSPITALS:
            processes.start_client(hospital)
        _watch(processes)
    for name, process in processes.running.items():
        if process.returncode != 0:
            raise BractError(
                f"{name} ended with {process.returncode}: see {processes.log_path(name)}"
            )
    return _proven(experiment, layout)


def terms(experiment: Experiment) -> dict[str, Any]:
    """Returns an experiment as the tables of a FEDERATION.toml that say what to train."""
    tables = experiment.model_dump(mode="json", exclude_none=True)
    privacy = {name: value for name, value in tables["privacy"].items() if name != "mechanism"}
    return {
        "run": experiment.name,
        "rounds": experiment.rounds,
        "spare_attempts": experiment.spare_attempts,
        "init_seed": experiment.seed,
        "deadlines": DEADLINES,
        "model": tables["model"],
        "data": {"name": experiment.data.name},
        "training": tables["training"],
        "privacy": {**privacy, "ceiling": experiment.policy.epsilon},
    }


def lay_out(experiment: Experiment, out: Path, source: Path | None) -> Layout:
    """Returns the federation's folder: what a hospital or the server may not hold isn't in theirs.

    The contract lies beside each SITE.toml, as the coordinator would have sent it.
    """
    split_files(source, out / "sites", out / "public")
    data = experiment.data.terms()
    plans = [
        SitePlan(
            name=hospital,
            nominal_size=nominal_size(len(load_part(data, out / "sites" / hospital, hospital))),
            data_name=NAME,
            part=hospital,
            data_folder=".",
            epsilon=experiment.policy.epsilon,
            delta=experiment.privacy.delta,
        )
        for hospital in HOSPITALS
    ]
    layout = loopback.lay_out(
        out,
        sites=plans,
        port=loopback.free_port(),
        terms=terms(experiment),
        public_data="../public",
    )
    for hospital in HOSPITALS:
        copy = layout.site(hospital).with_name("contract.json")
        canonical.write_atomically(copy, layout.contract.read_bytes())
    return layout


def _check_each(layout: Layout) -> None:
    """Asks each hospital's gate before anything starts, as `bract client --check` does."""
    for hospital in HOSPITALS:
        report = offline.check(layout.site(hospital), layout.contract)
        if not report.accepted:
            raise BractError(f"{hospital}'s gate would refuse the contract: {report.reason}")
        unfit = f", {len(report.problems)} rows to mend" if report.problems else ""
        _say(f"{hospital}: would accept, ε {report.epsilon_after:.3f} at most{unfit}")


def _watch(processes: Processes) -> None:
    """Returns once the server has ended well; tells of every round meanwhile."""
    metrics, told, began = processes.layout.out / "metrics.jsonl", 0, time.monotonic()
    while processes.running["server"].poll() is None:
        # What follows the last line's end is still being written.
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        for line in map(MetricsLine.model_validate_json, lines[told:]):
            _say(
                f"round {line.round}: validation accuracy {line.validation_accuracy:.3f}, "
                f"ε {line.epsilon_run:.3f}, {line.replied} hospitals"
            )
        told = len(lines)
        for name, process in processes.running.items():
            if name != "server" and process.poll() is not None:
                last = processes.log(name).strip().splitlines()[-1:]
                raise BractError(f"{name} ended with {process.returncode}: {' '.join(last)}")
        if time.monotonic() - began > LIMIT_SECONDS:
            break
        time.sleep(POLL_SECONDS)
    processes.wait_for_server(timeout_seconds=POLL_SECONDS)


def _proven(experiment: Experiment, layout: Layout) -> Summary:
    """Returns the summary by the hospitals' ledgers, each held against its own head file."""
    anchors = {}
    for hospital in HOSPITALS:
        seen = HeadFile(layout.site(hospital).with_name("head.json")).read()
        if (hospital, hospital) not in seen:
            raise BractError(f"{hospital} has no head file: its ledger cannot be trusted")
        anchors.update(seen)
    result = canonical.decode((layout.out / "checkpoint" / "result.json").read_bytes())
    report = summary.proven(
        agreed=contract.read(layout.contract).contract,
        ledgers=[layout.ledger(hospital) for hospital in HOSPITALS],
        anchors=anchors,
        result=result,
        delta=experiment.privacy.delta,
        device="cpu",
        workers=len(HOSPITALS),
        out=layout.root,
    )
    summary.save(report, layout.root)
    return report


def _experiment(source: Path | None, changes: Mapping[str, Any], *settings: str) -> Experiment:
    where = {"data.dir": str(source)} if source else {}
    return experiments.load(NAME, model=None, overrides={**changes, **where}, settings=settings)


def _simulated(experiment: Experiment) -> Summary:
    """Returns the summary of a simulation in a folder, a state and a domain of its own."""
    with tempfile.TemporaryDirectory(prefix="bract-") as folder:
        run = simulation.begin(
            experiment, out=Path(folder) / "run", state=None, data_dir=None, workers=1
        )
        return run.complete(LocalEngine())


def _repeats(done: Sequence[Summary]) -> Repeats:
    each = [report.test_accuracy_mean_of_groups or 0.0 for report in done]
    return Repeats(
        accuracies=each,
        mean=statistics.fmean(each),
        deviation=statistics.stdev(each) if len(each) > 1 else None,
    )


def _lines(report: FederationSummary, experiment: Experiment) -> list[str]:
    """Returns what a run was worth and cost, as text."""
    groups = report.test_accuracy_by_group or {}
    lines = [
        f"{name:<12} test accuracy {groups[name]:.3f}   ε {site.epsilon:.3f} of "
        f"{experiment.policy.epsilon:g}, {site.charges} charges in its own ledger"
        for name, site in report.per_site.items()
        if site.epsilon is not None
    ]
    lines.append(
        f"{'all patients':<12} test accuracy {report.test_accuracy:.3f}   mean of the four "
        f"{report.test_accuracy_mean_of_groups:.3f}   without privacy {report.plain_accuracy:.3f}, "
        f"{report.plain_accuracy_mean_of_groups:.3f}"
    )
    if report.repeats.deviation is not None:
        lines.append(
            f"{len(report.repeats.accuracies)} runs: mean of the four {report.repeats.mean:.3f} ± "
            f"{report.repeats.deviation:.3f}"
        )
    lines.append(
        f"{report.rounds} rounds in {report.seconds:.1f} s, {len(report.refused)} refusals, ε "
        f"{report.epsilon:.3f} at δ {report.delta:g}, {report.guarantee}: {report.out}"
    )
    return lines


def _tell_alone(together: Summary, source: Path | None, changes: Mapping[str, Any]) -> None:
    """Prints how each hospital fares by itself, at the same sampling rate and ceiling."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "hospital", "its own patients", "all four", "ε", title="alone, simulated: no guarantee"
    )
    agreed = contract.read(Path(together.out) / "coordinator" / "contract.json").contract
    for site in agreed.cohort:
        batch = round(agreed.privacy.sampling_rate * site.nominal_size)
        only = {"sites": 1, "data.partition.only": [site.name], "privacy.batch": batch}
        one = _simulated(_experiment(source, {**changes, **only}))
        groups = one.test_accuracy_by_group or {}
        table.add_row(
            site.name,
            f"{groups[site.name]:.3f}",
            f"{one.test_accuracy_mean_of_groups:.3f}",
            f"{one.epsilon:.3f}",
        )
    Console(stderr=True, soft_wrap=True).print(table)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _ended(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # unwinds, so that every process is stopped


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _ended)
    cli.log_to_stderr(logging.WARNING)
    cli.run(heart_disease, "heart-disease/run")
