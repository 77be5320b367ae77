"""Accuracy and AUC at each hospital, by budget: of the four together, beside each one alone.

The production simulation runs once for every seed, and once more for each hospital by itself with
its own noise; all are scored on the same public test patients of each hospital.

Run: python -m bract.simulations.benchmarks.heart_disease --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bract.shared.reports.runs import Summary
from bract.simulations import experiment, simulation
from bract.simulations.engines import LocalEngine

EPSILONS = (1.0, 3.0, 8.0)
# Each hospital, and the batch that samples two thirds of its patients, as together.
ALONE = {"cleveland": 133, "hungarian": 126, "switzerland": 54, "va": 86}
FIGURES = {"accuracy": "test_accuracy_by_group", "auc": "test_auc_by_group"}
Table = dict[str, dict[str, dict[str, Any]]]


def main() -> None:
    """Prints, for each budget and hospital, mean and deviation over the runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--runs", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--data-dir", type=Path, help="a folder of data sets")
    options = parser.parse_args()
    table = measure(range(1, options.runs + 1), options.data_dir)
    if options.json:
        print(json.dumps(table))
        return
    for budget, hospitals in table.items():
        for hospital, row in hospitals.items():
            cells = (f"{name} {_shown(value)}" for name, value in row.items())
            print(f"{budget:16} {hospital:12}", "  ".join(cells))


def measure(seeds: Sequence[int], root: Path | None, epsilons: Sequence[float] = EPSILONS) -> Table:
    """Returns mean and deviation of what each hospital's test patients get, by budget.

    Args:
        seeds: one run each.
        root: a folder of data sets; `$BRACT_DATA` where it is None.
        epsilons: the sites' ceilings, which their filters stay below.
    """
    table: Table = {}
    for epsilon in epsilons:
        budget = [f"privacy.epsilon={epsilon}", f"policy.epsilon={epsilon}"]
        table[f"epsilon {epsilon:g}"] = _rows(seeds, root, budget)
    table["without privacy"] = _rows(seeds, root, ["privacy.mechanism=none"])
    return table


def _rows(
    seeds: Sequence[int], root: Path | None, settings: Sequence[str]
) -> dict[str, dict[str, Any]]:
    together = [_run(seed, root, settings, sites=4) for seed in seeds]
    rows: dict[str, dict[str, Any]] = {}
    for hospital, batch in ALONE.items():
        own = [f'data.partition.only=["{hospital}"]', f"privacy.batch={batch}"]
        alone = [_run(seed, root, [*settings, *own], sites=1) for seed in seeds]
        rows[hospital] = {
            f"{figure}_{who}": _spread([(getattr(run, field) or {})[hospital] for run in runs])
            for figure, field in FIGURES.items()
            for who, runs in (("together", together), ("alone", alone))
        }
    means = [run.test_accuracy_mean_of_groups for run in together]
    rows["all four"] = {"accuracy_together": _spread(means)}
    return rows


def _run(seed: int, root: Path | None, settings: Sequence[str], *, sites: int) -> Summary:
    chosen = experiment.load(
        "heart-disease",
        model=None,
        overrides={"seed": seed, "sites": sites},
        settings=settings,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        begun = simulation.begin(chosen, out=out, state=None, data_dir=root, workers=1)
        return begun.complete(LocalEngine())


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Returns mean and deviation, None where a figure cannot be had (one class alone)."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return {"mean": round(statistics.fmean(known), 4), "deviation": round(deviation, 4)}


def _shown(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:.3f} ± {value['deviation']:.3f}"


if __name__ == "__main__":
    main()
