"""`bract audit budget`: what was spent of each domain, what it bought, what is left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bract.shared import garbage
from bract.shared.canonical import finite
from bract.shared.cli import AS_JSON, print_json, shown
from bract.shared.commands.ledgers import (
    HEAD,
    LEDGERS,
    Evidence,
    check_forks,
    known_end,
    pinned,
    verified,
)
from bract.shared.contract import Contract
from bract.shared.reports.audits import Budget, DomainBudget, RunCost
from bract.shared.terms import ADJACENCY, counted, of_rows_kept

if TYPE_CHECKING:
    from bract.shared.privacy.chain import Chain
    from bract.shared.privacy.forecast import RoundsLeft
    from bract.shared.privacy.verification import Verified

# Beyond so many kinds of (q, σ) the second accountant takes longer than all else together.
PRV_KINDS = 8


@click.command(epilog="Example: bract audit budget runs/demo/ledgers/*.sqlite --json")
@LEDGERS
@pinned
@HEAD
@click.option("--thorough", is_flag=True, help="PLD on a grid of 1e-4, not 1e-3; PRV always.")
@click.option("--replace-one", is_flag=True, help="Also ε where one example replaces another.")
@click.option(
    "--group", type=click.IntRange(min=2), metavar="M", help="Also ε of M examples together."
)
@click.option(
    "--forecast",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Whose rounds are forecast; default: the ledger's last contract.",
)
@AS_JSON
def budget(
    ledgers: tuple[Path, ...],
    site_key: str | None,
    contract: Path | None,
    head: Path | None,
    thorough: bool,
    replace_one: bool,
    group: int | None,
    forecast: Path | None,
    as_json: bool,
) -> None:
    """Print ε spent, left and forecast, by domain over all runs, by two accountants."""
    from bract.shared.privacy import accounting

    interval = accounting.THOROUGH_INTERVAL if thorough else accounting.ONLINE_INTERVAL
    following = _contract(forecast) if forecast is not None else None
    evidence = Evidence(site_key=site_key, contract=contract, head=head)
    domains = [
        _domain(path, found, interval, rounds).model_copy(
            update=_others(found, interval, replace_one, group)
        )
        for path in ledgers
        for found, rounds in _with_rounds(verified(path, evidence), following)
    ]
    check_forks(ledgers)
    if as_json:
        print_json(Budget(domains=domains).model_dump())
        return
    _print(domains)


def _contract(path: Path) -> Contract:
    from bract.shared import contract

    signed = contract.read(path)
    return signed.verify(signed.contract.coordinator)


def _with_rounds(
    every: Sequence[Verified], following: Contract | None
) -> Iterator[tuple[Verified, RoundsLeft]]:
    """Yields each chain of a file with the rounds left of a contract, by default of its last."""
    from bract.shared.privacy import forecast

    chains: defaultdict[str, dict[str, Chain]] = defaultdict(dict)
    for found in every:
        chains[found.chain.site][found.chain.domain] = found.chain
    for found in every:
        ahead, beside = following or found.last_contract, chains[found.chain.site]
        yield found, forecast.rounds_left(found.chain.domain, found.policy, beside, ahead)


def _domain(path: Path, found: Verified, interval: float, rounds: RoundsLeft) -> DomainBudget:
    from bract.shared.privacy import accounting, budget

    chain, limit = found.chain, found.policy.domains[found.chain.domain]
    order, events = budget.order_of(chain), chain.events
    spent = accounting.epsilon(events, limit.delta, interval=interval)
    filtered = budget.filtered(chain, limit.delta)
    # On the gate's grid, whichever was asked for: what is left is what a gate will still give.
    charged, adaptive = accounting.epsilon(events, limit.delta), budget.adaptive(chain, limit.delta)
    again = interval == accounting.THOROUGH_INTERVAL or len(events) <= PRV_KINDS
    return DomainBudget(
        ledger=str(path),
        site=chain.site,
        domain=chain.domain,
        epsilon=finite(spent),
        epsilon_prv=_by_prv(found, limit.delta) if again else None,
        epsilon_filter=finite(filtered),
        filter_order=order,
        epsilon_menu=finite(budget.of_menu(chain, limit.delta)),
        menu=budget.menu_left(chain),
        unbounded=accounting.is_unbounded(events),
        limit=limit.epsilon,
        left=budget.left(chain, limit.epsilon, charged, adaptive),
        delta=limit.delta,
        adjacency=ADJACENCY,
        unit=chain.genesis.unit if chain.genesis else "example",
        entries=chain.length,
        anchor=found.anchor,
        charges=sum(chain.attempts.values()),
        steps=sum(getattr(event, "steps", 0) for event in events),
        seeded=chain.seeded,
        more_rounds=rounds.number,
        forecast_contract=rounds.contract,
        runs=_runs(found, limit.delta, interval),
        note="; ".join(_notes(found, rounds)) + ("" if again else "; ε PRV takes --thorough"),
    )


def _by_prv(found: Verified, delta: float) -> float | None:
    with garbage.unwatched():
        from bract.shared.privacy import prv  # brings torch

    return prv.epsilon_prv(found.chain.events, delta)


def _others(
    found: Verified, interval: float, replace_one: bool, group: int | None
) -> dict[str, float | int | None]:
    """Returns ε of a person, and what the user asked for: replaced examples, groups, both.

    That of a replaced example too where contracts kept only some rows of a person.
    """
    from bract.shared.privacy import accounting

    events = found.chain.events
    delta = found.policy.domains[found.chain.domain].delta
    rows = found.rows_per_person
    asked: dict[str, float | int | None] = {"group": group, "rows_per_person": rows}
    if rows is not None:
        asked["epsilon_person"] = finite(accounting.epsilon_of_person(events, delta, rows))
    if replace_one or found.rows_kept is not None:
        exact = accounting.epsilon_replace_one(events, delta, interval=interval)
        asked["epsilon_replace_one"] = finite(exact)
    if group is not None:
        asked["epsilon_group"] = finite(accounting.epsilon_of_person(events, delta, group))
    if replace_one and group is not None:
        # m removed and m added: two groups of m.
        both = accounting.epsilon_of_person(events, delta, 2 * group)
        asked["epsilon_group_replace_one"] = finite(both)
    return asked


def _runs(found: Verified, delta: float, interval: float) -> list[RunCost]:
    from bract.shared.privacy import accounting

    chain, costs = found.chain, []
    rounds: dict[str, set[int]] = {}
    for name, number in chain.charges:
        rounds.setdefault(name, set()).add(number)
    first = {name: min(c.sequence for c in chain.costs_of(name)) for name in rounds}
    for name in sorted(rounds, key=first.__getitem__):
        events = chain.events_of(name)
        costs.append(
            RunCost(
                contract_sha256=name,
                run=found.contracts[name].run,
                rounds=len(rounds[name]),
                charges=chain.attempts[name],
                evaluations=chain.evaluated[name],
                steps=sum(getattr(event, "steps", 0) for event in events),
                epsilon=finite(accounting.epsilon(events, delta, interval=interval)),
            )
        )
    return costs


def _notes(found: Verified, rounds: RoundsLeft) -> Iterator[str]:
    from bract.shared.privacy import budget

    chain = found.chain
    yield _note(chain, budget.order_of(chain))
    if found.rows_kept is not None:
        yield of_rows_kept(found.rows_kept, "epsilon_replace_one", "example")
    _, *shared = found.policy.charged_domains(chain.domain)
    if shared:
        others = " and ".join(map(repr, shared))
        yield f"what uses {chain.domain!r} is charged to {others} too, and must fit there"
    for body in chain.joined:
        before = " and ".join(map(repr, body.others))
        yield f"entry {body.sequence} counts what {before} spent before they shared examples"
    if rounds.bound is not None:
        yield rounds.bound


def _note(chain: Chain, order: int | None) -> str:
    if chain.recovered is not None:
        return "entries were lost: the whole epsilon counts as spent, and nothing more is charged"
    adaptive = (
        "epsilon is valid if contracts were chosen without looking at earlier releases; "
        f"{'epsilon_menu' if order is None else 'epsilon_filter'} also if they were not"
    )
    if chain.seeded:
        return f"simulation: no guarantee, the noise was seeded; {adaptive}"
    return adaptive


def _print(domains: list[DomainBudget]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("site", Column("domain", overflow="fold"), *_COLUMNS)
    for domain in domains:
        table.add_row(
            domain.site,
            domain.domain,
            f"{domain.delta:g}",
            shown(domain.epsilon),
            shown(domain.epsilon_prv),
            shown(domain.epsilon_filter),
            f"{domain.limit:g}",
            shown(domain.left),
            "-" if domain.more_rounds is None else str(domain.more_rounds),
        )
    runs = Table("site", "run", "contract", "rounds", "charges", "evaluations", "ε alone")
    for domain in domains:
        for run in domain.runs:
            counts = (str(n) for n in (run.rounds, run.charges, run.evaluations))
            runs.add_row(
                domain.site, run.run, run.contract_sha256[:12], *counts, shown(run.epsilon)
            )
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # nothing to keep to; a folded domain could not be pasted
    console.print(table)
    console.print(runs)
    for line in [
        line
        for domain in domains
        for line in (*_menu_lines(domain), *_other_lines(domain), _end_line(domain))
    ]:
        console.print(line)
    for unit, note in sorted({(domain.unit, domain.note) for domain in domains}):
        console.print(f"Each ε is at its domain's δ, {ADJACENCY}, per {unit}; {note}")
    console.print(
        "The claim is of the idealised real-valued mechanism: floating-point and timing attacks "
        "are mitigated, not excluded."
    )


_COLUMNS = ("δ", "ε PLD", "ε PRV", "ε filter", "limit", "left", "rounds left")


def _menu_lines(domain: DomainBudget) -> list[str]:
    if domain.menu is None:
        return []
    whose, steps = f"{domain.site}, {domain.domain}", "; ".join(e.words for e in domain.menu)
    return [f"{whose}: ε {shown(domain.epsilon_menu)} of its whole menu; left are {steps}"]


def _end_line(domain: DomainBudget) -> str:
    return f"{domain.site}, {domain.domain}: {known_end(domain.entries, domain.anchor)}"


def _other_lines(domain: DomainBudget) -> list[str]:
    unit, rows = domain.unit, counted(domain.rows_per_person or 0, domain.unit)
    named = {
        f"one {unit} replaced": domain.epsilon_replace_one,
        f"a person with {rows}, at the most": domain.epsilon_person,
        f"{domain.group} {unit}s together, at the most": domain.epsilon_group,
        f"{domain.group} {unit}s replaced, at the most": domain.epsilon_group_replace_one,
    }
    return [
        f"{domain.site}, {domain.domain}: ε {value:.4f} of {what}"
        for what, value in named.items()
        if value is not None
    ]
