"""The audit of the mechanism passes over TLS, through real clients whose noise has no seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bract.shared.data import describe
from bract.shared.terms import ModelTerms
from bract.simulations.audits import federation, mechanism
from bract.simulations.audits.proposal import Subject
from bract.simulations.audits.settings import suite


@pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")  # of Flower's own
def test_real_clients_pass_the_audit_and_keep_real_ledgers(tmp_path: Path) -> None:
    subject, small = (
        Subject(ModelTerms(name="linear"), describe("digits")),
        suite(canaries=100, rounds=8),
    )
    found = federation.audit(subject, small, seed=5, folder=tmp_path)
    assert found.failed == []
    signed = found.trials["main"].signed
    assert signed is not None
    assert not signed.contract.simulation
    assert signed.contract.privacy.randomness == "csprng"
    report = mechanism.report(found, subject, experiment="digits", seed=5, started=0.0)
    assert report.grid == "loopback"
    assert report.epsilon_ledger == pytest.approx(report.epsilon_claimed)
