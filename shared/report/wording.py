"""What a report says in words: its verdict, the claim in one sentence, what was not checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bract.shared.report.checks import Check, failed
from bract.shared.report.evidence import Evidence
from bract.shared.report.sites import Spent
from bract.shared.terms import counted, of_rows_kept

Kind = Literal["failed", "simulation", "unprotected", "incomplete", "verified"]
_GREATEST_FACTOR = 1e6
_NAMED = 8  # sites in a sentence


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first lines of the page."""

    kind: Kind
    title: str
    text: str


def verdicts(found: Evidence, made: list[Check]) -> list[Verdict]:
    """Returns what a reader must know before anything else; a failure comes first."""
    said = [*_failures(made), *_without_guarantee(found)]
    if not found.ledgers and found.contract_fault is None:
        said.append(
            Verdict(
                "incomplete",
                "Nothing was verified",
                "The folder holds no ledger. What follows are the run's own words.",
            )
        )
    elif found.missing:
        said.append(
            Verdict(
                "incomplete",
                "Not every site is covered",
                f"No ledger of {', '.join(found.missing[:8])} is here; nothing on this page is "
                "claimed for them.",
            )
        )
    if said:
        return said
    return [
        Verdict(
            "verified",
            "The ledgers hold",
            f"{_sites(len(found.ledgers), 'The ledger was', 'All {n} ledgers were')} verified from "
            "the files alone. What no ledger can show is listed under “What was not checked”.",
        )
    ]


def claim(found: Evidence, made: list[Check]) -> str:
    """Returns what may be claimed of the run, in one sentence."""
    if failed(made):
        return "Nothing: a check failed, and until it is explained no figure here can be relied on."
    bounds = dearest(found)
    if not bounds:
        return "Nothing: no ledger was verified."
    if not _bounded(found, bounds):
        return "Nothing: updates left the sites without noise, so no bound holds."
    sentence = _sentence(found, bounds)
    if _is_simulation(found):
        return (
            "Nothing, for this was a simulation, whose noise can be computed again from its seed; "
            f"with secret noise the claim would read: “{sentence}”"
        )
    return sentence


def about(found: Evidence, made: list[Check]) -> str:
    """Returns what the figures of the claim are, nothing where there are none."""
    bounds = dearest(found)
    if failed(made) or not bounds or not _bounded(found, bounds):
        return ""
    whose = (
        "ε and δ are those of the site that spent most"
        if len(bounds) == 1
        else "δ is each site’s own, and ε that of the site with this δ that spent most"
    )
    return (
        f"{whose}, recomputed for this page from its ledger. The smaller ε, the less any one "
        f"{found.contract.privacy.unit} matters; the claim is about what others can learn, not "
        f"about how likely a breach is.{_adaptive(found)}{_of_rows(found)}{_of_person(found)}"
    )


def dearest(found: Evidence) -> list[Spent]:
    """Returns, for each δ of the domains that the contract names, the one that spent most.

    A site's ε holds at its own δ alone.
    """
    by_delta: dict[float, Spent] = {}
    for spent in found.of_run:
        most = by_delta.setdefault(spent.delta, spent)
        if _number(spent.epsilon) > _number(most.epsilon):
            by_delta[spent.delta] = spent
    return [by_delta[delta] for delta in sorted(by_delta)]


def factor(epsilon: float) -> str:
    """Returns e^ε as a reader takes it in, rounded up.

    Example:
        >>> factor(2.5653), factor(8.0), factor(20.0)
        ('13.01', '2,981', 'over a million')
    """
    value = math.exp(min(epsilon, 100.0))
    if value > _GREATEST_FACTOR:
        return "over a million"
    return f"{math.ceil(value * 100) / 100:.2f}" if value < 100 else f"{math.ceil(value):,}"


def unchecked(found: Evidence) -> list[str]:
    """Returns what a signature under this page does not cover, whatever the checks say."""
    return [*_missing_evidence(found), *_beyond_ledgers(found)]


