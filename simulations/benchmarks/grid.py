"""What a simulated client-round costs: charge, private step, release, sum, and the run around it.

Run: python -m bract.simulations.benchmarks.grid --json

Made-up images of Fashion-MNIST's shape, in worker processes, whole rounds through real gates and
ledgers. Of each case the rounds after the first are taken, which has the workers started. Wall time
is a round's; CPU time is that of all processes. Rivals are measured elsewhere, on the same cases.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from flwr.serverapp import Grid

from bract.client.training.execution import Execution
from bract.client.training.randomness import RandomStream
from bract.client.training.trainer import Trainer
from bract.server.checkpoint import RoundState
from bract.server.rounds import RoundLoop
from bract.shared import cli, malloc, models
from bract.shared.terms import Mechanism
from bract.simulations import simulation
from bract.simulations.benchmarks import made_up
from bract.simulations.engines import LocalEngine
from bract.simulations.experiment import Experiment
from bract.simulations.simulation import Simulation
from bract.simulations.sites import site_of

ROUNDS, TURNS = 6, 5
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Case:
    """A cohort: how many sites are asked of how many, and what each does in a round."""

    model: str
    clients: int
    examples: int
    batch: int
    local_steps: int
    mechanism: Mechanism = "dp-sgd"
    cohort: int | None = None

    @property
    def asked(self) -> int:
        """How many clients a round trains."""
        return self.cohort or self.clients

    def experiment(self, folder: Path, rounds: int) -> Experiment:
        """Returns the run; σ is given, so that no time goes into its calibration."""
        return Experiment.model_validate(
            {
                "name": "benchmark",
                "seed": 1,
                "sites": self.clients,
                "sites_per_round": self.cohort,
                "rounds": rounds,
                "data": {"name": made_up.DATA, "dir": str(folder)},
                "model": {"name": self.model},
                "training": {"local_steps": self.local_steps, "learning_rate": 0.1},
                "privacy": {
                    "mechanism": self.mechanism,
                    "epsilon": 1e3,
                    "delta": 1e-5,
                    "clip_norm": 1.0,
                    "batch": self.batch,
                    "noise_multiplier": 2.0,
                },
                "policy": {"epsilon": 1e4},
            }
        )


CNN = Case(made_up.CNN, clients=6, examples=600, batch=64, local_steps=10)
SMALL_CNN = Case(made_up.SMALL_CNN, clients=100, examples=20, batch=20, local_steps=1)
USER_LEVEL = Case(
    made_up.SMALL_CNN, clients=50, examples=50, batch=10, local_steps=5, mechanism="user-level"
)
MANY = Case(made_up.SMALL_CNN, clients=10_000, examples=20, batch=20, local_steps=1, cohort=100)
FEW = Case(made_up.SMALL_CNN, clients=100, examples=20, batch=20, local_steps=1, cohort=100)


def measure_client_round(case: Case, *, rounds: int = ROUNDS, workers: int = 0) -> dict[str, Any]:
    """Returns milliseconds of a client-round, wall and CPU: medians over rounds.

    Args:
        case: what is trained.
        rounds: how many, of which the first is not counted.
        workers: how many processes train; 0 takes every core.
    """
    count = workers or os.cpu_count() or 1
    with _begun(case, rounds, count) as run:
        wall, cpu = _rounds(run)
    return {
        "wall_ms": _each_ms(wall[1:], case),
        "cpu_ms": _each_ms(cpu[1:], case),
        "clients": case.clients,
        "asked": case.asked,
        "rounds": len(wall) - 1,
        "workers": min(count, case.clients),
    }


def measure_whole_run(case: Case = SMALL_CNN, *, rounds: int = 3) -> dict[str, Any]:
    """Returns the seconds that `bract simulate` takes, imports, start and end included."""
    with _laid_out(case) as folder:
        settings = case.experiment(folder, rounds).model_dump(mode="json", exclude_none=True)
        written = folder / "experiment.toml"
        written.write_text(tomli_w.dumps(settings))
        command = [*cli.PROGRAM, "simulate", str(written)]
        started = time.perf_counter()
        subprocess.run(  # noqa: S603  our own command
            [*command, "--out", str(folder / "run")], check=True, capture_output=True
        )
        return {"process_s": round(time.perf_counter() - started, 3)}


def measure_overhead(case: Case, *, turns: int = TURNS) -> dict[str, Any]:
    """Returns a round's wall time over its arithmetic shared by the cores: medians over turns.

    The arithmetic is the same private steps of the same clients, one after another in one process
    that does nothing else: no ledger, no message, no sum. Turns of both alternate, each of two
    rounds, after one that is not counted.
    """
    cores = os.cpu_count() or 1
    walls, bare = list[float](), list[float]()
    for _ in range(turns):
        with _begun(case, 3, cores) as run:
            wall, _ = _rounds(run)
            walls.append(statistics.median(wall[1:]))
            bare.append(statistics.median(_arithmetic(run, 3)[1:]))
    measured, arithmetic = statistics.median(walls), statistics.median(bare)
    return {
        "wall_s": round(measured, 4),
        "arithmetic_s": round(arithmetic, 4),
        "cores": cores,
        "ratio": round(measured / (arithmetic / cores), 3),
    }


def measure_growth(
    *, many: Case = MANY, few: Case = FEW, rounds: int = ROUNDS, turns: int = TURNS
) -> dict[str, Any]:
    """Returns how peak memory and the time of a round grow with clients that are not asked.

    Medians over turns that alternate, each in a process of its own.
    """
    found: dict[str, list[dict[str, Any]]] = {"many": [], "few": []}
    for _ in range(turns):
        for name, case in (("many", many), ("few", few)):
            found[name].append(_alone(case, rounds))
    row = {
        f"{name}_{key}": statistics.median(each[key] for each in rows)
        for name, rows in found.items()
        for key in ("wall_ms", "cpu_ms", "peak_mib")
    }
    return {
        **row,
        "memory_ratio": round(row["many_peak_mib"] / row["few_peak_mib"], 3),
        "time_ratio": round(row["many_wall_ms"] / row["few_wall_ms"], 3),
        "cpu_ratio": round(row["many_cpu_ms"] / row["few_cpu_ms"], 3),
    }


def measure() -> dict[str, dict[str, Any]]:
    """Returns every row."""
    return {
        "client_round_cnn": measure_client_round(CNN),
        "client_round_small_cnn": measure_client_round(SMALL_CNN),
        "whole_run_small_cnn": measure_whole_run(),
        "user_level_small_cnn": measure_client_round(USER_LEVEL),
        "overhead_cnn": measure_overhead(CNN),
        "overhead_small_cnn": measure_overhead(SMALL_CNN),
        "growth": measure_growth(),
    }


def main() -> None:
    """Prints every row, as one JSON object where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--alone", nargs=2, metavar=("CASE", "ROUNDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        row = measure_client_round(
            Case(**json.loads(options.alone[0])), rounds=int(options.alone[1])
        )
        print(json.dumps({**row, "peak_mib": _peak_mib()}))
        return
    rows = measure()
    if options.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(f"{name:24}", "  ".join(f"{key} {value}" for key, value in row.items()))


