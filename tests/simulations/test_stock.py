"""Stock Flower carries the same apps: real processes, TLS and node keys, on this machine."""

from __future__ import annotations

import ast
import json
import socket
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from bract.server import app
from bract.shared.errors import BractError
from bract.shared.privacy import verification
from bract.simulations import simulation, stock
from bract.simulations.experiment import load
from bract.simulations.sites import node_config
from bract.simulations.stock import stock_federation

ROUNDS, SITES = 2, 2
SETTINGS = {"rounds": ROUNDS, "sites": SITES, "seed": 11}


def test_stock_flower_trains_through_each_sites_gate_to_the_same_weights(
    bract: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums of floats as in the other engines
    experiment = load("digits", model="linear", overrides=SETTINGS, settings=())
    run = simulation.begin(experiment, out=tmp_path / "run", state=None, data_dir=None, workers=1)
    with run.prepared() as (_, signed):
        nodes = [node_config(run.plan_path, place) for place in range(SITES)]
        with stock_federation(tmp_path / "flower", nodes) as flower:
            flower.submit("stock", run.run_config)
            flower.await_file(run.out / "checkpoint/result.json", timeout_seconds=300)
            processes = dict(flower.processes)
    assert all(process.poll() is not None for process in processes.values())
    lines = (run.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["replied"] for line in lines] == [SITES] * ROUNDS
    pinned = {site.name: site.key for site in signed.contract.cohort}
    for site in signed.contract.cohort:
        path = run.state.ledger(site.name, many=False)
        (found,) = verification.verify(path, site_keys=pinned, anchors={})
        charged = found.chain.charges
        assert set(charged) == {(signed.contract.sha256, n) for n in range(1, ROUNDS + 1)}
    words = [f"--{name}={value}" for name, value in SETTINGS.items()]
    assert bract("simulate", "digits", "--model=linear", *words, "--out=local").returncode == 0
    over_flower, local = (folder / "model.safetensors" for folder in (run.out, tmp_path / "local"))
    assert over_flower.read_bytes() == local.read_bytes()


def test_a_federation_that_cannot_start_says_which_log_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind((stock.HOST, 0))  # and nobody listens there
        monkeypatch.setattr(stock, "free_port", lambda: taken.getsockname()[1])
        with (
            pytest.raises(BractError, match=r"superlink ended with .*superlink\.log"),
            stock_federation(tmp_path / "flower", []),
        ):
            pass


def test_whatever_the_server_reads_can_be_set_in_the_bundle() -> None:
    read = set()
    for node in ast.walk(ast.parse(Path(app.__file__).read_text())):
        match node:
            case ast.Call(
                func=ast.Attribute(ast.Name("configured"), "get"), args=[ast.Constant(key), *_]
            ) | ast.Subscript(ast.Name("configured"), ast.Constant(key)):
                read.add(key)
    bundle = resources.files("bract.simulations") / "federations/stock/pyproject.toml"
    assert set(tomllib.loads(bundle.read_text())["tool"]["flwr"]["app"]["config"]) == read
    assert {"contract", "minimum-cohort", "round-seconds"} < read


def test_the_bundles_hold_names_and_no_code() -> None:
    for bundle in ("stock", "trivial"):
        folder = resources.files("bract.simulations") / "federations" / bundle
        assert [file.name for file in folder.iterdir()] == ["pyproject.toml"]
