"""An audit passes a correct mechanism and finds every planted fault, through the client path."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner, Result
from torch import nn

from bract.client.training.optimizer import PrivateOptimizer
from bract.shared import models
from bract.shared.commands.audit import audit
from bract.shared.data import describe
from bract.shared.errors import ModelRejected, UnknownName, UsageError
from bract.shared.reports import schema
from bract.shared.terms import ModelTerms
from bract.simulations.audits import experiment_command, faults, mechanism
from bract.simulations.audits.mechanism import Findings
from bract.simulations.audits.proposal import Subject
from bract.simulations.audits.settings import Suite, suite
from bract.simulations.benchmarks import planted_faults

SUBJECT = Subject(ModelTerms(name="mlp", options={"hidden": 16}), describe("digits"))
SMALL, WHOLE = suite(canaries=200, rounds=8), suite()
# What each fault must show in, and whether it takes the whole suite to be seen at all.
EVIDENCE = {
    "no noise": "main/blank/noise of model.3.weight",
    "noise over batch": "main/canary-0/noise of the void",
    "noise x 0.8": "main/canary-0/noise of the void",
    "clip skipped": "main/canary-0/included mass",
    "batch clipped": "main/canary-0/included mass",
    "rate x 2": "main/all/included mass",
    "rate x 1.25": "main/all/included mass",
    "steps x 2": "steps/canary-0/noise of all steps",
    "seed reused over rounds": "main/all/correlation of rounds",
    "seed shared by sites": "main/all/correlation of sites",
    "empty batches skipped": "sparse/canary-0/empty batches",
    "buffer sent along": "main/canary-0/answers hold what they should",
    "shuffled batches": "main/all/variance over an epoch",
    "ledger under-charges": "main/canary-1/charged for what was released",
    "layer without noise": "main/blank/noise of model.1.weight",
    "one noise for two tensors": "main/blank/model.1.bias with model.1.weight",
    "norm over a part": "joint/canary-0/clipped sum of model.1.weight",
}
FINE = {"rate x 1.25", "shuffled batches"}


def findings(size: Suite, seed: int) -> Findings:
    return mechanism.audit(SUBJECT, size, seed=seed)


def test_a_correct_mechanism_passes_and_its_bounds_are_below_its_ledger() -> None:
    found = findings(WHOLE, 7)
    report = mechanism.report(found, SUBJECT, experiment="x", seed=7, started=0.0)
    assert report.passed
    assert report.epsilon_ledger == pytest.approx(report.epsilon_claimed)
    assert all(
        0 <= value < (report.epsilon_ledger or 0)
        for values in report.epsilon_lower.values()
        for value in values.values()
    )
    assert report.epsilon_lower["gaussian"]["0.99"] > 2
    for name in ("noise_multiplier", "clip_norm", "sampling_rate", "steps"):
        error = getattr(report.recovered, name) - getattr(report.claimed, name)
        assert abs(error) < 5 * getattr(report.recovered_error, name), name


def test_every_fault_has_its_evidence() -> None:
    assert EVIDENCE.keys() == faults.FAULTS.keys()
    with pytest.raises(UnknownName, match="no noize"):
        faults.planted("no noize")


@pytest.mark.parametrize("name", list(faults.FAULTS))
def test_a_planted_fault_is_found_by_the_test_that_is_for_it(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with faults.planted(name):
        found = findings(WHOLE if name in FINE else SMALL, 11)
    assert EVIDENCE[name] in {check.key for check in found.failed}


def test_a_fault_is_gone_when_its_block_ends() -> None:
    before = PrivateOptimizer.add_noise
    with faults.planted("no noise"):
        assert PrivateOptimizer.add_noise is not before
    assert PrivateOptimizer.add_noise is before


def mixing(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))


def test_a_model_that_cannot_be_trained_privately_is_one_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(models.MODELS, "mixing", mixing)
    with pytest.raises(ModelRejected, match="cannot be trained privately"):
        mechanism.admit(Subject(ModelTerms(name="mixing"), describe("digits")), SMALL)


def experiment(*arguments: str) -> Result:
    return CliRunner().invoke(experiment_command.experiment, arguments)


def test_command_prints_its_schema_and_leaves_a_folder_whose_ledgers_verify(
    tmp_path: Path,
) -> None:
    out = tmp_path / "audit"
    small = ("--model", "linear", "--canaries", "200", "--rounds", "8")
    done = experiment("digits", *small, "--seed", "3", "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    jsonschema.validate(printed, schema("audit-experiment"))
    assert printed["passed"]
    assert printed["claimed"]["clip_norm"] == 0.3
    assert json.loads((out / "audit.json").read_text()) == printed
    page = tmp_path / "report.html"
    assert CliRunner().invoke(audit, ["report", str(out), "-o", str(page)]).exit_code == 0
    assert "an experiment on terms of its own recovered what was claimed" in page.read_text()
    ledgers = sorted((out / "ledgers").glob("*.sqlite"))
    assert [path.name for path in ledgers] == ["blank.sqlite", "canary-0.sqlite", "canary-1.sqlite"]
    checked = CliRunner().invoke(audit, ["verify", *map(str, ledgers)])
    assert checked.exit_code == 0, checked.output
    again = experiment("digits", *small, "--out", str(out))
    assert isinstance(again.exception, UsageError)
    assert "isn't empty" in str(again.exception)


def test_command_fails_and_says_which_test_did(tmp_path: Path) -> None:
    small = ("--model", "linear", "--canaries", "200", "--rounds", "8", "--made-up")
    with faults.planted("no noise"):
        done = experiment("digits", *small)
    assert done.exit_code == 1
    assert "FAILED" in done.stdout
    assert "does not do what its contract says" in done.stderr


@pytest.mark.parametrize("mechanism", ["user-level", "none"])
def test_command_refuses_a_mechanism_that_it_has_no_tests_for(
    mechanism: str, tmp_path: Path
) -> None:
    out, chosen = tmp_path / "audit", f"privacy.mechanism={mechanism}"
    small = ("--model", "linear", "--canaries", "100", "--rounds", "8")
    done = experiment("digits", *small, "--set", chosen, "--out", str(out))
    assert isinstance(done.exception, UsageError)
    said = str(done.exception)
    assert f"has the mechanism '{mechanism}', and this audit tests 'dp-sgd' alone" in said
    assert "leave privacy.mechanism" in said
    assert not out.exists()


def test_command_says_how_many_canaries_a_bound_takes() -> None:
    done = experiment("digits", "--canaries", "100", "--show-epsilon", "4")
    assert isinstance(done.exception, UsageError)
    assert "it takes" in str(done.exception)


def test_federation_needs_a_folder() -> None:
    done = experiment("digits", "--model", "linear", "--federation")
    assert isinstance(done.exception, UsageError)
    assert "--out DIR" in str(done.exception)


def test_table_of_planted_faults_counts_runs_and_evidence() -> None:
    outcomes = [
        planted_faults.Outcome(
            planted_faults.Task(None, 0), (), 1.0, 5.0, {"0.99": {"one_run": 2.0, "gaussian": 6.0}}
        ),
        planted_faults.Outcome(planted_faults.Task("no noise", 1), ("main: noise",), 1.0),
        planted_faults.Outcome(planted_faults.Task("no noise", 2), (), 1.0),
    ]
    table = planted_faults.table(outcomes)
    assert table["correct"]["runs"] == 1
    assert table["correct"]["flagged"] == 0
    assert table["correct"]["bounds_over_ledger"] == {
        "one_run": {"0.99": 0},
        "gaussian": {"0.99": 1},
    }
    assert table["faults"]["no noise"] == {
        "runs": 2,
        "flagged": 1,
        "evidence": {"main: noise": 1},
    }
