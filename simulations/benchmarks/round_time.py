"""Seconds for a trivial train round: bract's own hosting beside stock Flower, on this machine.

Run: python -m bract.simulations.benchmarks.round_time --json
"""

from __future__ import annotations

import argparse
import json
import statistics

from bract.simulations.benchmarks.bract_round import bract_seconds
from bract.simulations.benchmarks.stock_flower import flower_seconds


def main() -> None:
    """Prints the medians of both sides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    report = measure(asked.rounds, asked.sites)
    if asked.json:
        print(json.dumps(report))
    else:
        print(
            f"a trivial round of {asked.sites} sites: bract {report['bract_seconds']:.2f} s, "
            f"stock Flower {report['flower_seconds']:.2f} s (medians of {asked.rounds})"
        )


def measure(rounds: int, sites: int) -> dict[str, float]:
    """Returns the medians; one side runs after the other, so that neither slows the other."""
    return {
        "bract_seconds": statistics.median(bract_seconds(rounds, sites)),
        "flower_seconds": statistics.median(flower_seconds(rounds, sites)),
        "rounds": rounds,
        "sites": sites,
    }


if __name__ == "__main__":
    main()