def _failures(made: list[Check]) -> Iterator[Verdict]:
    for check in failed(made):
        yield Verdict("failed", "NOT VERIFIED", f"“{check.name}” failed: {check.detail}")


def _without_guarantee(found: Evidence) -> Iterator[Verdict]:
    if found.contract.privacy.mechanism == "none":
        yield Verdict(
            "unprotected",
            "No privacy: unprotected run",
            "Nothing was clipped and no noise was added. This page is a record, not a claim.",
        )
    elif _is_simulation(found):
        yield Verdict(
            "simulation",
            "Simulation: no guarantee",
            "All sites ran on one machine, and their noise came from a seed that is written down. "
            "Whoever has the seed can take the noise away. The figures are what a real federation "
            "with the same terms would spend.",
        )


def _is_simulation(found: Evidence) -> bool:
    seeded = found.contract.privacy.randomness == "seeded"
    marked = any(spent.simulation or spent.seeded for spent in found.spent)
    return found.contract.simulation or seeded or marked


def _of_person(found: Evidence) -> str:
    """Returns what holds of a person with several records, nothing where none is known of."""
    if found.contract.rows_per_person is None:
        return ""
    rows = [s.rows_per_person for s in found.of_run if s.rows_per_person is not None]
    if len(rows) < len(found.of_run):
        return (
            " A person with several records: nothing bounds ε, for another contract in the ledgers "
            "bounds no such person’s records."
        )
    bounds = _most([(spent.delta, spent.epsilon_person) for spent in found.of_run])
    records = counted(max(rows), "record")
    return f" A person with up to {records}: ε at most {bounds}, by the ledgers."


def _of_rows(found: Evidence) -> str:
    """Returns what holds of a record whose place another takes, nothing where none does."""
    kept = _rows_kept(found)
    if kept is None:
        return ""
    some = [(s.delta, s.epsilon_replaced) for s in found.of_run if s.rows_kept is not None]
    return f" {of_rows_kept(kept, f'at most {_most(some)}', 'record')}."


def _rows_kept(found: Evidence) -> int | None:
    """Returns the fewest records of a person that a contract charged used, None where all did."""
    rows = (spent.rows_kept for spent in found.of_run)
    return min((row for row in rows if row is not None), default=None)


def _adaptive(found: Evidence) -> str:
    bounds = _most([(spent.delta, spent.epsilon_adaptive) for spent in found.of_run])
    return f" If contracts were chosen after looking at earlier releases: ε at most {bounds}."


def _most(spent: list[tuple[float, float | None]]) -> str:
    """Returns the greatest ε at each δ, in words."""
    most: dict[float, float] = {}
    for delta, epsilon in spent:
        most[delta] = max(_number(epsilon), most.get(delta, 0.0))
    return ", ".join(
        f"{_shown(epsilon)} at δ\u00a0=\u00a0{delta:g}" for delta, epsilon in sorted(most.items())
    )


def _shown(epsilon: float) -> str:
    return f"{epsilon:.4f}" if math.isfinite(epsilon) else "unbounded"


def _bounded(found: Evidence, bounds: list[Spent]) -> bool:
    private = found.contract.privacy.mechanism != "none"
    return private and all(spent.epsilon is not None for spent in bounds)


def _sentence(found: Evidence, bounds: list[Spent]) -> str:
    said = "; and at most ".join(_bound(found, spent, len(bounds)) for spent in bounds)
    record = "record" if found.contract.privacy.unit == "example" else found.contract.privacy.unit
    kept = _rows_kept(found)
    whose = (
        "" if kept is None else f", of a person with no more than {counted(kept, record)} there,"
    )
    return (
        f"For {_whose(found)}: whatever anyone concludes from all that the site released of these "
        "data, in this and every other run of its ledger, even if they know the "
        f"data of all other sites, adding or taking away any one {record} of the site’s data"
        f"{whose} makes that conclusion at most {said}."
    )


