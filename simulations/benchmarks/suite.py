"""Every benchmark of speed in one run, each rival beside bract on the same case, turn by turn.

Run: make bench, which installs the rivals into an environment of their own, or
python -m bract.simulations.benchmarks.suite --rivals PYTHON --out FOLDER

results.json and results.md are written into the folder. Medians over turns; between turns engines
alternate, so that what else the machine does hits all of them. The private step's ratios are
measured within one process, turn by turn too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bract.client.training.randomness import SecureRandomness
from bract.shared import canonical, versions
from bract.simulations.benchmarks import grid, private_step, rivals

TURNS = 5
ROUNDS = 3  # of a turn; the first is not counted
NORMALS = 1_000_000
# What is asked of a ratio: how many times bract's time a rival takes, or of a step, the plain one.
STEP_LIMITS = {
    "cnn": (1.20, 1.12),
    "small_cnn": (1.35, 1.25),
    "transformer": (1.35, 1.25),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: of which work, by which engine, and what was asked of it."""

    work: str
    engine: str
    measured: float
    unit: str
    cpu: float | None = None
    ratio: float | None = None
    asked: str | None = None


@dataclass(frozen=True, slots=True)
class Race:
    """A case that a rival runs too.

    Args:
        work: in words.
        case: ours.
        script: the rival's, in the folder of rivals.
        network: its name there.
        times: how many times faster bract should be.
    """

    work: str
    case: grid.Case
    script: str
    network: str
    times: float

    @property
    def rival(self) -> str:
        """The rival's name."""
        return self.script.removesuffix(".py").replace("_", " ")


RACES = (
    Race("client-round, CNN, 6 × 600, batch 64", grid.CNN, "flower_ray.py", "cnn", 5),
    Race(
        "client-round, small CNN, 100 × 20, batch 20",
        grid.SMALL_CNN,
        "flower_ray.py",
        "small_cnn",
        10,
    ),
    Race(
        "client-round, user-level DP, small CNN, 50 × 50, batch 10",
        grid.USER_LEVEL,
        "pfl_cohort.py",
        "small_cnn",
        2,
    ),
)


def main() -> None:
    """Writes both files and prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals", type=Path, metavar="PYTHON", help="their environment's python")
    parser.add_argument("--out", type=Path, default=Path(), help="where the results go")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    results = measure(rival=options.rivals, turns=options.turns)
    canonical.write_atomically(
        options.out / "results.json", (json.dumps(results, indent=1) + "\n").encode()
    )
    canonical.write_atomically(options.out / "results.md", markdown(results).encode())
    print(json.dumps(results) if options.json else markdown(results))


def measure(*, rival: Path | None, turns: int = TURNS) -> dict[str, Any]:
    """Returns when, where and with what was measured, and the rows.

    Args:
        rival: the python of the rivals' environment; None leaves them out.
        turns: how often each engine is run.
    """
    rows = [*_steps(turns), _normals()]
    found_versions: dict[str, str] = {}
    for race in RACES:
        rows += _race(race, rival, turns, found_versions)
    rows += _limits()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "additions_seconds": round(_additions(), 2),
        },
        "turns": turns,
        "versions": versions.installed(),
        "versions_of_rivals": found_versions,
        "rows": [asdict(row) for row in rows],
    }


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the results as a document with one table."""
    machine, rows = results["machine"], results["rows"]
    where = machine["gpu"] or "no GPU"
    lines = [
        "# What things cost",
        "",
        f"{results['date']}, {machine['cores']} cores, {where}; ten million additions in Python "
        f"take {machine['additions_seconds']} s. Medians of {results['turns']} turns, engines "
        "alternating; `make bench`.",
        "",
        "| work | engine | measured | CPU | ratio | asked |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cpu = "" if row["cpu"] is None else f"{row['cpu']:g} {row['unit']}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['work']} | {row['engine']} | {row['measured']:g} {row['unit']} | {cpu} | "
            f"{ratio} | {row['asked'] or ''} |"
        )
    for title, found in (
        ("bract", results["versions"]),
        ("rivals", results["versions_of_rivals"]),
    ):
        lines += ["", f"{title}: " + ", ".join(f"{n} {v}" for n, v in sorted(found.items()))]
    return "\n".join(lines) + "\n"


