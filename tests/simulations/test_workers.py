"""Worker processes: who answers, and where."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bract.simulations.workers import Pool


def answered(workers: int) -> set[int]:
    pool: Pool[int, int] = Pool(lambda _: os.getpid(), lambda _: -1, workers=workers)
    try:
        return set(pool.map(range(8)))
    finally:
        pool.close()


def test_workers_answer_in_processes_of_their_own() -> None:
    assert os.getpid() not in answered(2)
    assert answered(1) == {os.getpid()}


def test_a_process_that_sees_a_gpu_answers_by_itself_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert answered(2) == {os.getpid()}
    assert "set CUDA_VISIBLE_DEVICES to nothing" in caplog.text


@pytest.mark.parametrize(("device", "seen"), [("cpu", ""), ("auto", None)])
def test_a_run_on_the_cpu_leaves_gpus_to_others(
    bract: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    seen: str | None,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found: list[str | None] = []
    monkeypatch.setattr(
        "bract.simulations.simulation.begin",
        lambda *_, **__: found.append(os.environ.get("CUDA_VISIBLE_DEVICES")) or 1 / 0,
    )
    bract("simulate", "digits", "--device", device, "--out", str(tmp_path / "run"))
    assert found == [seen]
