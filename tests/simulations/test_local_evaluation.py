"""Local evaluation from end to end: what it costs is counted wherever ε is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bract.client import offline
from bract.shared import contract as contracts
from bract.shared.commands.contract import _shown
from bract.shared.errors import UsageError
from bract.shared.privacy import accounting, forecast, verification
from bract.shared.privacy.events import PoissonGaussian
from bract.shared.reports.runs import LocalAccuracy
from bract.simulations import experiment
from bract.simulations.federations.loopback import SitePlan, lay_out

Bract = Callable[..., Any]
QUICK = ("--rounds", "4", "--sites", "2", "--model", "linear", "--workers", "1")
EVALUATION = ("--set", "evaluation.every=2", "--set", "evaluation.noise_multiplier=8")


def metrics(run: Path) -> list[dict[str, Any]]:
    text = (resources.files("bract.shared.schemas") / "metrics.schema.json").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        jsonschema.validate(line, json.loads(text))
    return lines


def test_a_simulated_run_shows_local_accuracy_and_pays_for_it(bract: Bract, tmp_path: Path) -> None:
    done = bract("simulate", "digits", *QUICK, *EVALUATION, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    summary, lines = json.loads(done.stdout), metrics(tmp_path / "run")
    seen = [line["local_accuracy"] for line in lines]
    assert [value is None for value in seen] == [True, False, True, False]
    # of the weights that the round began with, as the line before scored them
    assert seen[3] == pytest.approx(lines[2]["validation_accuracy"], abs=0.15)
    assert summary["local_accuracy_round"] == 4
    for name in LocalAccuracy.model_fields:
        assert summary[name] == lines[3][name]
    by_site = summary["local_accuracy_by_site"]
    assert set(by_site) == set(summary["per_site"])
    assert summary["local_accuracy_worst"] == min(by_site.values())
    assert by_site[summary["local_accuracy_worst_site"]] == summary["local_accuracy_worst"]
    assert all(0 < error < 0.1 for error in summary["local_accuracy_error_by_site"].values())
    step = PoissonGaussian(summary["sampling_rate"], summary["noise_multiplier"], 4)
    score = PoissonGaussian(1.0, 8.0, 2)
    assert summary["epsilon"] == accounting.epsilon([step, score], 1e-5)
    assert summary["epsilon"] == lines[-1]["epsilon_run"] > accounting.epsilon([step], 1e-5)
    assert lines[0]["epsilon_run"] == accounting.epsilon([PoissonGaussian(*_kind(step), 1)], 1e-5)
    # σ was calibrated to 4 rounds, 2 spare attempts, and the 2 + 2 evaluations that they may cost
    whole = [PoissonGaussian(*_kind(step), 6), PoissonGaussian(1.0, 8.0, 4)]
    assert 3.95 < accounting.epsilon(whole, 1e-5) <= 4.0
    ledgers = [str(path) for path in (tmp_path / "run/ledgers").glob("*.sqlite")]
    assert bract("audit", "verify", *ledgers).returncode == 0


def _kind(event: PoissonGaussian) -> tuple[float, float]:
    return event.sampling_rate, event.noise_multiplier


def test_evaluation_changes_no_weight_where_the_noise_of_training_is_given(
    bract: Bract, tmp_path: Path
) -> None:
    given = ("--set", "privacy.noise_multiplier=2.0")
    for name, more in (("with", EVALUATION), ("without", ())):
        done = bract("simulate", "digits", *QUICK, *given, *more, "--out", name)
        assert done.returncode == 0, done.stderr
    one, other = (tmp_path / name / "model.safetensors" for name in ("with", "without"))
    assert one.read_bytes() == other.read_bytes()


def test_an_experiment_whose_evaluations_take_the_budget_is_bad_usage(bract: Bract) -> None:
    loud = ("--set", "evaluation.every=1", "--set", "evaluation.noise_multiplier=0.5")
    done = bract("simulate", "digits", *QUICK, *loud)
    assert done.returncode == 2
    assert "noisier evaluations" in done.stderr


def test_an_experiment_that_would_evaluate_no_round_is_bad_usage() -> None:
    settings = ["evaluation.every=5", "evaluation.noise_multiplier=8"]
    with pytest.raises(UsageError, match="every 5 is over the 4 rounds"):
        experiment.load("digits", model=None, overrides={"rounds": 4}, settings=settings)


@pytest.fixture
def federation(tmp_path: Path) -> Any:
    sites = [
        SitePlan(name="north", nominal_size=700, data_name="digits", part="0/2"),
        SitePlan(name="south", nominal_size=700, data_name="digits", part="1/2"),
    ]
    terms = {
        "run": "trial",
        "rounds": 6,
        "model": {"name": "linear"},
        "data": {"name": "digits"},
        "training": {"local_steps": 2, "learning_rate": 0.5},
        "privacy": {"epsilon": 3.0, "delta": 1e-5, "clip_norm": 0.5, "batch": 70.0},
        "evaluation": {"every": 3, "noise_multiplier": 6.0},
    }
    return lay_out(tmp_path / "federation", sites=sites, port=8443, terms=terms)


def test_a_proposed_contract_keeps_to_its_epsilon_with_all_evaluations(federation: Any) -> None:
    agreed = contracts.read(federation.contract).contract
    assert agreed.max_evaluations == 2 + 2
    q, sigma = agreed.privacy.sampling_rate, agreed.privacy.noise_multiplier
    shown = _shown(agreed, 1e-5)
    whole = [PoissonGaussian(q, sigma, 16), PoissonGaussian(1.0, 6.0, 4)]
    assert shown.epsilon == accounting.epsilon(whole, 1e-5)
    assert 2.95 < shown.epsilon <= 3.0
    rounds = [PoissonGaussian(q, sigma, 12), PoissonGaussian(1.0, 6.0, 2)]
    assert shown.epsilon_rounds == accounting.epsilon(rounds, 1e-5)


def test_an_operator_is_told_what_evaluations_cost_and_must_allow_them(federation: Any) -> None:
    settings = federation.site("north")
    refused = offline.check(settings, federation.contract)
    assert not refused.accepted
    assert "policy-evaluation" in (refused.reason or "")
    settings.write_text("evaluation = true\n" + settings.read_text())
    accepted = offline.check(settings, federation.contract)
    assert accepted.accepted
    agreed = contracts.read(federation.contract).contract
    assert accepted.epsilon_after == _shown(agreed, 1e-5).epsilon


def test_a_forecast_counts_the_evaluations_that_lie_ahead(world: Any) -> None:
    """From the third round on, with one in two evaluated: in the 4th, the 6th and on."""
    world_terms = {"evaluation": {"every": 2, "noise_multiplier": 4.0}}
    gate = world.gate(policy=world.policy(evaluation=True))
    signed = world.sign(world.contract(**world_terms))
    for number in (1, 2, 3):
        world.serve(gate, world.order(signed, number))
    gate.ledger.close()
    (found,) = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    assert found.last_contract == signed.contract
    limits = found.policy.domains["ward"]
    more = forecast.more_rounds(found.chain, limits, found.last_contract)
    assert more is not None
    order = found.chain.genesis.composition["order"]  # type: ignore[union-attr]

    def fits(rounds: int) -> bool:
        evaluations = 1 + sum(number % 2 == 0 for number in range(4, 4 + rounds))
        total = [
            PoissonGaussian(0.1, 1.5, 2 * (3 + rounds)),
            PoissonGaussian(1.0, 4.0, evaluations),
        ]
        return accounting.fits(total, limit=limits.epsilon, delta=limits.delta, order=order)

    assert fits(more)
    assert not fits(more + 1)