def _steps(turns: int) -> list[Row]:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    table = private_step.measure(repeats=max(turns, private_step.REPEATS), devices=devices)
    rows = []
    for device, models in (("", table), (", GPU", table.pop("cuda", {}))):
        for model, ratios in models.items():
            with_noise, without = STEP_LIMITS[model]
            asked = {"bract": f"≤ {with_noise}", "bract_without_noise": f"≤ {without}"}
            rows += [
                Row(
                    f"private / plain step, {model}{device}",
                    way,
                    ratio,
                    "×",
                    ratio=ratio,
                    asked=None if device else asked.get(way),
                )
                for way, ratio in ratios.items()
            ]
    return rows


def _normals() -> Row:
    torch.set_num_threads(1)
    stream, room = SecureRandomness().stream(1), torch.empty(NORMALS)
    ours = _cpu_ms(lambda: stream.normals(NORMALS))
    torchs = _cpu_ms(lambda: room.normal_())
    return Row(
        f"10⁶ normals, float64; torch's own float32: {torchs:.1f} ms",
        "bract",
        round(ours, 1),
        "ms",
        ratio=round(ours / torchs, 2),
        asked="≤ 16 ms",
    )


def _race(race: Race, rival: Path | None, turns: int, found: dict[str, str]) -> list[Row]:
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    whole: list[float] = []
    asks_whole = race.case is grid.SMALL_CNN
    for _ in range(turns):
        ours.append(grid.measure_client_round(race.case, rounds=ROUNDS))
        if asks_whole:
            whole.append(grid.measure_whole_run(race.case, rounds=ROUNDS)["process_s"])
        if rival is not None:
            theirs.append(_rival(race, rival))
    mine = statistics.median(row["wall_ms"] for row in ours)
    cpu = statistics.median(row["cpu_ms"] for row in ours)
    rows = [Row(race.work, "bract", mine, "ms", cpu=cpu)]
    run = [Row(f"whole run of {ROUNDS} rounds", "bract", _median(whole), "s")] if whole else []
    if theirs:
        found |= theirs[0]["versions"]
        each = statistics.median(
            1e3 * statistics.median(row["round_seconds"][1:]) / row["clients"] for row in theirs
        )
        rows.append(_beside(race.work, race.rival, each, "ms", mine, race.times))
        if whole:
            took = _median([row["process_s"] for row in theirs])
            run.append(_beside(run[0].work, race.rival, took, "s", run[0].measured, race.times))
    return [*rows, *run]


def _beside(work: str, who: str, theirs: float, unit: str, ours: float, times: float) -> Row:
    ratio = round(theirs / ours, 2)
    return Row(work, who, round(theirs, 2), unit, ratio=ratio, asked=f"bract ≥ {times:g} × faster")


def _rival(race: Race, python: Path) -> dict[str, Any]:
    folder = Path(rivals.__file__).parent
    facts = {
        "network": race.network,
        "clients": race.case.asked,
        "examples": race.case.examples,
        "batch": race.case.batch,
        "rounds": ROUNDS,
    }
    words = [str(python), race.script]
    for name, value in facts.items():
        words += [f"--{name}", str(value)]
    telemetry = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    started = time.perf_counter()
    done = subprocess.run(  # noqa: S603  our own script
        words, cwd=folder, env=os.environ | telemetry, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(f"{race.script} failed: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row | {"process_s": seconds}  # imports included, as of ours


def _limits() -> list[Row]:
    growth, rows = grid.measure_growth(), []
    for name, case in (("CNN", grid.CNN), ("small CNN", grid.SMALL_CNN)):
        overhead = grid.measure_overhead(case)
        work = f"wall time over (arithmetic / cores), {name}"
        rows.append(
            Row(work, "bract", overhead["ratio"], "×", ratio=overhead["ratio"], asked="≤ 1.25")
        )
    work = "10,000 clients over 100, cohort 100: "
    return [
        *rows,
        Row(work + "peak memory", "bract", growth["memory_ratio"], "×", asked="≤ 1.1"),
        Row(work + "time a round", "bract", growth["time_ratio"], "×", asked="≤ 1.1"),
    ]


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 2)


def _cpu_ms(work: Callable[[], object]) -> float:
    work()
    turns = []
    for _ in range(15):
        started = time.process_time()
        work()
        turns.append(time.process_time() - started)
    return 1e3 * statistics.median(turns)


def _additions() -> float:
    """Returns the seconds of ten million additions: how fast this machine is, in one figure."""
    started, total = time.perf_counter(), 0
    for _ in range(10**7):
        total = total + 1
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
