"""`bract client`."""

from __future__ import annotations

from pathlib import Path

import click

from bract.shared import garbage
from bract.shared.cli import AS_JSON, LOG_FORMAT, fail_reported, print_json
from bract.shared.errors import UsageError
from bract.shared.reports.services import Recovery


@click.command(epilog="Example: bract client SITE.toml --check contract.json")
@click.argument("site", type=click.Path(path_type=Path), metavar="SITE.toml")
@click.option("--status", is_flag=True, help="Say what the running process does, and ε here.")
@click.option(
    "--check",
    type=click.Path(path_type=Path),
    metavar="contract.json",
    help="Would the gate accept it, what would it cost, do the data fit? Starts nothing.",
)
@click.option(
    "--recover",
    metavar="DOMAIN",
    help="Close a domain whose ledger lost entries: its whole ε counts as spent.",
)
@LOG_FORMAT
@AS_JSON
def client(
    site: Path,
    status: bool,
    check: Path | None,
    recover: str | None,
    log_format: str,
    as_json: bool,
) -> None:
    """Serve a site: connect, and answer orders through its gate, for as long as it takes.

    What arrives is a contract and weights; no code is ever taken from the network.
    """
    if sum([status, check is not None, recover is not None]) > 1:
        raise UsageError("--status, --check and --recover are asked one at a time")
    if recover is not None:
        _recover(site, recover, as_json)
    elif status:
        _status(site, as_json)
    elif check is not None:
        _check(site, check, as_json)
    else:
        _serve(site, log_format)


def _serve(site: Path, log_format: str) -> None:
    with garbage.unwatched():
        from bract.client import service
        from bract.shared import logs

    logs.begin("json" if log_format == "json" else "text")
    service.serve(site)


def _recover(site: Path, domain: str, as_json: bool) -> None:
    from bract.client import installed

    spent = installed.recover(str(site), domain)
    if as_json:
        print_json(Recovery(domain=domain, epsilon=spent).model_dump(mode="json"))
    else:
        click.echo(f"domain {domain}: ε {spent:g} counts as spent; nothing more is charged to it")


def _check(site: Path, path: Path, as_json: bool) -> None:
    from bract.client import offline

    report = offline.check(site, path)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        click.echo("\n".join(offline.lines(report)))
    if not report.accepted:
        fail_reported(f"the gate would refuse: {report.reason}")
    if report.problems:
        count = len(report.problems)
        fail_reported(f"{count} problem{'s' * (count > 1)} in the data; nothing was charged")


def _status(site: Path, as_json: bool) -> None:
    from bract.client import offline

    report = offline.status(site)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        click.echo("\n".join(offline.status_lines(report)))
