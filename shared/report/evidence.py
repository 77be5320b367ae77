"""Everything that a report stands on, read and verified; what is missing is None."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from bract.shared import canonical, contract
from bract.shared.audits import MechanismAudit
from bract.shared.configuration import parse
from bract.shared.contract import Contract
from bract.shared.errors import BractError, UsageError
from bract.shared.privacy import anchors, receipts
from bract.shared.privacy.receipts import Received
from bract.shared.privacy.witness import Witness
from bract.shared.report import folder, sites
from bract.shared.report.folder import Folder
from bract.shared.report.sites import LedgerRecord, Seen, Spent
from bract.shared.reports.audits import Membership
from bract.shared.reports.runs import FederationSummary, MetricsLine, ServerSummary, Summary

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What a page is made from.

    `contract_fault`, `kept_fault` and the faults in `ledgers` are why something here does not hold;
    `kept_fault` is of the files in which others kept what they saw.
    """

    folder: Folder
    contract: Contract
    contract_fault: str | None
    kept_fault: str | None
    ledgers: tuple[LedgerRecord, ...]
    missing: tuple[str, ...]
    summary: Summary | ServerSummary | None
    metrics: tuple[MetricsLine, ...]
    model_sha256: str | None
    mechanism: MechanismAudit | None
    membership: Membership | None
    agreement: tuple[Mapping[str, Any], ...]

    @property
    def spent(self) -> list[Spent]:
        """Every domain of every ledger that holds."""
        return [spent for record in self.ledgers for spent in record.spent]

    @property
    def of_run(self) -> list[Spent]:
        """The domains that this contract names, of ledgers that hold."""
        named = {(site.name, site.domain) for site in self.contract.cohort}
        return [spent for spent in self.spent if (spent.site, spent.domain) in named]


def gather(found: Folder) -> Evidence:
    """Returns the evidence in a folder, every ledger verified; a fault in one is kept, not raised.

    Raises:
        UsageError: where a file is of another form than it should be.
    """
    signed = contract.read(found.contract)
    agreed, fault = signed.contract, None
    try:
        signed.verify(agreed.coordinator)
    except BractError as error:
        fault = f"contract.json is not signed by the coordinator that it names: {error}"
    others, kept_fault = _others(found)
    # Keys of a contract that does not hold pin nothing.
    ledgers = sites.records(found.ledgers, agreed, others) if fault is None else []
    model = None if found.model is None else folder.content_of(found.model)
    return Evidence(
        folder=found,
        contract=agreed,
        contract_fault=fault,
        kept_fault=kept_fault,
        ledgers=tuple(ledgers),
        missing=tuple(sites.missing(ledgers, agreed)),
        summary=None if found.summary is None else _summary(found.summary),
        metrics=() if found.metrics is None else _metrics(found.metrics),
        model_sha256=None if model is None else canonical.sha256(model),
        mechanism=_read(MechanismAudit, found.mechanism),
        membership=_read(Membership, found.membership),
        agreement=() if found.agreement is None else _agreement(found.agreement),
    )


def _others(found: Folder) -> tuple[Seen, str | None]:
    """Returns what others kept, and why some of it cannot be read; what cannot proves nothing."""
    received: list[Received] | None = None
    witnesses: tuple[Witness, ...] = ()
    faults = []
    try:
        received = None if found.received is None else receipts.read(found.received)
    except BractError as error:
        faults.append(str(error).replace(str(found.received), "receipts.jsonl"))
    try:
        witnesses = () if found.witnesses is None else anchors.witnesses(found.witnesses)
    except BractError as error:
        faults.append(str(error).replace(str(found.witnesses), "witnesses.json"))
    return Seen(received, witnesses), " ".join("; ".join(faults).split()) or None


def _summary(path: Path) -> Summary | ServerSummary:
    found = _json(path)
    kind: type[Summary | ServerSummary] = ServerSummary
    if "per_site" in found:
        kind = FederationSummary if "plain_accuracy" in found else Summary
    return parse(kind, found, source=str(path))


def _metrics(path: Path) -> tuple[MetricsLine, ...]:
    try:
        # What follows the last line's end is still being written.
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a file of JSON lines: copy it again") from error
    return tuple(parse(MetricsLine, line, source=str(path)) for line in lines)


def _agreement(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Returns the rows of a table: the first list of objects in a JSON file."""
    found = _json(path)
    for rows in found.values():
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return tuple(rows)
    raise UsageError(f"{path} holds no table: name the file with ε by several accountants")


def _read(kind: type[Model], path: Path | None) -> Model | None:
    return None if path is None else parse(kind, _json(path), source=str(path))


def _json(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not JSON: copy it again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object: copy it again")
    return found
