"""One site's end while the others go on: over the real apps, gates, ledgers and grid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bract.client.permits import Permit
from bract.server import checkpoint
from bract.shared import contract, keys, models
from bract.shared.messages import RefusalReply, TrainOrder
from bract.simulations import flower, simulation
from bract.simulations.experiment import load
from bract.simulations.sites import open_site

SETTINGS = ("sites=3", "rounds=4", "model.name=linear", "policy.epsilon=5.0")


def begun(tmp_path: Path, name: str) -> simulation.Simulation:
    experiment = load("digits", model=None, overrides={}, settings=SETTINGS)
    state = tmp_path / "state"
    return simulation.begin(experiment, out=tmp_path / name, state=state, data_dir=None, workers=1)


def spend(run: simulation.Simulation, site: int, rounds: int) -> None:
    """Charges one site by another contract of the same coordinator, through its own gate."""
    with run.prepared() as (plan, signed):
        changed = signed.contract.model_copy(
            update={"nonce": contract.new_nonce(), "rounds": rounds, "max_attempts": rounds}
        )
        other = contract.sign(changed, keys.load(plan.state.key("coordinator")))
        config = {"plan": str(run.out / "checkpoint/plan.json"), "partition-id": site}
        opened = open_site(flower.context(run=1, node=1, node_config=config, run_config={}))
        model = models.build("linear", (1, 8, 8), 10, {})
        weights = {
            n: np.zeros(s, dtype=np.float32) for n, s in models.released_shapes(model).items()
        }
        for number in range(1, rounds + 1):
            order = TrainOrder(contract=other, round=number, weights=weights)
            assert isinstance(opened.gate.admit(order), Permit)


def test_a_spent_site_refuses_with_a_reason_and_the_round_goes_on(
    tmp_path: Path, bract: Callable[..., Any]
) -> None:
    spend(begun(tmp_path, "first"), site=1, rounds=3)
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    done = bract(
        "simulate", "digits", *words, "--workers", "1", "--state", "state", "--out", "second",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rounds"] == 4
    assert summary["refused"] == [{"site": "site-1", "round": 1, "reason": "budget-exhausted"}]
    spent = {name: site["charges"] for name, site in summary["per_site"].items()}
    assert spent == {"site-0": 4, "site-1": 0, "site-2": 4}
    lines = (tmp_path / "second/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["replied"] for line in lines] == [2, 2, 2, 2]


def test_budget_spent_in_the_middle_of_a_run_ends_it_cleanly_with_the_last_model(
    tmp_path: Path, bract: Callable[..., Any]
) -> None:
    run = begun(tmp_path, "run")
    with run.prepared():
        pass
    # While this run is under way, another contract eats what it counted on.
    from bract.client import site as site_module

    original, calls = site_module.Site.train, [0]

    def eaten(self: Any, order: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:  # the first site's second round
            for place in range(3):
                _eat(run, place)
        return original(self, order)

    site_module.Site.train = eaten  # type: ignore[method-assign]
    try:
        done = bract("simulate", "--resume", str(run.out), "--workers", "1", "--json")
    finally:
        site_module.Site.train = original  # type: ignore[method-assign]
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert 1 <= summary["rounds"] < 4
    assert {refusal["reason"] for refusal in summary["refused"]} == {"budget-exhausted"}
    assert (run.out / "model.safetensors").exists()
    assert summary["epsilon"] <= 5.0


def _eat(run: simulation.Simulation, place: int) -> None:
    config = {"plan": str(run.out / "checkpoint/plan.json"), "partition-id": place}
    opened = open_site(flower.context(run=1, node=1, node_config=config, run_config={}))
    signed = contract.read(run.out / "contract.json")
    private = run.state.private / "keys/coordinator.pem"
    model = models.build("linear", (1, 8, 8), 10, {})
    weights = {n: np.zeros(s, dtype=np.float32) for n, s in models.released_shapes(model).items()}
    while True:
        changed = signed.contract.model_copy(
            update={"nonce": contract.new_nonce(), "rounds": 1, "max_attempts": 1}
        )
        other = contract.sign(changed, keys.load(private))
        order = TrainOrder(contract=other, round=1, weights=weights)
        if isinstance(opened.train(order), RefusalReply):
            return


def test_a_run_whose_ledgers_cannot_be_made_is_resumed_with_every_attempt_left(
    tmp_path: Path, bract: Callable[..., Any]
) -> None:
    run = begun(tmp_path, "run")
    with run.prepared() as (plan, signed):
        names = [site.name for site in signed.contract.cohort]
        ledgers = [plan.state.ledger(name, many=plan.many) for name in names]
    for path in ledgers:
        path.mkdir(parents=True)  # as on a disk without room, no file can be made there
    words = ("simulate", "--resume", str(run.out), "--workers", "1", "--json")
    done = bract(*words)
    assert done.returncode == 1
    said = json.loads(done.stdout)["error"]["message"]
    assert "3 of 3 sites refused with ledger-unavailable (site-0, site-1, site-2)" in said
    for path in ledgers:
        path.rmdir()
    done = bract(*words)
    assert done.returncode == 0, done.stderr
    state = checkpoint.load(run.out / "checkpoint", signed.contract.sha256)
    assert state is not None
    assert (state.round, state.attempts, state.charges) == (4, 4, 4)
