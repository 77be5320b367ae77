"""`bract server`."""

from __future__ import annotations

from pathlib import Path

import click

from bract.server import stopping
from bract.shared import garbage
from bract.shared.cli import AS_JSON, LOG_FORMAT, TRACK, print_json, shown
from bract.shared.errors import BractError


@click.command(epilog="Example: bract server FEDERATION.toml")
@click.argument("federation", type=click.Path(path_type=Path), metavar="FEDERATION.toml")
@click.option("--status", is_flag=True, help="Say who is connected and how far the run is.")
@TRACK
@LOG_FORMAT
@AS_JSON
def server(
    federation: Path, status: bool, track: tuple[str, ...], log_format: str, as_json: bool
) -> None:
    """Serve a federation's run to its end; started again after a kill, it goes on by itself.

    Only Flower's fleet routes and /health are on the network, over TLS, for the listed sites; with
    [audit] also the auditor's service, on an address of its own, for listed auditors.
    """
    if status:
        _status(federation, as_json)
    else:
        _serve(federation, track, log_format, as_json)


def _serve(federation: Path, track: tuple[str, ...], log_format: str, as_json: bool) -> None:
    with garbage.unwatched():
        from bract.server import service
        from bract.shared import logs

    logs.begin("json" if log_format == "json" else "text")
    with stopping.stoppable():
        summary = service.serve(federation, track)
    if as_json and summary.rounds:
        print_json(summary.model_dump(mode="json"))
    elif not as_json:
        click.echo(
            f"{summary.rounds} rounds, {summary.line}, ε of this run at "
            f"most {shown(summary.epsilon_run)} at δ {summary.delta:g}: {summary.out}"
        )
    if summary.rounds == 0:
        reasons = sorted({refusal.reason for refusal in summary.refused})
        raise BractError(f"no round was completed: {', '.join(reasons) or 'no site answered'}")


def _status(federation: Path, as_json: bool) -> None:
    from bract.server import service

    report = service.status(federation)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        click.echo(
            f"{report.run}: {report.doing}, healthy {report.healthy}, round {report.round} of "
            f"{report.rounds}, connected {', '.join(report.connected) or 'none'}, ε of this run "
            f"{shown(report.epsilon_run)}"
        )