def _alone(case: Case, rounds: int) -> dict[str, Any]:
    """Returns a case's row from a process of its own, whose peak memory is the case's alone."""
    facts = json.dumps({name: getattr(case, name) for name in Case.__dataclass_fields__})
    command = [sys.executable, "-m", "bract.simulations.benchmarks.grid", "--alone", facts]
    done = subprocess.run(  # noqa: S603  our own module
        [*command, str(rounds)], check=True, capture_output=True, text=True
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


@contextmanager
def _laid_out(case: Case) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        made_up.lay_out(Path(name), case.clients * case.examples)
        yield Path(name)


@contextmanager
def _begun(case: Case, rounds: int, workers: int) -> Iterator[Simulation]:
    with _laid_out(case) as folder:
        experiment = case.experiment(folder, rounds)
        yield simulation.begin(
            experiment, out=folder / "run", state=None, data_dir=None, workers=workers
        )


def _rounds(run: Simulation) -> tuple[list[float], list[float]]:
    """Returns the wall and the CPU seconds of each round, of this process and its workers."""
    wall: list[float] = []
    cpu: list[float] = []
    inner = RoundLoop._round

    def timed(loop: RoundLoop, grid: Grid, state: RoundState) -> RoundState | None:
        spent, started = _cpu_seconds(), time.perf_counter()
        found = inner(loop, grid, state)
        wall.append(time.perf_counter() - started)
        cpu.append(_cpu_seconds() - spent)
        return found

    RoundLoop._round = timed  # type: ignore[method-assign, assignment]
    try:
        with run.prepared():
            run.run(LocalEngine())
    finally:
        RoundLoop._round = inner  # type: ignore[method-assign]
    return wall, cpu


def _arithmetic(run: Simulation, turns: int) -> list[float]:
    """Returns the seconds of one round's private steps alone, turn by turn."""
    torch.set_num_threads(1)
    malloc.keep_freed()  # as workers do
    with run.prepared() as (_, signed):
        agreed = signed.contract
        trainer = Trainer(agreed, Execution(noise_ahead=False))
        model = models.of(agreed.model, agreed.data)
        weights = {
            name: value.detach().numpy()
            for name, value in models.released_parameters(model).items()
        }
        sites = [site_of(run.plan_path, place) for place in range(agreed.planned)]
        held = [site.gate.holdings.open("", agreed.data) for site in sites]
        seconds = []
        for turn in range(turns):
            started = time.perf_counter()
            for place, examples in enumerate(held):
                stream = RandomStream(place.to_bytes(31, "big") + bytes([turn]))
                terms = agreed.cohort[place]
                trainer.train(terms=terms, examples=examples, weights=weights, stream=stream)
            seconds.append(time.perf_counter() - started)
    return seconds


def _each_ms(seconds: list[float], case: Case) -> float:
    return round(1e3 * statistics.median(seconds) / case.asked, 3)


def _cpu_seconds() -> float:
    """Returns the CPU time of this process and of its living children; those come and stay."""
    me = os.getpid()
    total = time.process_time()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == me:
            total += (int(fields[11]) + int(fields[12])) / _TICKS
    return total


def _peak_mib() -> float:
    """Returns the greatest memory of this process and of its largest worker, in MiB."""
    import resource

    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return round(sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024, 1)


if __name__ == "__main__":
    main()
