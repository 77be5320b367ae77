"""`bract audit`: verify, budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bract.shared.cli import AS_JSON, GroupWithAbove, print_json, shown
from bract.shared.commands.report import report
from bract.shared.contract import ADJACENCY
from bract.shared.errors import BractError, LedgerError, UsageError, VerificationFailed
from bract.shared.reports import Budget, DomainBudget, Verification, VerifiedChain

if TYPE_CHECKING:
    from bract.shared.privacy.chain import Chain

LEDGERS = click.argument(
    "ledgers", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="LEDGER..."
)


@click.group(cls=GroupWithAbove)
def audit() -> None:
    """Check ledgers, what was spent, and the mechanism."""


audit.add_command(report)


@audit.command(epilog="Example: bract audit verify runs/demo/ledgers/*.sqlite")
@LEDGERS
@click.option("--site-key", metavar="K", help="The site's public key, hexadecimal; pins it.")
@click.option(
    "--head",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file with heads seen elsewhere (as in summary.json): the anchor.",
)
@AS_JSON
def verify(
    ledgers: tuple[Path, ...], site_key: str | None, head: Path | None, as_json: bool
) -> None:
    """Is each ledger whole, signed, and within its contracts and policies?

    Keys come from --site-key or from contract.json beside the run, heads from --head or from the
    run's summary.json; never from the ledger itself.
    """
    chains: list[VerifiedChain] = []
    faults: list[str] = []
    for path in ledgers:
        try:
            chains += _verified(path, site_key, head)
        except UsageError:
            raise
        except BractError as error:
            faults.append(str(error))
    report = Verification(verified=not faults, chains=chains, faults=faults)
    if as_json and not faults:
        print_json(report.model_dump())
    elif not as_json:
        for chain in chains:
            tail = (
                "anchored"
                if chain.anchored
                else f"whole up to entry {chain.entries - 1}; later entries cannot be excluded"
            )
            if chain.witnessed is not None:
                tail += f", witnessed up to entry {chain.witnessed}"
            tail += ", simulation: no guarantee" if chain.simulation else ""
            click.echo(
                f"ok  {chain.ledger}  {chain.site}  {chain.domain}  {chain.entries} entries, {tail}"
            )
    if faults:
        for fault in faults[1:]:
            click.echo(f"bract: {fault}", err=True)
        raise VerificationFailed(faults[0])


@audit.command(epilog="Example: bract audit budget runs/demo/ledgers/*.sqlite --json")
@LEDGERS
@click.option("--site-key", metavar="K", help="The site's public key, hexadecimal; pins it.")
@click.option("--thorough", is_flag=True, help="Account on a grid of 1e-4 instead of 1e-3.")
@AS_JSON
def budget(ledgers: tuple[Path, ...], site_key: str | None, thorough: bool, as_json: bool) -> None:
    """Print ε spent, left and forecast, by domain over all runs, by two accountants."""
    domains = [domain for path in ledgers for domain in _domain_budgets(path, site_key, thorough)]
    if as_json:
        print_json(Budget(domains=domains).model_dump())
        return
    _print_budgets(domains)


def _verified(path: Path, site_key: str | None, head: Path | None) -> list[VerifiedChain]:
    return [
        VerifiedChain(
            ledger=str(path),
            site=found.chain.site,
            domain=found.chain.domain,
            entries=found.chain.length,
            head=found.chain.head.hash if found.chain.head else "",
            anchored=found.anchored,
            witnessed=found.witnessed,
            simulation=bool(found.chain.genesis and found.chain.genesis.simulation),
        )
        for found in _verify(path, site_key, head)
    ]


def _verify(path: Path, site_key: str | None, head: Path | None) -> list[Any]:
    from bract.shared.privacy import anchors, verification

    if not path.is_file():
        raise LedgerError(f"no ledger at {path}: name the .sqlite file")
    run = path.resolve().parent.parent
    pinned = anchors.site_keys(path, site_key, run / "contract.json")
    if head is not None:
        known = anchors.heads(head)
        if not known:
            raise UsageError(f"{head} holds no heads: name a summary.json or a head file")
    else:
        # A run that was stopped has no summary yet; its checkpoint holds the heads last signed.
        beside = (run / "summary.json", run / "checkpoint" / "state.json")
        known = next((anchors.heads(file) for file in beside if file.exists()), {})
    return verification.verify(path, site_keys=pinned, anchors=known)


def _domain_budgets(path: Path, site_key: str | None, thorough: bool) -> list[DomainBudget]:
    from bract.shared.privacy import accounting, budget, forecast, prv

    interval = accounting.THOROUGH_INTERVAL if thorough else accounting.ONLINE_INTERVAL
    reports = []
    for found in _verify(path, site_key, None):
        chain, limit = found.chain, found.policy.domains[found.chain.domain]
        order, events = budget.order_of(chain), chain.events
        spent = accounting.epsilon(events, limit.delta, interval=interval)
        filtered = None if order is None else accounting.filter_epsilon(events, limit.delta, order)
        reports.append(
            DomainBudget(
                ledger=str(path),
                site=chain.site,
                domain=chain.domain,
                epsilon=_finite(spent),
                epsilon_prv=prv.epsilon_prv(events, limit.delta),
                epsilon_filter=_finite(filtered),
                filter_order=order,
                unbounded=accounting.is_unbounded(events),
                limit=limit.epsilon,
                left=_left(chain, limit.epsilon, spent if filtered is None else filtered),
                delta=limit.delta,
                adjacency=ADJACENCY,
                charges=sum(chain.attempts.values()),
                steps=sum(getattr(event, "steps", 0) for event in events),
                seeded=chain.seeded,
                more_rounds=forecast.more_rounds(chain, limit, found.last_contract),
                note=_note(chain, order),
            )
        )
    return reports


def _left(chain: Chain, limit: float, spent: float) -> float | None:
    if not math.isfinite(spent):
        return None
    # Whatever ε is allowed later, nothing more is charged to a domain that lost entries.
    return 0.0 if chain.recovered is not None else max(0.0, limit - spent)


def _note(chain: Chain, order: int | None) -> str:
    if chain.recovered is not None:
        return "entries were lost: the whole epsilon counts as spent, and nothing more is charged"
    adaptive = (
        "epsilon is valid if contracts were chosen without looking at earlier releases; "
        "epsilon_filter also if they were not"
        if order is not None
        else "the menu covers contracts chosen in any order"
    )
    if chain.seeded:
        return f"simulation: no guarantee, the noise was seeded; {adaptive}"
    return adaptive


def _print_budgets(domains: list[DomainBudget]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        "site",
        Column("domain", overflow="fold"),
        "ε PLD",
        "ε PRV",
        "ε filter",
        "limit",
        "left",
        "rounds left",
    )
    for domain in domains:
        table.add_row(
            domain.site,
            domain.domain,
            shown(domain.epsilon),
            shown(domain.epsilon_prv),
            shown(domain.epsilon_filter),
            f"{domain.limit:g}",
            shown(domain.left),
            "-" if domain.more_rounds is None else str(domain.more_rounds),
        )
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # nothing to keep to; a folded domain could not be pasted
    console.print(table)
    for note in sorted({domain.note for domain in domains}):
        console.print(f"δ = {domains[0].delta:g}, {ADJACENCY}, per example; {note}")
    console.print(
        "The claim is of the idealised real-valued mechanism: floating-point and timing attacks "
        "are mitigated, not excluded."
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
