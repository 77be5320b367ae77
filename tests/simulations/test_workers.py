"""Worker processes: who answers, and where."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
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


@pytest.fixture
def pool() -> Iterator[Pool[int, int]]:
    made: Pool[int, int] = Pool(lambda _: os.getpid(), lambda _: -1, workers=2)
    yield made
    made.close()


def test_a_call_aside_is_made_by_a_worker_and_is_no_answer(pool: Pool[int, int]) -> None:
    value = pool.aside(os.getpid)
    answers = list(pool.map(range(8)))
    assert len(answers) == 8
    assert value() in {*answers} - {os.getpid()}


def test_a_call_aside_is_waited_for_where_no_task_was(pool: Pool[int, int]) -> None:
    earlier = pool.aside(partial(int, "1"))  # nobody asks for its value in time
    later = pool.aside(partial(int, "2"))
    assert (earlier(), later()) == (1, 2)
    assert len(list(pool.map(range(4)))) == 4


@pytest.mark.parametrize("tasks", [0, 6])
def test_a_call_whose_worker_dies_is_made_here_and_no_task_is_lost(
    pool: Pool[int, int], tmp_path: Path, tasks: int
) -> None:
    value = pool.aside(partial(dies_once, tmp_path / "died", os.getpid()))
    assert [answer for answer in pool.map(range(tasks)) if answer == os.getpid()] == []
    assert value() == os.getpid()
    assert -1 not in list(pool.map(range(3)))  # by the worker that is left


def test_a_worker_that_died_over_a_call_long_ago_is_asked_for_nothing(
    pool: Pool[int, int], tmp_path: Path
) -> None:
    value = pool.aside(partial(dies_once, tmp_path / "died", os.getpid()))
    time.sleep(1)  # no task can be sent to it any more
    assert -1 not in list(pool.map(range(4)))
    assert value() == os.getpid()
    assert pool.aside(os.getpid)() != os.getpid()  # by the worker that is left


def dies_once(mark: Path, parent: int) -> int:
    if os.getpid() != parent:
        mark.touch()
        os._exit(1)
    assert mark.exists()
    return os.getpid()


def test_one_process_makes_a_call_when_its_value_is_asked_for() -> None:
    alone: Pool[int, int] = Pool(lambda _: 0, lambda _: -1, workers=1)
    calls: list[int] = []
    value = alone.aside(lambda: calls.append(1))
    assert calls == []
    value()
    assert calls == [1]


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
