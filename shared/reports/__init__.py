"""What commands print with --json and leave in files: the schemas are made from these."""

from __future__ import annotations

from typing import Any, Literal

from bract.shared.audits import MechanismAudit
from bract.shared.configuration import Frozen
from bract.shared.reports.audits import AuditPull, Budget, LedgerExport, Membership, Verification
from bract.shared.reports.keys import AuditorKeys, CoordinatorKeys, ServerKeys, ShownKeys, SiteKeys
from bract.shared.reports.models import ModelExport, ModelPredictions, ModelScores
from bract.shared.reports.runs import FederationSummary, MetricsLine, ServerSummary, Summary
from bract.shared.reports.services import (
    ContractCheck,
    ContractShown,
    Recovery,
    ServerStatus,
    SiteStatus,
)


class Calibration(Frozen):
    """`bract calibrate --json`: σ for a budget, and what it buys."""

    noise_multiplier: float
    epsilon: float
    epsilon_prv: float | None
    epsilon_filter: float
    filter_order: int
    delta: float
    sampling_rate: float
    steps: int
    max_steps: int
    adjacency: str


class Failure(Frozen):
    """What any command prints with --json when it fails."""

    error: dict[Literal["type", "message"], str]


REPORTS: dict[str, type[Frozen]] = {
    "summary": Summary,
    "metrics": MetricsLine,
    "calibrate": Calibration,
    "audit-verify": Verification,
    "audit-budget": Budget,
    "audit-export": LedgerExport,
    "audit-pull": AuditPull,
    "audit-membership": Membership,
    "audit-experiment": MechanismAudit,
    "contract": ContractShown,
    "client-check": ContractCheck,
    "client-recover": Recovery,
    "client-status": SiteStatus,
    "server": ServerSummary,
    "federation": FederationSummary,
    "server-status": ServerStatus,
    "model-evaluate": ModelScores,
    "model-predict": ModelPredictions,
    "model-export": ModelExport,
    "keys-coordinator": CoordinatorKeys,
    "keys-server": ServerKeys,
    "keys-site": SiteKeys,
    "keys-auditor": AuditorKeys,
    "keys-show": ShownKeys,
    "error": Failure,
}


def schema(name: str) -> dict[str, Any]:
    """Returns the JSON Schema of a report."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **REPORTS[name].model_json_schema(),
    }
