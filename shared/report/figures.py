"""The charts and tables of a report, from its evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bract.shared.audits import MechanismAudit
from bract.shared.report import charts
from bract.shared.report.charts import LineChart, RowChart
from bract.shared.report.evidence import Evidence
from bract.shared.report.sites import Spent
from bract.shared.reports.audits import Figure as Estimate
from bract.shared.reports.audits import Membership, MembershipAttack, allowed
from bract.shared.reports.runs import MetricsLine

TABLE_ROWS = 9
_METHODS = {"one_run_f_dp": "one run, f-DP", "gaussian": "Gaussian"}
CURVES = charts.SERIES
_PARAMETERS: Mapping[str, str] = {
    "noise_multiplier": "noise multiplier σ",
    "clip_norm": "clip norm C",
    "sampling_rate": "sampling rate q",
    "steps": "steps",
}


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its caption, its columns, and its cells as text."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart, and the same in a table."""

    chart: LineChart | RowChart
    table: Table


def shown(value: float | None) -> str:
    """Returns ε as the commands print it."""
    return "unbounded" if value is None else f"{value:.4f}"


def privacy(found: Evidence) -> Figure | None:
    """Returns ε over rounds against the ceilings; sites that spend alike share a line."""
    alike: dict[tuple[tuple[tuple[int, float], ...], float], list[str]] = {}
    for spent in found.of_run:
        if spent.curve:
            alike.setdefault((spent.curve, spent.ceiling), []).append(spent.site)
    if not alike:
        return None
    groups = sorted(alike.items(), key=lambda group: -group[0][0][-1][1])[:CURVES]
    rounds = max(found.contract.rounds, max(curve[-1][0] for (curve, _), _ in groups))
    ceilings = sorted({ceiling for (_, ceiling), _ in groups})
    greatest = max(*ceilings, *(curve[-1][1] for (curve, _), _ in groups))
    names = [_named(sites) for _, sites in groups]
    each = "; ".join(
        f"{name}: {shown(curve[-1][1])} of {ceiling:g}"
        for name, ((curve, ceiling), _) in zip(names, groups, strict=True)
    )
    chart = charts.lines(
        "privacy",
        title="ε over rounds, against each site’s ceiling",
        description=f"After the last round, recomputed from the ledgers: {each}.",
        labels=("round", "ε of the ledger"),
        series=[(n, curve) for n, ((curve, _), _) in zip(names, groups, strict=True)],
        rules=[(f"ceiling {c:g}", [(0, c), (rounds, c)]) for c in ceilings],
        x_range=(0, rounds),
        y_range=(0, greatest * 1.06),
    )
    curves = {n: dict(curve) for n, ((curve, _), _) in zip(names, groups, strict=True)}
    numbers = _thinned(sorted({number for curve in curves.values() for number in curve}))
    rows = tuple(
        (str(number), *(_cell(curve.get(number)) for curve in curves.values()))
        for number in numbers
    )
    caption = "ε after a round, of everything in the ledger, at the site’s own δ"
    return Figure(chart, Table(caption, ("round", *curves), rows))


def accuracy(metrics: Sequence[MetricsLine]) -> Figure | None:
    """Returns the validation accuracy over rounds, or the loss where the task has none."""
    right = [(line.round, line.validation_accuracy) for line in metrics]
    points = [(number, value) for number, value in right if value is not None]
    name = "validation accuracy"
    if not points:
        lost = [(line.round, line.validation_loss) for line in metrics]
        points = [(number, value) for number, value in lost if value is not None]
        name = "validation loss"
    if not points:
        return None
    top = 1.0 if name == "validation accuracy" else max(value for _, value in points) * 1.06 or 1.0
    chart = charts.lines(
        "accuracy",
        title=f"{name.capitalize()} over rounds",
        description=f"On the server’s public examples: {points[0][1]:.3f} after round "
        f"{points[0][0]}, {points[-1][1]:.3f} after round {points[-1][0]}.",
        labels=("round", name),
        series=[(name, points)],
        x_range=(0, points[-1][0]),
        y_range=(0, top),
    )
    kept = dict(points)
    rows = tuple((str(number), f"{kept[number]:.4f}") for number in _thinned(sorted(kept)))
    return Figure(chart, Table(f"{name.capitalize()} after a round", ("round", name), rows))


def recovered(audit: MechanismAudit) -> Figure | None:
    """Returns what the mechanism's audit recovered over what is claimed."""
    both = [
        (words, found, claimed)
        for name, words in _PARAMETERS.items()
        if (found := getattr(audit.recovered, name)) is not None
        and (claimed := getattr(audit.claimed, name))
    ]
    if not both:
        return None
    chart = charts.bars(
        "recovered",
        title="Recovered by experiment, over what is claimed",
        description="1 is as claimed. "
        + "; ".join(f"{name}: {found / claimed:.3f}" for name, found, claimed in both),
        label="recovered ÷ claimed",
        rows=[(name, found / claimed, f"{found / claimed:.3f}") for name, found, claimed in both],
        level=1.0,
    )
    errors = {words: getattr(audit.recovered_error, name) for name, words in _PARAMETERS.items()}
    rows = tuple(
        (name, f"{claimed:.6g}", f"{found:.5g}{_more_or_less(errors.get(name))}")
        for name, found, claimed in both
    )
    return Figure(chart, Table("Mechanism", ("what", "claimed", "recovered"), rows))


