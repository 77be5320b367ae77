"""Many sites in one process: a cohort is charged at once, and updates are added up where made."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bract.client.training.sums import BatchSums
from bract.client.training.trainer import Trainer, clipped
from bract.server import app
from bract.server.checkpoint import RoundState
from bract.server.rounds import RoundLoop
from bract.shared import contract, models
from bract.shared.errors import Reason, Refusal, UsageError, VerificationFailed
from bract.shared.privacy import accounting, budget, contents
from bract.shared.privacy.events import PoissonGaussian
from bract.simulations import shards, simulation, state
from bract.simulations import summary as summaries
from bract.simulations.engines import LocalEngine
from bract.simulations.experiment import Experiment, load
from bract.simulations.sites import Plan

SITES = 12
SETTINGS = (
    "model.name=linear",
    "privacy.batch=40",
    "privacy.noise_multiplier=1.0",
    "policy.epsilon=60.0",
)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SHARED_FILE_FROM", SITES)


def experiment(*more: str, rounds: int = 3) -> Experiment:
    overrides = {"sites": SITES, "rounds": rounds, "seed": 5}
    return load("digits", model=None, overrides=overrides, settings=(*SETTINGS, *more))


def completed(out: Path, *more: str, workers: int = 1, rounds: int = 3) -> Any:
    run = simulation.begin(
        experiment(*more, rounds=rounds), out=out, state=None, data_dir=None, workers=workers
    )
    return run.complete(LocalEngine())


def weights(run: Path) -> dict[str, np.ndarray]:
    return dict(load_file(run / "model.safetensors"))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_shared_ledger_gives_the_weights_and_epsilons_of_ledgers_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    more = f"training.local_steps={steps}"
    apart = completed(tmp_path / "apart", more)
    monkeypatch.setattr(state, "SHARED_FILE_FROM", SITES)
    one = completed(tmp_path / "one", more)
    two = completed(tmp_path / "two", more, workers=2)
    assert [p.name for p in (tmp_path / "one/ledgers").glob("*.sqlite")] == ["all.sqlite"]
    assert len(list((tmp_path / "apart/ledgers").glob("*.sqlite"))) == SITES
    for name, value in weights(tmp_path / "apart").items():
        assert np.abs(weights(tmp_path / "one")[name] - value).max() < 1e-6
        assert np.array_equal(weights(tmp_path / "two")[name], weights(tmp_path / "one")[name])
    for summary in (one, two):
        assert summary.epsilon == apart.epsilon
        assert summary.per_site.keys() == apart.per_site.keys()
        for name, site in summary.per_site.items():
            assert site.charges == 3
            assert site.epsilon == apart.per_site[name].epsilon


def begun(out: Path, *more: str, workers: int = 1) -> simulation.Simulation:
    asked = experiment(*more)
    return simulation.begin(asked, out=out, state=None, data_dir=None, workers=workers)


@pytest.mark.parametrize("count", [1, 11, 12, 13, 100, 193, 1000])
def test_shards_hold_each_site_once_and_the_last_are_the_smallest(count: int) -> None:
    found = shards.shards_of(1, [(place, 1) for place in range(count)])
    assert [place for shard in found for place, _ in shard.members] == list(range(count))
    assert [shard.place for shard in found] == list(range(len(found)))
    sizes = [len(shard.members) for shard in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == min(math.ceil(count / 12), 16)
    assert sizes[-1] <= math.ceil(sizes[0] / 4) or sizes[0] == 1


def test_a_killed_cohort_is_charged_again_and_ends_with_the_same_weights(
    tmp_path: Path, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = completed(tmp_path / "whole")
    run = begun(tmp_path / "run")
    inner, calls = shards.ShardTrainer.train, [0]

    def killed(trainer: shards.ShardTrainer, shard: shards.Shard) -> shards.Trained:
        calls[0] += 1
        if shard.round == 2:
            raise KeyboardInterrupt
        return inner(trainer, shard)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardTrainer, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run.complete(LocalEngine())
    assert calls[0] > 1
    resumed = simulation.resume(tmp_path / "run", workers=1).complete(LocalEngine())
    assert {site.charges for site in resumed.per_site.values()} == {4}  # never refunded
    assert resumed.epsilon > whole.epsilon
    for name, value in weights(tmp_path / "whole").items():
        assert np.array_equal(weights(tmp_path / "run")[name], value)


@pytest.mark.parametrize("workers", [1, 2])
def test_sites_of_which_some_have_a_file_of_their_own_each_keep_to_theirs(
    tmp_path: Path, workers: int
) -> None:
    kept = tmp_path / "state"

    def run(name: str, *more: str) -> Any:
        asked = experiment("sites=4", "policy.epsilon=1e3", *more, rounds=1)
        begun = simulation.begin(
            asked, out=tmp_path / name, state=kept, data_dir=None, workers=workers
        )
        return begun.complete(LocalEngine())

    run("first", "sites_per_round=2")
    (kept / "ledgers/site-0.sqlite").unlink(missing_ok=True)  # as if another had been chosen
    own = {path.name for path in (kept / "ledgers").glob("*.sqlite")}
    assert 1 <= len(own) <= 2
    second = run("second", "privacy.mechanism=user-level")
    assert list(second.refused) == []
    assert {site.charges for site in second.per_site.values()} == {1}
    assert {path.name for path in (kept / "ledgers").glob("*.sqlite")} == own | {"all.sqlite"}


def test_no_worker_opens_a_site_with_its_key(
    tmp_path: Path, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, opened = state.State.site_key, tmp_path / "opened"

    def noted(self: state.State, site: str, *, many: bool) -> Any:
        with opened.open("a") as file:
            file.write(f"{os.getpid()} {site}\n")
        return inner(self, site, many=many)

    run = begun(tmp_path / "run", "sites_per_round=3", workers=2)
    with run.prepared():
        monkeypatch.setattr(state.State, "site_key", noted)
        assert run.run(LocalEngine()) == 2
    asked = [line.split() for line in opened.read_text().splitlines()]
    assert len({site for _, site in asked}) > 3  # of more sites than the workers were forked with
    assert {process for process, _ in asked} == {str(os.getpid())}


def test_every_charge_of_a_cohort_stands_before_any_of_it_is_read(
    tmp_path: Path, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = begun(tmp_path / "run"), []
    inner = shards.ShardTrainer.read

    def looked(trainer: shards.ShardTrainer, shard: shards.Shard) -> None:
        path = tmp_path / "run/ledgers/all.sqlite"
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        query = 'SELECT count(*) FROM entries WHERE body LIKE \'%"kind":"charge"%\''
        seen.append((shard.round, connection.execute(query).fetchone()[0]))
        connection.close()
        inner(trainer, shard)

    monkeypatch.setattr(shards.ShardTrainer, "read", looked)
    run.complete(LocalEngine())
    assert len(seen) > 3
    assert all(count == SITES * number for number, count in seen)


def test_a_worker_that_dies_costs_its_shards_and_no_other(
    tmp_path: Path, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "run", workers=2)
    inner = shards.ShardTrainer.train

    def dies(trainer: shards.ShardTrainer, shard: shards.Shard) -> shards.Trained:
        if shard.round == 2 and shard.place == 0:
            os._exit(1)
        return inner(trainer, shard)

    monkeypatch.setattr(shards.ShardTrainer, "train", dies)
    summary = run.complete(LocalEngine())
    assert summary.rounds == 3
    assert {refusal.reason for refusal in summary.refused} == {"node-failed"}
    replied = [line["replied"] for line in lines(tmp_path / "run")]
    assert replied[0] == replied[2] == SITES
    assert 0 < replied[1] < SITES
    assert {site.charges for site in summary.per_site.values()} == {3}


def test_an_update_that_the_server_would_not_take_is_released_and_left_out_of_the_sum(
    tmp_path: Path, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "run")
    inner = Trainer.train_together

    def spoilt(trainer: Trainer, jobs: Any, given: Any) -> Any:
        first, *rest = inner(trainer, jobs, given)
        if jobs[0].terms.name != "site-03":
            return [first, *rest]
        huge = {name: np.full_like(value, 1e6) for name, value in first.arrays.items()}
        return [type(first)(huge), *rest]

    monkeypatch.setattr(Trainer, "train_together", spoilt)
    summary = run.complete(LocalEngine())
    assert {refusal.reason for refusal in summary.refused} == {"node-failed"}
    assert [line["replied"] for line in lines(tmp_path / "run")] == [SITES - 1] * 3
    assert all(np.abs(value).max() < 100 for value in weights(tmp_path / "run").values())
    held = contents.read(tmp_path / "run/ledgers/all.sqlite")
    (chain,) = (rows for (site, _), rows in held.rows.items() if site == "site-03")
    assert [json.loads(text)["kind"] for _, text, _ in chain].count("release") == 3


@pytest.mark.parametrize("shared_file", [True, False], ids=["one file", "files apart"])
def test_a_site_whose_training_failed_is_charged_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_file: bool
) -> None:
    monkeypatch.setattr(Plan, "many", shared_file)
    run, inner = begun(tmp_path / "run"), Trainer.train

    def fails(trainer: Trainer, *, terms: Any, **given: Any) -> Any:
        if terms.name == "site-03":
            raise ValueError("its data")
        return inner(trainer, terms=terms, **given)

    monkeypatch.setattr(Trainer, "train", fails)
    monkeypatch.setattr(BatchSums, "may_be_shared", False)
    summary = run.complete(LocalEngine())
    assert summary.rounds == 3
    charges = {name: site.charges for name, site in summary.per_site.items()}
    assert charges["site-03"] == 1
    assert {refusal.site for refusal in summary.refused} == {"site-03"}


def test_a_seed_repeats_whom_a_round_asks(tmp_path: Path, shared: None) -> None:
    for name in ("one", "two"):
        completed(tmp_path / name, "sites_per_round=4")
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_round_asks_as_many_sites_as_the_contract_says_and_charges_no_other(
    tmp_path: Path, shared: None
) -> None:
    summary = completed(tmp_path / "run", "sites_per_round=4", rounds=5)
    assert summary.rounds == 5
    assert [line["replied"] for line in lines(tmp_path / "run")] == [4] * 5
    charges = [site.charges for site in summary.per_site.values()]
    assert sum(charges) == 20
    assert 4 < sum(count > 0 for count in charges) <= SITES
    held = contents.read(tmp_path / "run/ledgers/all.sqlite")
    assert len(held.rows) == sum(count > 0 for count in charges)


@pytest.mark.parametrize("shared_file", [True, False], ids=["one file", "files apart"])
def test_user_level_noise_is_added_once_to_the_sum_of_clipped_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_file: bool
) -> None:
    monkeypatch.setattr(Plan, "many", shared_file)
    clip, sigma = 1e-3, 4.0  # so that noise is all there is to see
    summary = completed(
        tmp_path / "run",
        "privacy.mechanism=user-level",
        f"privacy.noise_multiplier={sigma}",
        f"privacy.clip_norm={clip}",
        "training.local_steps=3",
        "training.server_momentum=0.0",
        rounds=1,
    )
    assert (summary.unit, summary.guarantee) == ("client", "none: simulation")
    assert summary.mechanism == "user-level"
    (spent,) = {site.epsilon for site in summary.per_site.values()}
    assert spent == pytest.approx(accounting.epsilon([PoissonGaussian(1.0, sigma, 1)], 1e-5))
    begun = load_weights(tmp_path / "run")
    moved = np.concatenate(
        [(value - begun[name]).ravel() for name, value in weights(tmp_path / "run").items()]
    )
    stddev = sigma * clip / SITES
    # The mean of clipped updates has a norm under C: beside 25 times as much noise it is not seen.
    assert moved.std() == pytest.approx(stddev, rel=0.15)


def load_weights(run: Path) -> dict[str, np.ndarray]:
    """The weights before round 1, as the server makes them."""
    agreed = contract.read(run / "contract.json").contract
    model = app._initial_model(agreed, 5)
    return {n: p.detach().numpy() for n, p in models.released_parameters(model).items()}


def test_an_update_is_clipped_as_a_whole_and_nothing_of_what_is_not_finite_is_left() -> None:
    update = {"a": np.full((3, 2), 2.0, np.float32), "b": np.full(5, -1.0, np.float32)}
    inside = clipped(update, 1.0)
    norm = np.sqrt(sum(np.square(v, dtype=np.float64).sum() for v in inside.values()))
    assert 0.998 < norm <= 1.0
    np.testing.assert_allclose(inside["a"] / inside["a"][0, 0], update["a"] / update["a"][0, 0])
    assert all((clipped(update, 100.0)[n] == v).all() for n, v in update.items())
    assert not clipped({"a": np.zeros(3, np.float32)}, 1.0)["a"].any()
    for bad in (np.nan, np.inf):
        assert not any(v.any() for v in clipped({**update, "c": np.float32([bad])}, 1.0).values())


@pytest.mark.parametrize("shared_file", [True, False], ids=["one file", "files apart"])
@pytest.mark.parametrize("put_back", [True, False])
def test_ledgers_that_lost_what_the_server_saw_make_no_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_file: bool, put_back: bool
) -> None:
    monkeypatch.setattr(Plan, "many", shared_file)
    out = tmp_path / "run"
    first, whole = begun(out), RoundLoop._round

    def stopped(loop: RoundLoop, grid: Any, state: RoundState) -> RoundState | None:
        if state.round == 1:
            raise KeyboardInterrupt
        return whole(loop, grid, state)

    with monkeypatch.context() as patch:
        patch.setattr(RoundLoop, "_round", stopped)
        with pytest.raises(KeyboardInterrupt):
            first.complete(LocalEngine())
    older = {path: path.read_bytes() for path in (out / "ledgers").glob("*.sqlite")}
    done = simulation.resume(out, workers=1).complete(LocalEngine())
    before = (out / "summary.json").read_bytes()
    for path, text in older.items():
        path.write_bytes(text) if put_back else path.unlink()
    with pytest.raises(VerificationFailed, match="cut short" if put_back else "no ledger of"):
        simulation.resume(out, workers=1).complete(LocalEngine())
    assert (out / "summary.json").read_bytes() == before
    assert done.rounds == 3


def test_a_site_that_refuses_is_named_from_its_first_answer_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "run")

    def refuses(*given: Any) -> None:
        raise Refusal(Reason.BUDGET_EXHAUSTED, "made up")

    monkeypatch.setattr(budget, "check_room", refuses)
    summary = run.complete(LocalEngine())
    assert {refusal.site for refusal in summary.refused} == set(summary.per_site)


def test_of_two_runs_that_begin_in_one_folder_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, checked = tmp_path / "run", simulation._checked

    def meanwhile(*given: Any) -> list[np.ndarray]:
        monkeypatch.setattr(simulation, "_checked", checked)
        simulation.begin(experiment(rounds=2), out=out, state=None, data_dir=None, workers=1)
        return checked(*given)

    monkeypatch.setattr(simulation, "_checked", meanwhile)
    with pytest.raises(UsageError, match="isn't empty: name another --out"):
        begun(out)
    assert simulation.resume(out, workers=1).begun.experiment.rounds == 2
    kept = sorted(path.name for path in (out / "checkpoint").iterdir())
    assert kept == ["begun.json", "rows.npz"]


@pytest.mark.parametrize("left", [0, 100])
def test_rows_that_were_cut_off_are_told(tmp_path: Path, left: int) -> None:
    run = begun(tmp_path / "run")
    run.complete(LocalEngine())
    path = tmp_path / "run/checkpoint/rows.npz"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UsageError, match=r"rows.npz is damaged: begin another run"):
        simulation.resume(tmp_path / "run", workers=1).complete(LocalEngine())


def test_a_ledger_that_was_never_filled_holds_nothing(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.complete(LocalEngine())
    result = json.loads((tmp_path / "run/checkpoint/result.json").read_bytes()) | {"heads": {}}
    for path in (tmp_path / "run/ledgers").glob("*.sqlite"):
        path.write_bytes(b"")
    with run.prepared() as (plan, signed):
        told = summaries.summarise(
            plan=plan, agreed=signed.contract, out=run.out, result=result, workers=1
        )
    assert {site.charges for site in told.per_site.values()} == {0}
