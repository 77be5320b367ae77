"""What the ledgers of a folder say of each site, once they are verified."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from bract.shared import canonical
from bract.shared.contract import Contract
from bract.shared.errors import BractError, VerificationFailed
from bract.shared.policy import MenuLeft
from bract.shared.privacy import accounting, budget, evidence, export, verification
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.contents import Contents
from bract.shared.privacy.events import Event
from bract.shared.privacy.receipts import Received
from bract.shared.privacy.verification import Verified
from bract.shared.privacy.witness import Witness
from bract.shared.report import folder
from bract.shared.report.folder import LedgerFile
from bract.shared.reports.audits import Ceiling

CURVE_POINTS = 60


@dataclass(frozen=True, slots=True)
class Spent:
    """One domain's privacy, recomputed from a ledger that holds.

    ε is at `delta`, which is the site's own, and None where it is unbounded. `after` is (round of
    this contract, what the whole domain was charged by then), `curve` the same as ε.
    Each use is charged to the domains `shared` too, and must fit what is left of them.
    `left` is None too where steps of `menu` are, which is None under a filter.
    `epsilon_person` bounds that of a person with `rows_per_person` examples, as every contract
    charged bounds them; both are None where one does not. Where a contract charged keeps only
    `rows_kept` of a person, ε is of a row of a person with no more; of one with more another takes
    its place, at `epsilon_replaced`.
    `anchors` are the files whose head is in the chain, `anchor` the number of the last entry that
    one names; `witnessed` is by the contract's server alone; `received` counts the updates that a
    server took and that stand here behind a charge, None where nobody kept their receipts.
    """

    site: str
    domain: str
    epsilon: float | None
    epsilon_run: float | None
    epsilon_filter: float | None
    rows_per_person: int | None
    epsilon_person: float | None
    rows_kept: int | None
    epsilon_replaced: float | None
    epsilon_menu: float | None
    menu: tuple[MenuLeft, ...] | None
    ceiling: float
    ceilings: tuple[Ceiling, ...]
    left: float | None
    shared: tuple[str, ...]
    delta: float
    charges: int
    rounds: int
    entries: int
    head: str
    genesis: str
    policy: str
    key: str
    anchors: tuple[str, ...]
    anchor: int | None
    witnessed: int | None
    received: int | None
    simulation: bool
    seeded: bool
    lost: bool
    events: tuple[Event, ...]
    events_run: tuple[Event, ...]
    after: tuple[tuple[int, tuple[Event, ...]], ...]
    curve: tuple[tuple[int, float], ...]

    @property
    def epsilon_adaptive(self) -> float | None:
        """The ε that holds however contracts were chosen: its filter's, or its whole menu's."""
        return self.epsilon_filter if self.menu is None else self.epsilon_menu


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """A ledger file: what it proves, or the fault for which nothing of it is shown."""

    name: str
    sha256: str | None
    named: tuple[str, ...]
    spent: tuple[Spent, ...]
    fault: str | None


@dataclass(frozen=True, slots=True)
class Seen:
    """What others kept of a run: receipts of updates, and heads that a server countersigned.

    `received` is None where nobody kept any, or what was kept cannot be read.
    """

    received: Sequence[Received] | None
    witnesses: Sequence[Witness]


def records(files: Sequence[LedgerFile], agreed: Contract, others: Seen) -> list[LedgerRecord]:
    """Returns what each ledger proves, held against the contract's keys and all that others saw.

    Args:
        files: the ledgers.
        agreed: the contract, whose own signature holds.
        others: what is held against all of them, beside the heads that lie with each.
    """
    apart = _forks(files)
    return [_record(file, agreed, others, apart.get(file.name)) for file in files]


def missing(found: Sequence[LedgerRecord], agreed: Contract) -> list[str]:
    """Returns the sites of a contract of whose domain no ledger is here, whole or not.

    A site's ledger of another domain says nothing of the run; the domain is named then.
    """
    here = {(spent.site, spent.domain) for record in found for spent in record.spent}
    unread = {site for record in found if record.fault is not None for site in record.named}
    others = {site for site, _ in here}
    return [
        f"{site.name} (domain {site.domain})" if site.name in others else site.name
        for site in agreed.cohort
        if (site.name, site.domain) not in here and site.name not in unread
    ]


def _forks(files: Sequence[LedgerFile]) -> dict[str, str]:
    """Returns the fault of each file that tells another history than one beside it, or less."""
    held: dict[str, Contents] = {}
    faults: dict[str, str] = {}
    for file in files:
        with suppress(BractError):  # what cannot be read says so by itself
            held[file.name] = export.contents(file.path)
            try:
                copies = {name: export.contents(path) for name, path in file.copies.items()}
                evidence.check_forks(held | copies)
                _check_copies(file.name, held[file.name], copies)
            except BractError as error:
                # a path is the reader's own affair
                faults[file.name] = str(error).replace(f"{file.path.parent}/", "")
                del held[file.name]
    return faults


def _check_copies(name: str, held: Contents, copies: Mapping[str, Contents]) -> None:
    for copy, more in copies.items():
        for (site, domain), rows in more.rows.items():
            if len(rows) > len(held.rows.get((site, domain), ())):
                raise VerificationFailed(
                    f"ledger of {site!r}, domain {domain!r}: {copy} holds entries that {name} lacks"
                )


def _record(file: LedgerFile, agreed: Contract, others: Seen, apart: str | None) -> LedgerRecord:
    content = folder.content_of(file.path)
    sha256 = None if content is None else canonical.sha256(content)
    pinned = {site.name: site.key for site in agreed.cohort}
    spent: tuple[Spent, ...] = ()
    fault = None
    try:
        if apart is not None:
            raise VerificationFailed(apart)
        spent = _verified(file, pinned, agreed, others)
    except BractError as error:
        # The path is the reader's own affair; the file's name in the folder is enough.
        fault = " ".join(str(error).replace(f"{file.path}: ", "").split())
    named = tuple(folder.sites_in(file.path)) or (file.site,)
    return LedgerRecord(name=file.name, sha256=sha256, named=named, spent=spent, fault=fault)


def _verified(
    file: LedgerFile, pinned: Mapping[str, str], agreed: Contract, others: Seen
) -> tuple[Spent, ...]:
    keys = [agreed.witness] if agreed.witness else []
    check = partial(verification.verify, file.path, site_keys=pinned, witness_keys=keys)
    found = check(anchors={}, witnesses=others.witnesses, received=others.received)
    judged = {name: check(anchors=heads) for name, heads in folder.heads(file).items()}
    if others.witnesses:
        judged["witnesses.json"] = found
    seen: dict[tuple[str, str], dict[str, int]] = {}
    for name, chains in judged.items():
        for held in chains:
            if held.anchor is not None:
                seen.setdefault((held.chain.site, held.chain.domain), {})[name] = held.anchor
    return tuple(
        _spent(one, agreed, seen.get((one.chain.site, one.chain.domain), {})) for one in found
    )


def _spent(found: Verified, agreed: Contract, seen: Mapping[str, int]) -> Spent:
    chain, limit = found.chain, found.policy.domains[found.chain.domain]
    filtered, whole = budget.filtered(chain, limit.delta), budget.of_menu(chain, limit.delta)
    menu = budget.menu_left(chain)
    events, in_run = chain.events, chain.events_of(agreed.sha256)
    after = _after(chain, agreed.sha256)
    spent = accounting.epsilon(events, limit.delta)
    return Spent(
        site=chain.site,
        domain=chain.domain,
        epsilon=canonical.finite(spent),
        epsilon_run=canonical.finite(accounting.epsilon(in_run, limit.delta)),
        epsilon_filter=canonical.finite(filtered),
        rows_per_person=found.rows_per_person,
        epsilon_person=_of_person(events, limit.delta, found.rows_per_person),
        rows_kept=found.rows_kept,
        epsilon_replaced=_replaced(events, limit.delta) if found.rows_kept else None,
        epsilon_menu=None if whole is None else canonical.finite(whole),
        menu=None if menu is None else tuple(menu),
        ceiling=limit.epsilon,
        ceilings=tuple(found.ceilings),
        left=budget.left(chain, limit.epsilon, spent, budget.adaptive(chain, limit.delta)),
        shared=found.policy.charged_domains(chain.domain)[1:],
        delta=limit.delta,
        charges=chain.attempts[agreed.sha256],
        rounds=len({round_number for name, round_number in chain.charges if name == agreed.sha256}),
        entries=chain.length,
        head=chain.head.hash if chain.head else "",
        genesis=chain.genesis_hash,
        policy=found.policy.sha256,
        key=chain.key,
        anchors=tuple(seen),
        anchor=max(seen.values(), default=None),
        witnessed=found.witnessed,
        received=found.received,
        simulation=bool(chain.genesis and chain.genesis.simulation),
        seeded=chain.seeded,
        lost=chain.recovered is not None,
        events=events,
        events_run=in_run,
        after=after,
        curve=_curve(after, limit.delta),
    )


def _after(chain: Chain, contract: str) -> tuple[tuple[int, tuple[Event, ...]], ...]:
    """Returns what the whole domain was charged by the end of a contract's rounds, of some of many.

    A round that was charged twice counts after its last charge.
    """
    last = {
        number: charges[-1].sequence
        for (name, number), charges in sorted(chain.charges.items())
        if name == contract
    }
    numbers = sorted(last)
    step = max(1, math.ceil(len(numbers) / CURVE_POINTS))
    shown = sorted({*numbers[step - 1 :: step], *numbers[-1:]})
    return tuple((number, _until(chain, last[number])) for number in shown)


def _until(chain: Chain, charge: int) -> tuple[Event, ...]:
    evaluated = chain.evaluations.get(charge)
    return chain.events_until(charge if evaluated is None else evaluated.sequence)


def _curve(
    after: Sequence[tuple[int, tuple[Event, ...]]], delta: float
) -> tuple[tuple[int, float], ...]:
    points = ((number, accounting.epsilon(events, delta)) for number, events in after)
    return tuple(point for point in points if math.isfinite(point[1]))


def _of_person(events: tuple[Event, ...], delta: float, rows: int | None) -> float | None:
    if rows is None:
        return None
    return canonical.finite(accounting.epsilon_of_person(events, delta, rows))


def _replaced(events: tuple[Event, ...], delta: float) -> float | None:
    return canonical.finite(accounting.epsilon_replace_one(events, delta))
