"""Four hospitals in real processes over TLS: `simulations/federations/heart-disease/run`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from bract.shared import cli, contract
from bract.shared.data.heart_disease import HOSPITALS
from bract.shared.privacy import head_file, verification
from bract.shared.reports.runs import FederationSummary
from bract.simulations import experiment, simulation
from bract.simulations.federations import heart_disease

RUN = Path(__file__).parents[2] / "simulations/federations/heart-disease/run"


def rows(*paths: Path) -> Counter[str]:
    return Counter(row for path in paths for row in path.read_text().split())


def check_ledgers(out: Path, summary: FederationSummary) -> None:
    agreed = contract.read(out / "coordinator/contract.json").contract
    pinned = {site.name: site.key for site in agreed.cohort}
    by_server = head_file.heads(json.loads((out / "coordinator/run/summary.json").read_bytes()))
    for hospital in HOSPITALS:
        home = out / "sites" / hospital
        own = head_file.heads(json.loads((home / "head.json").read_bytes()))
        for anchors in (own, by_server):
            (found,) = verification.verify(
                home / "state/ledger.sqlite",
                site_keys=pinned,
                anchors=anchors,
                witness_keys=[agreed.witness or ""],
            )
            assert found.anchor is not None
            assert found.witnessed is not None
            assert not found.chain.seeded
        assert found.chain.head is not None
        assert summary.heads[hospital].hash == found.chain.head.hash
        assert summary.per_site[hospital].charges == agreed.rounds


def check_folders(out: Path, published: Path) -> None:
    """Nobody's folder holds a row that is not theirs, whatever the file."""
    for hospital in HOSPITALS:
        own = rows(out / f"sites/{hospital}/train.{hospital}.data")
        public = rows(*(out / "public").glob(f"*.{hospital}.data"))
        assert own + public == rows(published / f"processed.{hospital}.data")
    trained = {h: rows(out / f"sites/{h}/train.{h}.data") for h in HOSPITALS}
    shown = rows(*(out / "public").glob("*.data"))
    homes = {h: out / "sites" / h for h in HOSPITALS}
    for hospital, home in homes.items():
        others = Counter(shown)
        for other in HOSPITALS:
            others += trained[other] if other != hospital else Counter()
        assert not found_in(home, others.keys() - trained[hospital].keys())
    private = set().union(*trained.values()) - shown.keys()
    assert not found_in(out / "public", private)
    assert not found_in(out / "coordinator", private)


def check_report(out: Path) -> None:
    page = out.parent / "report.html"
    command = [str(Path(sys.executable).with_name("bract")), "audit", "report", str(out)]
    subprocess.run([*command, "-o", str(page)], check=True, capture_output=True, timeout=120)
    text = page.read_text()
    assert "All 4 ledgers were verified from the files alone" in text
    assert "For each of the 4 sites: whatever anyone concludes" in text
    assert text.count("holds, anchored to entry 40 of 40, witnessed to entry 40") == 4


def found_in(folder: Path, texts: set[str]) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(text.encode() in path.read_bytes() for text in texts)]


def test_a_real_federation_ends_well_within_every_hospitals_budget(
    hospitals: Path, tmp_path: Path
) -> None:
    out = tmp_path / "federation"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(RUN), "--out", str(out), "--data-dir", str(hospitals.parent), "--json"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    said = json.loads(done.stdout, parse_constant=pytest.fail)
    summary = FederationSummary.model_validate(said)
    assert json.loads((out / "summary.json").read_bytes()) == said
    assert summary.guarantee == "(ε, δ)-DP per example"
    assert (summary.rounds, summary.refused) == (20, [])
    assert tuple(summary.per_site) == HOSPITALS
    assert summary.epsilon is not None
    assert summary.epsilon <= 3.0
    assert summary.epsilon_prv == pytest.approx(summary.epsilon, abs=0.02)
    assert summary.delta == pytest.approx(1e-4)
    assert summary.test_accuracy_mean_of_groups is not None
    assert summary.test_accuracy_mean_of_groups >= 0.78
    assert summary.plain_accuracy >= 0.78
    check_ledgers(out, summary)
    check_folders(out, hospitals)
    check_report(out)
    federation = tomllib.loads((out / "coordinator/FEDERATION.toml").read_text())
    port = int(federation["server"]["listen"].rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server is still there"


def test_simulation_and_federation_agree_on_one_contract(hospitals: Path, tmp_path: Path) -> None:
    chosen = experiment.load(
        "heart-disease", model=None, overrides={"data.dir": str(hospitals)}, settings=()
    )
    heart_disease.lay_out(chosen, tmp_path / "real", hospitals)
    real = contract.read(tmp_path / "real/coordinator/contract.json").contract
    run = simulation.begin(chosen, out=tmp_path / "simulated", state=None, data_dir=None, workers=1)
    with run.prepared() as (_, signed):
        simulated = signed.contract
    assert real.privacy.randomness == "csprng"
    assert real.privacy.model_copy(update={"randomness": "seeded"}) == simulated.privacy
    for name in ("rounds", "max_attempts", "model", "training"):
        assert getattr(real, name) == getattr(simulated, name)
    for one, other in zip(real.cohort, simulated.cohort, strict=True):
        assert (one.name, one.nominal_size) == (other.name, other.nominal_size)


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path / "kept"), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.run(heart_disease.heart_disease, "heart-disease/run")
    assert ended.value.code == 2
    assert "isn't empty" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