def bounds(audit: MechanismAudit) -> Figure | None:
    """Returns the lower bounds of ε that an experiment shows, beside the ledger's ε."""
    lower = [
        (f"at least, by {_METHODS.get(method, method.replace('_', ' '))}, {_percent(sure)}", value)
        for method, found in audit.epsilon_lower.items()
        for sure, value in found.items()
    ]
    if audit.epsilon_ledger is None or not lower:
        return None
    ledger = [("ε of the experiment’s ledger", audit.epsilon_ledger)]
    every = [*ledger, *lower]
    chart = charts.bars(
        "bounds",
        title="What the experiment could show, beside what the ledger counts",
        description="; ".join(f"{name}: {shown(value)}" for name, value in every)
        + ". A lower bound over the ledger’s ε would disprove it.",
        label="ε",
        rows=[(name, value, f"{value:.3f}") for name, value in every],
    )
    rows = tuple((name, shown(value)) for name, value in every)
    return Figure(chart, Table("ε of the experiment", ("what", "ε"), rows))


def roc(attack: MembershipAttack, number: int) -> Figure:
    """Returns the ROC curves of one attack on private models and on others."""
    both = (("private", attack.private), ("without privacy", attack.unprotected))
    areas = "; ".join(
        f"{name}: area {c.auc.value:.3f} ({c.auc.low:.3f} to {c.auc.high:.3f})" for name, c in both
    )
    chart = charts.lines(
        f"roc-{number}",
        title=f"Attack by {attack.attack}",
        description=f"{areas}. On the diagonal the attack only guesses.",
        labels=("false-positive rate", "true-positive rate"),
        series=[(name, curve.roc) for name, curve in both],
        rules=[("guessing", [(0, 0), (1, 1)])],
        x_range=(0, 1),
        y_range=(0, 1),
    )
    rates = list(attack.private.true_positive_rates)
    rows = [("area under the curve", *(_interval(curve.auc) for _, curve in both))]
    for rate in rates:
        found = [curve.true_positive_rates.get(rate) for _, curve in both]
        rows.append(
            (
                f"true positives at {rate} false positives",
                *("–" if one is None else _interval(one) for one in found),
            )
        )
    caption = (
        f"{attack.models} attacked of each kind; {attack.members} members, {attack.non_members} "
        "non-members; 95 % intervals"
    )
    return Figure(chart, Table(caption, ("what", "private", "without privacy"), tuple(rows)))


def attacks(found: Membership | None) -> list[Figure]:
    """Returns a figure for each attack."""
    return [roc(attack, n) for n, attack in enumerate(found.attacks, 1)] if found else []


def agreement(rows: Sequence[Mapping[str, object]]) -> Table | None:
    """Returns the table of ε by several accountants, with the columns that it came with."""
    if not rows:
        return None
    columns = tuple(rows[0])
    cells = tuple(tuple(_plain(row.get(column)) for column in columns) for row in rows)
    return Table(
        f"{len(cells)} settings", tuple(column.replace("_", " ") for column in columns), cells
    )


@dataclass(frozen=True, slots=True)
class SiteRow:
    """A row of the table by site: whose, what its ledger is like, what it spent."""

    about: str
    state: str
    spent: Spent


def by_site(found: Evidence, most: int) -> list[SiteRow]:
    """Returns a row for each domain of the ledgers that hold, `most` of them at the most."""
    sizes = {(site.name, site.domain): site.nominal_size for site in found.contract.cohort}
    rows = []
    for spent in found.spent[:most]:
        size = sizes.get((spent.site, spent.domain))
        public = "of other runs" if size is None else f"nominal size {size:,}"
        domain = "" if spent.domain == spent.site else f"domain {spent.domain}, "
        rows.append(SiteRow(f"{domain}{public}", _state(spent), spent))
    return rows


def _state(spent: Spent) -> str:
    words = ["holds"]
    words.append(
        f"to entry {spent.entries - 1}, end open"
        if spent.anchor is None
        else f"anchored to entry {spent.anchor} of {spent.entries - 1}"
    )
    if spent.witnessed is not None:
        words.append(f"witnessed to entry {spent.witnessed}")
    if len(spent.ceilings) > 1:
        words.append(allowed(spent.ceilings))
    if spent.menu is not None:
        words.append(f"of its menu are left {'; '.join(entry.words for entry in spent.menu)}")
    if spent.shared:
        words.append(f"each use must fit what is left of {' and '.join(spent.shared)} too")
    if spent.lost:
        words.append("entries were lost: the whole ceiling counts as spent")
    if spent.simulation or spent.seeded:
        words.append("simulation")
    return ", ".join(words)


def _named(sites: Sequence[str]) -> str:
    return (
        ", ".join(sites) if len(sites) <= 4 else f"{', '.join(sites[:3])} and {len(sites) - 3} more"
    )


def _thinned(numbers: list[int]) -> list[int]:
    """Returns some of the rounds, the first and the last among them."""
    if len(numbers) <= TABLE_ROWS:
        return numbers
    last = len(numbers) - 1
    return [numbers[round(place * last / (TABLE_ROWS - 1))] for place in range(TABLE_ROWS)]


def _interval(figure: Estimate) -> str:
    return f"{figure.value:.3f} ({figure.low:.3f}–{figure.high:.3f})"


def _more_or_less(error: float | None) -> str:
    return "" if error is None else f" ± {error:.2g}"


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else str(value)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _percent(confidence: str) -> str:
    try:
        return f"{100 * float(confidence):.6g} %"
    except ValueError:
        return confidence
