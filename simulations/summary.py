"""The summary of a run, simulated or real: the server's result beside what ledgers prove."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bract.shared import canonical
from bract.shared.contract import Contract
from bract.shared.errors import VerificationFailed
from bract.shared.privacy import accounting, export, head_file, prv, verification
from bract.shared.privacy.chain import Chain
from bract.shared.privacy.entries import Head
from bract.shared.privacy.ledger import Ledger
from bract.shared.privacy.verification import Verified
from bract.shared.reports.runs import (
    GUARANTEE_PRIVATE,
    GUARANTEE_SIMULATION,
    GUARANTEE_UNPROTECTED,
    Guarantee,
    LedgerHead,
    SitePrivacy,
    Summary,
    facts_of,
)
from bract.simulations.sites import Plan
from bract.simulations.state import State


def publish_ledgers(plan: Plan, agreed: Contract, out: Path) -> list[Path]:
    """Returns the ledger files in the run folder; copied there where the state lies elsewhere."""
    target = State.of_run(out)
    paths = []
    for name in sorted({plan.state.ledger(s.name, many=plan.many) for s in agreed.cohort}):
        if not name.exists():
            continue
        path = target.ledgers / name.name
        if path != name:
            target.ledgers.mkdir(exist_ok=True)
            ledger = Ledger(name)
            ledger.copy_to(path)
            ledger.close()
        paths.append(path)
    return paths


def summarise(
    *, plan: Plan, agreed: Contract, out: Path, result: Mapping[str, Any], workers: int
) -> Summary:
    """Returns the summary of a simulated run, after verifying every ledger of it.

    Raises:
        VerificationFailed: where a ledger does not hold, or lacks what the server saw of it.
    """
    return proven(
        agreed=agreed,
        ledgers=publish_ledgers(plan, agreed, out),
        # what the server saw: a ledger that was put back, or is gone, says less than was spent
        anchors=head_file.heads({"heads": result["heads"]}),
        result=result,
        delta=plan.delta,
        device=plan.device,
        workers=workers,
        out=out,
    )


def proven(
    *,
    agreed: Contract,
    ledgers: Iterable[Path],
    anchors: Mapping[tuple[str, str], Head],
    result: Mapping[str, Any],
    **facts: Any,
) -> Summary:
    """Returns what ledgers prove of a run, beside what the server measured.

    Args:
        agreed: the run's contract; its keys are the ones the ledgers are held against.
        ledgers: of every site that kept one.
        anchors: heads seen elsewhere, by (site, domain).
        result: the server's result.json.
        facts: `delta`, `device`, `workers` and `out` of the summary.

    Raises:
        VerificationFailed: where a ledger does not hold.
    """
    pinned = {site.name: site.key for site in agreed.cohort}
    proofs: dict[tuple[str, str], Verified] = {}
    for path in ledgers:
        if not path.stat().st_size or not export.contents(path).rows:
            # a site that refused all it was asked, or whose disk was full from the start; heads of
            # it are looked for below
            continue
        for found in verification.verify(path, site_keys=pinned, anchors=anchors):
            proofs[found.chain.site, found.chain.domain] = found
    if gone := sorted(anchors.keys() - proofs.keys()):
        raise VerificationFailed(f"no ledger of {gone[0][0]!r}, domain {gone[0][1]!r}")
    held = {
        site.name: proofs[site.name, site.domain]
        for site in agreed.cohort
        if (site.name, site.domain) in proofs
    }
    used = {name: found.chain for name, found in held.items()}
    delta = facts["delta"]
    per_site = {
        site.name: _privacy(used.get(site.name), site.domain, agreed, delta)
        for site in agreed.cohort
    }
    return Summary(
        **{**facts_of(agreed), **_of_person(list(held.values()), agreed, delta)},
        **_of_rows(list(held.values()), delta),
        **_worst(list(used.values()), per_site, delta),
        per_site=per_site,
        heads={
            name: LedgerHead(
                domain=chain.domain, sequence=chain.head.sequence, hash=chain.head.hash
            )
            for name, chain in used.items()
            if chain.head is not None
        },
        guarantee=_guarantee(agreed, used.values()),
        **{name: str(value) if name == "out" else value for name, value in facts.items()},
        **{name: value for name, value in result.items() if name not in {"heads", "charges"}},
    )


def save(summary: Summary, out: Path) -> None:
    """Writes summary.json."""
    canonical.write_atomically(
        out / "summary.json", canonical.encode(summary.model_dump(mode="json"))
    )


def _guarantee(agreed: Contract, chains: Iterable[Chain]) -> Guarantee:
    if agreed.privacy.mechanism == "none":
        return GUARANTEE_UNPROTECTED
    # Whatever a contract says: noise that was seeded anywhere in a ledger carries no guarantee.
    if agreed.simulation or any(chain.seeded for chain in chains):
        return GUARANTEE_SIMULATION
    return GUARANTEE_PRIVATE


def _worst(
    chains: list[Chain], per_site: Mapping[str, SitePrivacy], delta: float
) -> dict[str, Any]:
    unbounded = any(site.unbounded for site in per_site.values())
    spent = {chain.events for chain in chains}
    dearest = max(spent, key=lambda events: accounting.epsilon(events, delta), default=())
    in_run = [site.epsilon_run for site in per_site.values() if site.epsilon_run is not None]
    return {
        "epsilon": None if unbounded else accounting.epsilon(dearest, delta),
        "epsilon_run": None if unbounded else max(in_run, default=0.0),
        "epsilon_prv": None if unbounded else prv.epsilon_prv(dearest, delta),
        "unbounded": unbounded,
    }


def _privacy(chain: Chain | None, domain: str, agreed: Contract, delta: float) -> SitePrivacy:
    events = chain.events if chain else ()
    in_run = chain.events_of(agreed.sha256) if chain else ()
    return SitePrivacy(
        epsilon=canonical.finite(accounting.epsilon(events, delta)),
        epsilon_run=canonical.finite(accounting.epsilon(in_run, delta)),
        unbounded=accounting.is_unbounded(events),
        charges=chain.attempts[agreed.sha256] if chain else 0,
        domain=domain,
    )


def _of_person(held: list[Verified], agreed: Contract, delta: float) -> dict[str, Any]:
    """Returns how many examples a person has at the most, by every contract charged, and ε so."""
    each = [(found.chain.events, found.rows_per_person) for found in held]
    bounded = [(events, rows) for events, rows in each if rows is not None]
    if agreed.rows_per_person is None or len(bounded) < len(each):
        return {"rows_per_person": None, "epsilon_person": None}
    spent = [accounting.epsilon_of_person(events, delta, rows) for events, rows in set(bounded)]
    return {
        "rows_per_person": max((rows for _, rows in bounded), default=agreed.rows_per_person),
        "epsilon_person": canonical.finite(max(spent, default=0.0)),
    }


def _of_rows(held: list[Verified], delta: float) -> dict[str, Any]:
    """Returns the fewest rows of a person that any contract charged kept, and ε of one replaced."""
    some = [(found.chain.events, found.rows_kept) for found in held if found.rows_kept is not None]
    spent = [accounting.epsilon_replace_one(events, delta) for events in {e for e, _ in some}]
    return {
        "rows_kept": min((rows for _, rows in some), default=None),
        "epsilon_replaced": canonical.finite(max(spent)) if spent else None,
    }
