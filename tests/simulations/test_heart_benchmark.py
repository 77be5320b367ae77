"""The table of hospitals comes from runs, and has every hospital together and alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from bract.simulations.benchmarks import heart_disease


@pytest.mark.filterwarnings("ignore")
def test_each_hospital_has_its_figures_together_and_alone(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heart_disease, "ALONE", {"va": 86})
    table = heart_disease.measure([1, 2], hospitals.parent, epsilons=[3.0])
    assert set(table) == {"epsilon 3", "without privacy"}
    row = table["epsilon 3"]["va"]
    assert set(row) == {"accuracy_together", "accuracy_alone", "auc_together", "auc_alone"}
    assert all(0.5 < figure["mean"] <= 1 for figure in row.values())
    assert table["epsilon 3"]["all four"]["accuracy_together"]["mean"] > 0.78
