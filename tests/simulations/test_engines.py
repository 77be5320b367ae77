"""Flower's own engine on Ray gives what the local engine gives, and the same apps run in both."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from bract.client.app import app as client_app
from bract.server import checkpoint
from bract.shared.errors import UsageError
from bract.simulations import flower, simulation
from bract.simulations.engines import LocalEngine
from bract.simulations.experiment import load

Bract = Callable[..., Any]
COMMON = ("simulate", "digits", "--rounds", "2", "--sites", "3", "--workers", "2", "--seed", "11")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true",
    reason="needs the extra `ray`",
)


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


@needs_ray
def test_ray_gives_the_weights_of_the_local_engine_through_the_same_gates(
    bract: Bract, bract_process: Bract, tmp_path: Path
) -> None:
    assert bract(*COMMON, "--out", "local").returncode == 0
    done = bract_process(*COMMON, "--engine", "ray", "--out", "ray", "--json")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "ray") == weights(tmp_path / "local")
    summary = json.loads(done.stdout)
    assert {site["charges"] for site in summary["per_site"].values()} == {2}
    assert summary["workers"] == 2
    local, ray = (tmp_path / name / "metrics.jsonl" for name in ("local", "ray"))
    assert ray.read_text() == local.read_text()
    ledgers = [str(path) for path in (tmp_path / "ray/ledgers").glob("*.sqlite")]
    assert bract("audit", "verify", *ledgers).returncode == 0


@needs_ray
def test_a_seed_repeats_whom_a_round_asks_on_ray_too(
    bract: Bract, bract_process: Bract, tmp_path: Path
) -> None:
    some = ("simulate", "digits", "--model", "linear", "--rounds", "3", "--sites", "4")
    some = (*some, "--set", "sites_per_round=2", "--seed", "7", "--workers", "2", "--json")
    local = json.loads(bract(*some, "--out", "local").stdout)
    done = bract_process(*some, "--engine", "ray", "--out", "ray")
    assert done.returncode == 0, done.stderr
    ray = json.loads(done.stdout)
    assert ray["per_site"] == local["per_site"]
    assert weights(tmp_path / "ray") == weights(tmp_path / "local")


class Stop(Exception):
    """The coordinator dies."""


@needs_ray
def test_a_run_stopped_on_one_engine_goes_on_with_the_other(
    bract: Bract, bract_process: Bract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rounds": 2, "sites": 3, "seed": 11}
    experiment = load("digits", model=None, overrides=settings, settings=())
    run = simulation.begin(experiment, out=tmp_path / "run", state=None, data_dir=None, workers=1)
    save = checkpoint.save

    def save_and_stop(state: checkpoint.RoundState, folder: Path) -> None:
        save(state, folder)
        if state.round == 1:
            raise Stop

    with monkeypatch.context() as patch, run.prepared():
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(Stop):
            run.run(LocalEngine())
    done = bract_process("simulate", "--resume", "run", "--engine", "ray", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert bract(*COMMON, "--out", "whole").returncode == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@needs_ray
def test_a_run_is_not_resumed_on_an_engine_without_its_noise_and_charges_nothing(
    bract: Bract, tmp_path: Path
) -> None:
    experiment = load(
        "digits", model="linear", overrides={"sites": 3}, settings=["privacy.mechanism=user-level"]
    )
    run = simulation.begin(experiment, out=tmp_path / "run", state=None, data_dir=None, workers=1)
    with run.prepared():
        pass
    done = bract("simulate", "--resume", "run", "--engine", "ray")
    assert done.returncode == 2
    assert done.stderr == "bract: --engine ray carries no user-level noise: use --engine local\n"
    assert list((tmp_path / "run/ledgers").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("--ray-address", "head:6379"), "--engine ray"),
        (("--engine", "ray", "--ray-address", "head:6379", "--workers", "2"), "leave it out"),
        (("--engine", "spark"), "'local', 'ray'"),
    ],
)
@needs_ray
def test_bad_engines_are_refused_before_a_run_is_begun(
    bract: Bract, tmp_path: Path, arguments: tuple[str, ...], remedy: str
) -> None:
    done = bract("simulate", "digits", *arguments, "--out", "run")
    assert done.returncode == 2
    assert remedy in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_ray_the_error_names_the_remedy(
    bract: Bract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "ray" else find(name, *more),
    )
    done = bract(*COMMON, "--engine", "ray", "--out", "run")
    assert done.returncode == 2
    assert "pip install 'bract[ray]'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_run_configuration_can_say_which_site_a_node_is() -> None:
    # The server chooses the run configuration; only the node's own decides whose data it holds.
    chosen = {"site-factory": "bract.simulations.sites:open_site", "plan": "p", "partition-id": 0}
    given = flower.context(run=1, node=1, node_config={}, run_config=chosen)
    flower.bind_server(1, 1)
    with pytest.raises(UsageError, match="no site-factory"):
        client_app(Message(RecordDict(), 1, "train"), given)
