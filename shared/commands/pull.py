"""`bract audit pull`: ask a running server for what an auditor may see."""

from __future__ import annotations

import re
from pathlib import Path

import click

from bract.shared.cli import AS_JSON, print_json
from bract.shared.configuration import host_and_port
from bract.shared.errors import UsageError
from bract.shared.reports.audits import AuditPull, PulledSite

FILE = click.Path(path_type=Path)


@click.command(
    epilog="Example: bract audit pull fl.example.org:8444 --cert auditor.pem --key auditor-key.pem "
    "--root-certificates ca.pem -o pulled"
)
@click.argument("address", metavar="HOST:PORT")
@click.option("--cert", required=True, type=FILE, metavar="FILE", help="Your auditor.pem.")
@click.option("--key", required=True, type=FILE, metavar="FILE", help="Your auditor-key.pem.")
@click.option(
    "--root-certificates",
    "roots",
    required=True,
    type=FILE,
    metavar="FILE",
    help="The coordinator's ca.pem.",
)
@click.option("--coordinator", metavar="K", help="The coordinator's public key; pins it.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=FILE,
    metavar="DIR",
    help="A new folder, or that of an earlier pull, which this one must extend.",
)
@AS_JSON
def pull(
    address: str,
    cert: Path,
    key: Path,
    roots: Path,
    coordinator: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Fetch and verify what a server witnessed: contract, heads, entries, received updates.

    The folder then serves bract audit verify: --contract DIR/contract.json, --head
    DIR/witnesses.json, --received DIR/receipts.jsonl.
    """
    from bract.shared import auditor

    try:
        host_and_port(address)
    except ValueError as error:
        raise UsageError(f"{address!r} {error}") from error
    if coordinator is not None and not re.fullmatch(r"[0-9a-f]{64}", coordinator):
        raise UsageError(f"--coordinator {coordinator!r} must be 64 hexadecimal digits")
    pulled = auditor.pull(
        address,
        auditor.Credentials(certificate=cert, key=key, roots=roots),
        coordinator=coordinator,
        folder=output,
    )
    agreed = pulled.signed.contract
    report = AuditPull(
        verified=True,
        address=address,
        contract_sha256=agreed.sha256,
        run=agreed.run,
        coordinator=agreed.coordinator,
        pinned=coordinator is not None,
        sites=[
            PulledSite(
                site=site,
                domain=shown.head.domain,
                sequence=shown.head.sequence,
                head=shown.head.hash,
                entries=len(shown.ledger.links),
                shown=pulled.followed[site].shown,
                updates=pulled.followed[site].paid,
                extends=site in pulled.extended,
            )
            for site, shown in sorted(pulled.shown.items())
        ],
        output=str(output),
    )
    if as_json:
        print_json(report.model_dump())
    else:
        _print(report)


def _print(report: AuditPull) -> None:
    said = "as pinned" if report.pinned else "as the server says; --coordinator pins it"
    click.echo(f"ok  {report.run}  contract {report.contract_sha256}")
    click.echo(f"    coordinator {report.coordinator}, {said}")
    for site in report.sites:
        click.echo(
            f"ok  {site.site}  {site.domain}  entry {site.sequence} witnessed, {site.entries} "
            f"entries lead to it ({site.shown} shown), {site.updates} updates, each behind its "
            f"charge{', extends the pull before' if site.extends else ''}"
        )
    if not report.sites:
        click.echo("no round is complete: no head is witnessed yet")
    click.echo(f"kept in {report.output}")
