"""Every check that a report makes, with its result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bract.shared.privacy import accounting
from bract.shared.privacy.conformity import TOLERANCE
from bract.shared.report.evidence import Evidence
from bract.shared.report.sites import Spent
from bract.shared.reports.runs import ServerSummary, Summary
from bract.shared.terms import LEAST_DELTA, counted

Result = Literal["passed", "failed", "not done"]

AGREEMENT = 0.02  # in ε, of accountants that are each right within about half of it

# Of the privacy loss, each tried where the one before tells too much.
_GRIDS = (accounting.ONLINE_INTERVAL, accounting.THOROUGH_INTERVAL, 1e-5)

# What a ledger that holds was held against, in the order of `privacy.verification`.
_OF_A_LEDGER = (
    ("The file is a ledger and whole", "its tables are a ledger’s, and no write was interrupted"),
    ("Entries are signed", "each in canonical form, by the site’s key that the contract lists"),
    ("Entries follow each other", "each names the hash of the one before; none is missing between"),
    (
        "Contracts are whole",
        "each one that a charge names is stored, and its coordinator signed it",
    ),
    ("Policies are whole", "each one that an entry names is stored, and is what its hash says"),
    ("Charges are the contract’s", "noise, clip norm, sampling rate, steps, normaliser and number"),
    ("Charges come first", "each update stands behind an earlier charge, and no charge has two"),
    ("The site’s policy allowed them", "models, mechanism, noise, rate, and ε within the ceiling"),
    ("Shared domains are charged alike", "each charge stands in every domain that shares the data"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """A check: what was held against what, and what came of it."""

    name: str
    result: Result
    detail: str


def checks(found: Evidence) -> list[Check]:
    """Returns every check with its result; "not done" where there was nothing to check."""
    return [
        _contract(found),
        *_ledgers(found),
        *_faults(found),
        *_kept(found),
        _all_here(found),
        _anchored(found),
        _witnessed(found),
        _received(found),
        _summary(found),
        _metrics(found),
        _renyi(found),
        _agreement(found),
        _mechanism(found),
    ]


def failed(found: list[Check]) -> list[Check]:
    """Returns the checks that failed."""
    return [check for check in found if check.result == "failed"]


def _contract(found: Evidence) -> Check:
    if found.contract_fault is not None:
        return Check("The contract is signed", "failed", found.contract_fault)
    return Check("The contract is signed", "passed", "by the coordinator’s key that it names")


def _ledgers(found: Evidence) -> Iterator[Check]:
    """Yields what `verify` holds ledgers against; it stops at a ledger’s first fault."""
    held = [record for record in found.ledgers if record.fault is None]
    for name, detail in _OF_A_LEDGER:
        if not held:
            yield Check(name, "not done", "no ledger was judged to its end")
        elif len(held) < len(found.ledgers):
            yield Check(
                name, "passed", f"in {len(held)} of {len(found.ledgers)} ledgers alone: {detail}"
            )
        else:
            yield Check(name, "passed", detail)


def _faults(found: Evidence) -> Iterator[Check]:
    for record in found.ledgers:
        if record.fault is not None:
            yield Check(f"The ledger {record.name} holds", "failed", record.fault)


def _kept(found: Evidence) -> Iterator[Check]:
    if found.kept_fault is not None:
        yield Check("What others kept can be read", "failed", found.kept_fault)


def _all_here(found: Evidence) -> Check:
    name, count = "Every site’s ledger is here", len(found.contract.cohort)
    if not found.ledgers:
        return Check(name, "not done", "there is no ledger in the folder")
    if found.missing:
        return Check(name, "not done", f"{_listed(found.missing)} of {count} sites: none is here")
    unused = [spent.site for spent in found.of_run if not spent.charges]
    nothing = f"; that of {_listed(unused)} holds nothing of this contract" if unused else ""
    return Check(name, "passed", f"of all {count} sites{nothing}")


def _anchored(found: Evidence) -> Check:
    name = "No known entry is missing"
    without = [spent.site for spent in found.spent if not spent.anchors]
    if not found.spent or len(without) == len(found.spent):
        return Check(name, "not done", "no head was seen elsewhere; later entries may be missing")
    sources = sorted({source for spent in found.spent for source in spent.anchors})
    ends = {f"{s.site} to entry {s.anchor} of {s.entries - 1}" for s in found.spent if s.anchors}
    detail = f"the heads in {_listed(sources)} are in the ledgers: {_listed(sorted(ends))}"
    if without:
        return Check(name, "not done", f"{detail}, but none is known of {_listed(without)}")
    return Check(name, "passed", f"{detail}; what came after a head cannot be excluded")


def _witnessed(found: Evidence) -> Check:
    name = "The server countersigned"
    seen = [s for s in found.spent if s.witnessed is not None]
    if not seen:
        return Check(name, "not done", "no countersignature by the key in the contract is here")
    detail = _listed([f"{s.site} up to entry {s.witnessed} of {s.entries - 1}" for s in seen])
    without = [s.site for s in found.spent if s.witnessed is None]
    if without:
        return Check(name, "not done", f"{detail}, but nothing of {_listed(without)}")
    return Check(name, "passed", detail)


def _received(found: Evidence) -> Check:
    name = "Every update taken was paid for"
    count = sum(spent.received or 0 for spent in found.spent)
    if not count:
        return Check(name, "not done", "the server’s receipts are not here, or of no ledger here")
    if any(record.fault is not None for record in found.ledgers):
        return Check(name, "not done", f"{count} updates; not those of a ledger that does not hold")
    return Check(name, "passed", f"each of {count} updates that the server took, behind its charge")


def _summary(found: Evidence) -> Check:
    name, summary = "The summary agrees with the ledgers", found.summary
    if summary is None or not found.of_run:
        return Check(name, "not done", "there is no summary, or no ledger to hold it against")
    if summary.contract_sha256 != found.contract.sha256:
        return Check(name, "failed", "summary.json is of another contract than contract.json")
    # Each site's policy has a δ of its own: what is compared is at the summary's.
    delta = _told_delta(found)
    if delta is None:
        return Check(name, "failed", f"δ {summary.delta:g} in summary.json is no δ of any ε")
    for spent in found.of_run:
        said = summary.epsilon_run
        if isinstance(summary, Summary):
            site = summary.per_site.get(spent.site)
            said = None if site is None else site.epsilon_run
        told, counted = _number(said), accounting.epsilon(spent.events_run, delta)
        # A server counts every attempt; a site that missed some has spent less.
        over = abs(told - counted) if isinstance(summary, Summary) else counted - told
        if over > TOLERANCE:
            return Check(
                name,
                "failed",
                f"{spent.site}: the ledger says ε {_shown(counted)} of this run at δ {delta:g}, "
                f"the summary {_shown(said)}",
            )
    if fault := _of_person(found, summary, delta) or _of_rows(found, summary, delta):
        return Check(name, "failed", fault)
    return Check(
        name, "passed", f"contract, and ε of this run at δ {delta:g} recomputed for each site"
    )


def _of_person(found: Evidence, summary: Summary | ServerSummary, delta: float) -> str | None:
    """Returns how a summary's ε of a person falls short of the ledgers', None where it does not."""
    rows, said = found.contract.data.rows_per_person, summary.rows_per_person
    # A summary of ledgers may say more: other contracts in them may bound a person's rows less.
    if said is not None and (rows is None or said < rows):
        return (
            f"summary.json says {counted(said, 'record')} a person, the contract {rows or 'none'}"
        )
    if found.contract.rows_per_person is None or summary.epsilon_person is None:
        return None
    for spent in found.of_run:
        whole = _is_whole(summary, spent)
        most = spent.rows_per_person if whole else rows
        if most is None or (said is not None and said < most):
            return (
                f"{spent.site}: the contracts in the ledger take {most or 'any number of'} records "
                f"of a person, summary.json says {said or 'nothing'}"
            )
        events = spent.events if whole else spent.events_run
        least = accounting.epsilon_of_person(events, delta, most)
        if least > summary.epsilon_person + TOLERANCE:
            return (
                f"{spent.site}: the ledger says ε {_shown(least)} of a person with "
                f"{counted(most, 'record')} at δ {delta:g}, the summary "
                f"{_shown(summary.epsilon_person)}"
            )
    return None


def _of_rows(found: Evidence, summary: Summary | ServerSummary, delta: float) -> str | None:
    """Returns how a summary's ε of a replaced record falls short, None where it does not.

    One of an earlier version tells none.
    """
    said = summary.epsilon_replaced
    for spent in found.of_run:
        whole = _is_whole(summary, spent)
        kept = spent.rows_kept if whole else found.contract.rows_per_person
        if kept is None or said is None or summary.rows_kept is None:
            continue
        if summary.rows_kept > kept:
            return (
                f"{spent.site}: a contract in the ledger keeps {counted(kept, 'record')} of a "
                f"person, summary.json says {summary.rows_kept}"
            )
        events = spent.events if whole else spent.events_run
        least = accounting.epsilon_replace_one(events, delta)
        if least > said + TOLERANCE:
            return (
                f"{spent.site}: the ledger says ε {_shown(least)} of a record that is replaced at "
                f"δ {delta:g}, the summary {_shown(said)}"
            )
    return None


def _is_whole(summary: Summary | ServerSummary, spent: Spent) -> bool:
    """Returns whether a summary's figures must cover all of a ledger, not this run alone.

    A server knows its run alone, and a ledger goes on after its summary.
    """
    head = summary.heads.get(spent.site)
    return isinstance(summary, Summary) and head is not None and head.hash == spent.head


def _metrics(found: Evidence) -> Check:
    name, delta = "The metrics’ ε covers the ledgers’", _told_delta(found)
    said = {line.round: _number(line.epsilon_run) for line in found.metrics}
    whole = [spent for spent in found.of_run if spent.events == spent.events_run]
    if not said or not whole:
        return Check(name, "not done", "no metrics.jsonl, or the ledgers hold other runs too")
    if delta is None:
        return Check(name, "not done", "no summary.json says at which δ the metrics count")
    for spent in whole:
        for round_number, events in spent.after:
            covered = said.get(round_number, math.inf) + TOLERANCE
            if accounting.epsilon(events, delta) > covered:
                return Check(
                    name, "failed", f"round {round_number}: {spent.site}'s ledger is over it"
                )
    return Check(name, "passed", f"in each of {len(said)} rounds, at δ {delta:g}")


def _told_delta(found: Evidence) -> float | None:
    """Returns the δ at which summary and metrics count, None where no summary says one."""
    delta = None if found.summary is None else found.summary.delta
    return delta if delta is not None and LEAST_DELTA <= delta < 1 else None


def _renyi(found: Evidence) -> Check:
    name = "A second way of counting agrees"
    both = [s for s in found.spent if s.epsilon is not None and s.epsilon_filter is not None]
    if not both:
        return Check(name, "not done", "the ledgers fix no order for Rényi divergences")
    counted = [(s.epsilon_filter or 0.0, _by_privacy_loss(s)) for s in both]
    if any(loss > renyi + TOLERANCE for renyi, loss in counted):
        return Check(name, "failed", "ε by Rényi divergence is under ε by privacy loss")
    renyi, loss = max(counted)
    return Check(
        name,
        "passed",
        f"by Rényi divergence ε is at most {_shown(renyi)}, as it must not be under {_shown(loss)}",
    )


def _by_privacy_loss(spent: Spent) -> float:
    """Returns ε on the first grid that does not put it over ε by Rényi divergence, or the finest.

    A grid rounds the loss of each step up: over many steps of small loss that is more than all
    that Rényi divergence overstates.
    """
    found = math.inf
    for interval in _GRIDS:
        found = accounting.epsilon(spent.events, spent.delta, interval=interval)
        if found <= (spent.epsilon_filter or 0.0) + TOLERANCE:
            break
    return found


def _agreement(found: Evidence) -> Check:
    """Holds `epsilon` of each setting against every other accountant's, `epsilon_NAME`."""
    name = "Accountants agree over many settings"
    apart = [
        abs(row["epsilon"] - value)
        for row in found.agreement
        for column, value in row.items()
        if column.startswith("epsilon_") and _both_numbers(row.get("epsilon"), value)
    ]
    if not apart:
        return Check(name, "not done", "no table of ε by several accountants was given")
    result: Result = "passed" if max(apart) <= AGREEMENT else "failed"
    return Check(
        name, result, f"in {len(found.agreement)} settings by at most {max(apart):.4f} in ε"
    )


def _both_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _mechanism(found: Evidence) -> Check:
    name, audit, agreed = "The mechanism is as claimed", found.mechanism, found.contract
    if audit is None:
        return Check(name, "not done", "no audit.json was given")
    used = (agreed.privacy.mechanism, agreed.model.name)
    # In its own folder the audited model stands within the one that carries the canaries.
    own = f'"name":"{audit.model}"' in str(agreed.model.options.get("audited", ""))
    if (audit.mechanism, used[1] if own else audit.model) != used:
        return Check(
            name,
            "not done",
            f"audit.json is of {audit.mechanism} with the model {audit.model!r}, this run of "
            f"{used[0]} with {used[1]!r}",
        )
    if audit.passed:
        return Check(
            name, "passed", "an experiment on terms of its own recovered what was claimed there"
        )
    which = _listed(audit.failed) or "see its tests"
    return Check(name, "failed", f"the experiment in audit.json found it different: {which}")


def _listed(names: list[str] | tuple[str, ...]) -> str:
    few = ", ".join(names[:8])
    return few if len(names) <= 8 else f"{few} and {len(names) - 8} more"


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _shown(value: float | None) -> str:
    return f"{value:.4f}" if math.isfinite(_number(value)) else "unbounded"