def _whose(found: Evidence) -> str:
    covered = len({spent.site for spent in found.of_run})
    if not found.missing:
        return _sites(covered, "the site", "each of the {n} sites")
    here = "whose ledger is here"
    return _sites(covered, f"the one site {here}", f"each of the {{n}} sites {here}")


def _bound(found: Evidence, spent: Spent, deltas: int) -> str:
    bound = (
        f"{factor(spent.epsilon or 0.0)} times as likely (ε\u00a0=\u00a0{spent.epsilon:.4f}), "
        f"plus a probability of at most {spent.delta:g} (δ)"
    )
    if deltas == 1:
        return bound
    sites = sorted({other.site for other in found.of_run if other.delta == spent.delta})
    more = f" and {len(sites) - _NAMED} more" if len(sites) > _NAMED else ""
    return f"{bound}, at {', '.join(sites[:_NAMED])}{more}"


def _number(epsilon: float | None) -> float:
    return math.inf if epsilon is None else epsilon


def _sites(count: int, one: str, many: str) -> str:
    return one if count == 1 else many.format(n=count)


def _missing_evidence(found: Evidence) -> Iterator[str]:
    if found.missing:
        yield f"The ledgers of {', '.join(found.missing[:20])}: none is in the folder."
    if unused := [spent.site for spent in found.of_run if not spent.charges]:
        yield (
            f"Whether {', '.join(unused[:20])} took part: no charge of this contract is in the "
            "ledger."
        )
    open_ended = [s.site for s in found.spent if not s.anchors]
    if open_ended:
        yield (
            f"Whether the end of a ledger was cut off ({', '.join(open_ended[:20])}): no head was "
            "seen elsewhere."
        )
    if found.folder.received is None:
        yield "Whether every update that a server took stands in a ledger: no receipts are here."
    if found.mechanism is None:
        yield (
            "Whether the noise, the clipping and the sampling are as claimed: no audit of the "
            "mechanism was given (bract audit experiment)."
        )
    else:
        yield (
            "Whether the machines of this run did what the experiment in audit.json did: it ran "
            "the same code on public or made-up data, elsewhere."
        )
        yield from (f"By that experiment: {one}." for one in found.mechanism.not_checked)
    if found.membership is None:
        yield "How attacks on the released model fare: no audit of the result was given."
    if not found.agreement:
        yield "ε by a third accountant: no table of agreement was given."


def _beyond_ledgers(found: Evidence) -> Iterator[str]:
    yield (
        "Whose keys these are. They come from contract.json in the folder: compare the "
        "coordinator’s and the sites’ keys below with their holders, by another way."
    )
    if any(spent.anchors for spent in found.spent):
        yield (
            "Whether a ledger went on after the head that it was held against: entries that came "
            "later can have been cut off, with what they spent."
        )
        yield (
            "Where the heads come from that the ends of ledgers were held against: they lie in the "
            "same folder. Compare the last entries below with the site’s and the server’s own."
        )
    yield (
        "That noise was really added, by a source that nobody can predict: a ledger records what "
        "the site’s software said of itself."
    )
    yield (
        "The true data: that they are what the domain says, that none of them are counted under "
        "another domain or at another site too, and how many records one person has. A person "
        "with several records is protected less."
    )
    yield (
        "A site and a server that act together: they can write another history and countersign it."
    )
    yield (
        "Everything else that left a site: other software, publications, backups, the model’s use "
        "inside the site."
    )
    yield (
        "Floating point and timing. The claim is of the idealised mechanism with real numbers; "
        "attacks on its implementation are made harder, not excluded."
    )
    if found.spent:
        yield (
            "Whether contracts were chosen after looking at earlier releases. If they were, the ε "
            "that holds is that of the site’s filter, or of its whole menu, in the table by site."
        )
    yield "Accuracy and scores: they are the server’s words, measured on its public examples."
    yield (
        "That the model file was made of these updates: ledgers hold hashes of what each site "
        "sent, and none of the sum."
    )
    if found.contract.evaluation is not None:
        yield "Local accuracies, which are noised counts of the sites’ own."
