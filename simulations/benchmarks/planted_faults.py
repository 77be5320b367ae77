"""Which planted faults the audit of the mechanism finds, and how often it is wrong on none.

Run: python -m bract.simulations.benchmarks.planted_faults --json [--runs 30] [--correct 200]

Every run is the whole suite: four contracts, the gate, the ledger and the ClientApp included, of an
mlp on digits. On correct runs it counts too how often a lower bound on ε was over the ledger's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bract.shared.data import describe
from bract.shared.terms import ModelTerms
from bract.simulations.audits import bounds, faults, mechanism
from bract.simulations.audits.proposal import Subject
from bract.simulations.audits.settings import CONFIDENCES, suite

RUNS, CORRECT = 30, 200
_TASKS_A_PROCESS = 60  # then it is replaced: caches keep what a run leaves behind
_TOLD_EVERY, _SHOWN = 50, 5


@dataclass(frozen=True, slots=True)
class Task:
    """One run of the suite, with a fault or without."""

    fault: str | None
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run found: the tests that failed, and the bounds over the ledger's ε."""

    task: Task
    failed: tuple[str, ...]
    seconds: float
    ledger: float = 0.0
    lower: dict[str, dict[str, float]] = field(default_factory=dict)


def run(task: Task) -> Outcome:
    """Returns what the suite finds once."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # faults make sites complain
    started = time.process_time()
    subject = Subject(ModelTerms(name="mlp", options={"hidden": 16}), describe("digits"))
    with faults.planted(task.fault) if task.fault else contextlib.nullcontext():
        findings = mechanism.audit(subject, suite(), seed=task.seed)
    failed = tuple(sorted({f"{c.setting}: {c.name}" for c in findings.failed}))
    lower: dict[str, dict[str, float]] = {}
    if task.fault is None:
        told = findings.told
        lower = {f"{c:.5g}": bounds.lower_bounds(told, c) for c in CONFIDENCES}
    seconds = time.process_time() - started
    return Outcome(task, failed, seconds, findings.epsilon_ledger, lower)


def measure(tasks: Sequence[Task], workers: int) -> list[Outcome]:
    """Returns the outcomes of all tasks, from as many processes as there are workers."""
    fork = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    outcomes = []
    with context.Pool(workers, maxtasksperchild=_TASKS_A_PROCESS) as pool:
        for number, outcome in enumerate(pool.imap_unordered(run, tasks), 1):
            outcomes.append(outcome)
            if number % _TOLD_EVERY == 0:
                so_far = json.dumps(table(outcomes), ensure_ascii=False)
                print(f"{number} of {len(tasks)} runs: {so_far}", file=sys.stderr)
    return outcomes


def table(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Returns the counts, by fault, with the tests that failed most often."""
    found: dict[str | None, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.task.fault, []).append(outcome)
    correct = found.pop(None, [])
    return {
        "correct": {**_counts(correct), "bounds_over_ledger": _over(correct)},
        "faults": {name: _counts(found[name]) for name in faults.FAULTS if name in found},
    }


def _counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    names = Counter(name for outcome in outcomes for name in outcome.failed)
    return {
        "runs": len(outcomes),
        "flagged": sum(bool(outcome.failed) for outcome in outcomes),
        "evidence": dict(names.most_common(_SHOWN)),
    }


def _over(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Returns in how many runs each bound was over the ledger's ε, by method and confidence."""
    over: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for confidence, values in outcome.lower.items():
            for method, value in values.items():
                counts = over.setdefault(method, Counter())
                counts[confidence] += value > outcome.ledger
    return {method: dict(counts) for method, counts in over.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--correct", type=int, default=CORRECT)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    names = [None] * asked.correct + [name for name in faults.FAULTS for _ in range(asked.runs)]
    tasks = [Task(name, asked.seed + place) for place, name in enumerate(names)]
    random.Random(asked.seed).shuffle(tasks)  # noqa: S311  so that what is told early is of all
    started = time.monotonic()
    outcomes = measure(tasks, asked.workers)
    report = table(outcomes)
    report["seconds"] = time.monotonic() - started
    report["seconds_a_run"] = sum(o.seconds for o in outcomes) / max(1, len(outcomes))
    if asked.json:
        print(json.dumps(report, ensure_ascii=False))
        return
    for name, row in {"correct": report["correct"], **report["faults"]}.items():
        print(f"{name:28}{row['flagged']:4} of {row['runs']:<5}{', '.join(row['evidence'])}")


if __name__ == "__main__":
    main()
