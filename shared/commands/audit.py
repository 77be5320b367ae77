"""`bract audit`: verify, budget, export, pull."""

from __future__ import annotations

from pathlib import Path

import click

from bract.shared.cli import AS_JSON, GroupWithAbove, print_json
from bract.shared.commands.budget import budget
from bract.shared.commands.ledgers import (
    HEAD,
    LEDGERS,
    Evidence,
    check_forks,
    known_end,
    pinned,
    verified,
)
from bract.shared.commands.pull import pull
from bract.shared.commands.report import report
from bract.shared.errors import BractError, UsageError, VerificationFailed
from bract.shared.reports.audits import LedgerExport, Verification, VerifiedChain, allowed


@click.group(cls=GroupWithAbove)
def audit() -> None:
    """Check ledgers, what was spent, and the mechanism."""


for command in (budget, pull, report):
    audit.add_command(command)


@audit.command(epilog="Example: bract audit verify runs/demo/ledgers/*.sqlite")
@LEDGERS
@pinned
@HEAD
@click.option(
    "--received",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A server's receipts.jsonl: each update must stand behind a charge.",
)
@AS_JSON
def verify(
    ledgers: tuple[Path, ...],
    site_key: str | None,
    contract: Path | None,
    head: Path | None,
    received: Path | None,
    as_json: bool,
) -> None:
    """Is each ledger whole, signed, and within its contracts and policies? An export will do.

    Keys come from --site-key, from --contract or from contract.json beside the run, heads from
    --head or from the run's summary.json; never from the ledger itself.
    """
    evidence = Evidence(site_key=site_key, contract=contract, head=head, received=received)
    chains: list[VerifiedChain] = []
    faults: list[str] = []
    for path in ledgers:
        try:
            chains += _verified(path, evidence)
        except UsageError:
            raise
        except BractError as error:
            faults.append(str(error))
    if not faults:
        try:
            check_forks(ledgers)
        except BractError as error:
            chains, faults = [], [str(error)]
    report = Verification(verified=not faults, chains=chains, faults=faults)
    if as_json and not faults:
        print_json(report.model_dump())
    elif not as_json:
        for chain in chains:
            click.echo(f"ok  {_line(chain)}")
    if faults:
        for fault in faults[1:]:
            click.echo(f"bract: {fault}", err=True)
        raise VerificationFailed(faults[0])


@audit.command(epilog="Example: bract audit export state/ledger.sqlite -o ledger.jsonl")
@click.argument("ledger", type=click.Path(path_type=Path), metavar="LEDGER")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The new file.",
)
@AS_JSON
def export(ledger: Path, output: Path, as_json: bool) -> None:
    """Write all that a ledger says into one file for an auditor; it holds no secret.

    It is written as it stands, and verified by whoever reads it: bract audit verify FILE.
    """
    from bract.shared import canonical, new_file
    from bract.shared.privacy import export as exporting

    new_file.check(output)
    held = exporting.contents(ledger)
    if not held.rows:
        raise VerificationFailed(f"{ledger}: the ledger is empty")
    text = exporting.to_bytes(held)
    new_file.write(text, output)
    kinds = [kind for kind, _ in held.documents]
    report = LedgerExport(
        output=str(output),
        chains=len(held.rows),
        entries=sum(map(len, held.rows.values())),
        contracts=kinds.count("contract"),
        policies=kinds.count("policy"),
        witnesses=len(held.witnesses),
        sha256=canonical.sha256(text),
    )
    if as_json:
        print_json(report.model_dump())
    else:
        click.echo(
            f"{report.entries} entries of {report.chains} domains, {report.contracts} contracts, "
            f"{report.policies} policies, {report.witnesses} witnesses: {output}"
        )


def _verified(path: Path, evidence: Evidence) -> list[VerifiedChain]:
    return [
        VerifiedChain(
            ledger=str(path),
            site=found.chain.site,
            domain=found.chain.domain,
            entries=found.chain.length,
            charges=sum(found.chain.attempts.values()),
            ceilings=found.ceilings,
            head=found.chain.head.hash if found.chain.head else "",
            anchored=found.anchor is not None,
            anchor=found.anchor,
            witnessed=found.witnessed,
            received=found.received,
            simulation=bool(found.chain.genesis and found.chain.genesis.simulation),
            lost=found.chain.recovered is not None,
        )
        for found in verified(path, evidence)
    ]


def _line(chain: VerifiedChain) -> str:
    said = known_end(chain.entries, chain.anchor)
    if chain.witnessed is not None:
        said += f", witnessed up to entry {chain.witnessed}"
    if chain.received is not None:
        said += f", {chain.received} updates received, each behind its charge"
    said += f", {allowed(chain.ceilings)}"
    said += "" if chain.charges else ", nothing was charged"
    said += ", entries were lost: its whole ceiling counts as spent" if chain.lost else ""
    said += ", simulation: no guarantee" if chain.simulation else ""
    return f"{chain.ledger}  {chain.site}  {chain.domain}  {chain.entries} entries, {said}"
