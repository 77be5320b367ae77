"""`bract audit report`."""

from __future__ import annotations

from pathlib import Path

import click

from bract.shared.errors import VerificationFailed


@click.command(epilog="Example: bract audit report runs/demo -o report.html")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="The page to write; never overwritten.",
)
@click.option(
    "--experiment",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder of an audit of the mechanism (audit.json); default: DIR.",
)
@click.option(
    "--membership",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder of an audit of the result (membership.json); default: DIR.",
)
@click.option(
    "--agreement",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A table of ε by several accountants; default: DIR's agreement.json.",
)
def report(
    folder: Path,
    output: Path,
    experiment: Path | None,
    membership: Path | None,
    agreement: Path | None,
) -> None:
    """Write one page with all that can be shown of a run: claim, ε, checks, and what is open.

    DIR is a run's folder, that of a whole federation (coordinator/ and sites/), one site's
    (state/), or one that was pulled, with ledgers or exports of them in its ledgers/. Every ledger
    is verified anew, against receipts and witnesses that lie there too; where anything fails the
    page says so first, and the exit code is 1.
    """
    from bract.shared import new_file
    from bract.shared.report import checks, evidence, page
    from bract.shared.report import folder as folders

    new_file.check(output)
    found = evidence.gather(
        folders.find(folder, mechanism=experiment, membership=membership, agreement=agreement)
    )
    made = checks.checks(found)
    new_file.write(page.page(found, made).encode(), output)
    failed = checks.failed(made)
    if failed:
        raise VerificationFailed(f"{output} says why: {failed[0].name}: {failed[0].detail}")
    if not found.ledgers:
        raise VerificationFailed(f"{output} holds no proof: there is no ledger in {folder}")
    ledgers = sum(record.fault is None for record in found.ledgers)
    click.echo(f"{output}: {ledgers} ledgers hold, {len(made)} checks, none failed")
