"""The table of make bench: medians, ratios, and who was beside whom."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bract.simulations.benchmarks import grid, rivals, suite


def turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, wholes = iter([2.0, 4.0, 3.0]), iter([1.5, 1.0, 2.0])
    monkeypatch.setattr(
        grid,
        "measure_client_round",
        lambda case, rounds: {"wall_ms": next(ours), "cpu_ms": 5.0, "rounds": rounds},
    )
    monkeypatch.setattr(grid, "measure_whole_run", lambda case, rounds: {"process_s": next(wholes)})


def rival(folder: Path) -> Path:
    """An environment whose python says what it was asked, as a rival's script would."""
    path = folder / "python"
    facts = {"round_seconds": [9.0, 4.0, 2.0], "clients": 100}
    path.write_text(
        f"#!{sys.executable}\nimport json, sys, time\ntime.sleep(0.5)\n"
        f"assert sys.argv[1] in {[race.script for race in suite.RACES]!r}\n"
        f"facts = {facts!r}\nfacts['versions'] = {{'ray': '1'}}\nprint('noise')\n"
        "print(json.dumps(facts))\n"
    )
    path.chmod(0o755)
    return path


def test_a_rival_stands_beside_bract_by_medians_of_rounds_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns(monkeypatch)
    (race,) = (one for one in suite.RACES if one.case is grid.SMALL_CNN)
    found: dict[str, str] = {}
    rows = suite._race(race, rival(tmp_path), 3, found)
    assert [(row.engine, row.measured, row.unit) for row in rows] == [
        ("bract", 3.0, "ms"),
        ("flower ray", 30.0, "ms"),  # the median of 4 and 2 seconds over 100 clients
        ("bract", 1.5, "s"),
        ("flower ray", rows[3].measured, "s"),
    ]
    assert rows[3].measured >= 0.5  # its whole process, imports included, as of ours
    assert [row.ratio for row in rows[:3]] == [None, 10.0, None]
    assert rows[3].ratio == pytest.approx(rows[3].measured / 1.5, abs=0.01)
    assert found == {"ray": "1"}


def test_a_rival_that_fails_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nraise SystemExit('no such network')\n")
    path.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"flower_ray\.py failed: no such network"):
        suite._rival(suite.RACES[0], path)


def test_each_rival_has_a_script_and_both_know_the_network() -> None:
    folder = Path(rivals.__file__).parent
    for race in suite.RACES:
        assert (folder / race.script).is_file()
        assert race.network in rivals_networks()
        assert race.case.model.endswith(f":{race.network}")


def rivals_networks() -> dict[str, Any]:
    from bract.simulations.benchmarks.rivals.networks import NETWORKS

    return dict(NETWORKS)


def test_the_document_has_a_line_for_every_row() -> None:
    rows = [
        suite.Row("step", "bract", 1.2, "×", ratio=1.2, asked="≤ 1.3"),
        suite.Row("round", "flower ray", 17.0, "ms", cpu=30.0),
    ]
    results = {
        "date": "2026-01-02",
        "machine": {"cores": 2, "processor": "x", "gpu": None, "additions_seconds": 0.5},
        "turns": 5,
        "versions": {"torch": "2"},
        "versions_of_rivals": {"ray": "1"},
        "rows": [suite.asdict(row) for row in rows],
    }
    text = suite.markdown(json.loads(json.dumps(results)))
    assert "| step | bract | 1.2 × |  | 1.20 | ≤ 1.3 |" in text
    assert "| round | flower ray | 17 ms | 30 ms |  |  |" in text
    assert "2026-01-02, 2 cores, no GPU" in text
    assert "rivals: ray 1" in text
