"""What the benchmarks print, on a model small enough for a suite."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from bract.simulations.benchmarks import audit_record, grid, made_up, private_step


def test_private_step_prints_a_ratio_for_every_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = (lambda: nn.Linear(4, 10), lambda times: (torch.rand(8, 4), torch.arange(8)))
    monkeypatch.setattr(private_step, "CASES", {"linear": case})
    monkeypatch.setattr(private_step, "SECONDS", 0.01)
    monkeypatch.setattr(sys, "argv", ["private_step", "--json", "--repeats", "1"])
    private_step.main()
    (row,) = json.loads(capsys.readouterr().out).values()
    ways = ["bract", "bract_without_noise", "opacus_hooks", "opacus_ghost", "opacus_functorch"]
    assert list(row) == ways
    assert all(ratio > 0 for ratio in row.values())


@pytest.mark.parametrize(("name", "count"), [("cnn", 225_034), ("small_cnn", 26_010)])
def test_models_of_the_private_step_have_the_sizes_that_are_said(name: str, count: int) -> None:
    build, make = private_step.CASES[name]
    assert sum(parameter.numel() for parameter in build().parameters()) == count
    assert len(make(1)[0]) == 64


def test_the_record_s_benchmark_verifies_and_accounts_what_it_wrote(
    capsys: pytest.CaptureFixture[str],
) -> None:
    audit_record.main(["--json", "--charges", "7", "--runs", "3"])
    found = json.loads(capsys.readouterr().out)
    assert (found["charges"], found["runs"], found["entries"]) == (7, 3, 8)
    assert 0 < found["epsilon_thorough"] <= found["epsilon"]
    assert abs(found["epsilon_prv"] - found["epsilon_thorough"]) < 0.02
    assert 0 < found["plain_seconds"] < found["thorough_seconds"]


def test_the_grid_is_measured_in_whole_rounds_of_real_sites() -> None:
    case = grid.Case(made_up.SMALL_CNN, clients=4, examples=10, batch=5, local_steps=1, cohort=2)
    row = grid.measure_client_round(case, rounds=2, workers=1)
    assert (row["clients"], row["asked"], row["rounds"]) == (4, 2, 1)
    assert row["cpu_ms"] > 0
    assert row["wall_ms"] > 0
