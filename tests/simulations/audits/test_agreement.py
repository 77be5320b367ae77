"""ε of a ledger against two other accountants; `make audit` prints all of the report's table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bract.shared.privacy.events import PoissonGaussian
from bract.shared.privacy.prv import AGREEMENT
from bract.simulations.audits import agreement


def test_there_are_fifty_settings_and_none_twice() -> None:
    chosen = list(agreement.settings())
    assert len(set(chosen)) == len(chosen) >= 50


def test_every_fourth_setting_agrees_with_both_others(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list(agreement.settings())[1::4]  # of each kind, with each number of steps
    monkeypatch.setattr(agreement, "settings", lambda: iter(chosen))
    rows = agreement.table()
    assert len(rows) == len(chosen) >= 13
    assert [row for row in rows if not row.agrees] == []


def test_a_setting_that_is_accounted_otherwise_is_seen() -> None:
    row = agreement.compare(PoissonGaussian(0.05, 1.5, 20))
    assert row.apart <= AGREEMENT
    noisier = agreement.compare(PoissonGaussian(0.05, 1.4, 20))
    assert abs(noisier.epsilon - row.epsilon_prv) > AGREEMENT
    assert row.agrees
    for changes in (
        {"epsilon": row.epsilon_dp_accounting - 2e-6},  # under what is not rounded up
        {"epsilon_prv": row.epsilon - 0.002},
        {"epsilon_prv": row.epsilon + 2 * AGREEMENT},
    ):
        assert not replace(row, **changes).agrees, changes


def test_the_table_is_printed_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = PoissonGaussian(0.05, 1.5, 20)
    monkeypatch.setattr(agreement, "settings", lambda: iter([step]))
    agreement.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], len(found["rows"])) == (True, 1)
    monkeypatch.setattr(agreement, "AGREEMENT", 1e-9)
    with pytest.raises(SystemExit):
        agreement.main([])
    assert "| 0.05 | 1.5 | 20 |" in capsys.readouterr().out
