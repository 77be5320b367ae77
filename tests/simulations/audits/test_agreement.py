"""ε of a ledger against two other accountants, over every setting of the report's table."""

from __future__ import annotations

import json

import pytest

from bract.shared.privacy.events import PoissonGaussian
from bract.shared.privacy.prv import AGREEMENT
from bract.simulations.audits import agreement


def test_there_are_fifty_settings_and_none_twice() -> None:
    chosen = list(agreement.settings())
    assert len(set(chosen)) == len(chosen) >= 50


def test_every_setting_agrees_with_both_others() -> None:
    rows = agreement.table()
    assert len(rows) >= 50
    wrong = [row for row in rows if row.apart > AGREEMENT]
    assert wrong == []
    # PRV reports its upper bound, PLD rounds up: none is far under another.
    assert all(row.epsilon_prv >= row.epsilon - 0.001 for row in rows)
    assert all(row.epsilon >= row.epsilon_dp_accounting - 1e-6 for row in rows)


def test_a_setting_that_is_accounted_otherwise_is_seen() -> None:
    row = agreement.compare(PoissonGaussian(0.05, 1.5, 20))
    assert row.apart <= AGREEMENT
    noisier = agreement.compare(PoissonGaussian(0.05, 1.4, 20))
    assert abs(noisier.epsilon - row.epsilon_prv) > AGREEMENT


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
