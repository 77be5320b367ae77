"""Seconds for a trivial train round of stock Flower 1.41 as shipped, over TLS with node keys.

Run: python -m bract.simulations.benchmarks.stock_flower --rounds 5 --sites 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from bract.simulations.stock import stock_federation

_SECONDS_A_ROUND = 60.0


def flower_seconds(rounds: int, sites: int) -> list[float]:
    """Returns the seconds of each round, measured in the ServerApp."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "seconds.json"
        with stock_federation(
            Path(name) / "flower", [{"place": n} for n in range(sites)]
        ) as flower:
            flower.submit("trivial", {"out": str(out), "rounds": rounds, "sites": sites})
            flower.await_file(out, timeout_seconds=_SECONDS_A_ROUND * (rounds + 1))
        seconds = [float(value) for value in json.loads(out.read_bytes())]
    if len(seconds) != rounds:
        raise RuntimeError(f"{len(seconds)} of {rounds} rounds were timed")
    return seconds


def main() -> None:
    """Prints the median and every round as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sites", type=int, default=2)
    asked = parser.parse_args()
    seconds = flower_seconds(asked.rounds, asked.sites)
    print(
        json.dumps(
            {
                "flower_seconds": statistics.median(seconds),
                "each": seconds,
                "rounds": asked.rounds,
                "sites": asked.sites,
            }
        )
    )


if __name__ == "__main__":
    main()
