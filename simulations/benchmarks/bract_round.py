"""Seconds for a round of bract's own hosting over TLS on loopback.

Run: python -m bract.simulations.benchmarks.bract_round --rounds 10 --sites 2 [--megabytes 25]

Without `--megabytes` a round is real: `bract server` and `bract client` with `linear` on digits,
charge, private step, release and witness included. With it the sites only return a model of that
size, so that what is timed is the road.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from bract.shared import keyfiles, node_keys
from bract.simulations.federations.loopback import (
    LOOPBACK,
    Processes,
    SitePlan,
    free_port,
    lay_out,
)

_SECONDS_A_ROUND = 30.0
_ECHO = "from bract.simulations.benchmarks.bract_round import echo; echo()"


def bract_seconds(rounds: int, sites: int) -> list[float]:
    """Returns the seconds of each round of a real federation, by the server's log."""
    with tempfile.TemporaryDirectory() as name:
        plans = [
            SitePlan(f"site-{n}", 300, "digits", f"{n + 1}/{sites}", epsilon=50.0)
            for n in range(sites)
        ]
        layout = lay_out(
            Path(name) / "federation", sites=plans, port=free_port(), terms=_terms(rounds, sites)
        )
        with Processes(layout) as processes:
            processes.start_server("--log-format", "json")
            for plan in plans:
                processes.start_client(plan.name)
            processes.wait_for_server(60 + _SECONDS_A_ROUND * rounds)
            stamps = list(_stamps(processes.log("server")))
    return [after - before for before, after in itertools.pairwise(stamps)]


def echo_seconds(rounds: int, sites: int, megabytes: float) -> dict[str, Any]:
    """Returns the seconds of each round whose sites return a model, and the greatest memory.

    `server_mib` is this process's peak above what it held before the first round.
    """
    with tempfile.TemporaryDirectory() as name, _echo_grid(Path(name), sites) as grid:
        from flwr.app import Array, ArrayRecord, Message, MessageType, RecordDict

        # No two pieces alike: Flower sends equal ones once.
        values = np.random.default_rng(0).normal(size=int(megabytes * 1e6 / 4)).astype(np.float32)
        idle, seconds = _peak_mib(), []
        for _ in range(rounds):
            values += 1  # a new model each round, as in training
            started = time.perf_counter()
            record = ArrayRecord({"model": Array(values)})
            messages = [
                Message(RecordDict({"arrays": record}), node, MessageType.TRAIN)
                for node in grid.get_node_ids()
            ]
            replies = list(grid.send_and_receive(messages, timeout=120))
            if len(replies) != sites or any(reply.has_error() for reply in replies):
                raise RuntimeError("a round lost an answer")
            for reply in replies:
                if not np.array_equal(reply.content["arrays"]["model"].numpy(), values):
                    raise RuntimeError("an answer is not what was sent")
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "server_mib": _peak_mib() - idle}


def echo() -> None:
    """Is one site's process: returns what it gets, over the client's own connection."""
    from flwr.app import Message, RecordDict

    from bract.client.flower import Address, Connection

    server, root, key = sys.argv[1:]
    address = Address(server, Path(root))
    with Connection(address, node_keys.load(Path(key)), greatest_order=2**31) as connection:
        connection.open()
        while True:
            order = connection.receive()
            if order is not None:
                content = RecordDict({"arrays": order.content["arrays"]})
                connection.send(Message(content, reply_to=order))


@contextmanager
def _echo_grid(folder: Path, sites: int) -> Iterator[Any]:
    import bract.server.app  # noqa: F401  an idle server has torch and all that it needs loaded
    from bract.server import memory
    from bract.server.flower.grid import FleetGrid
    from bract.server.flower.host import Host, Listener
    from bract.shared import pki

    authority, private = pki.new_authority(), [node_keys.new() for _ in range(sites)]
    served = pki.issue_server(authority, [LOOPBACK])
    for name, text in {
        "ca.pem": authority.certificate_pem(),
        "server.pem": served.certificate_pem(),
        "server-key.pem": served.key_pem(),
        **{f"node-{n}.pem": node_keys.to_pem(key) for n, key in enumerate(private)},
    }.items():
        keyfiles.create([keyfiles.private(folder / name, text)])
    host = Host(
        database=folder / "superlink.sqlite",
        sites={f"site-{n}": node_keys.public_line(k.public_key()) for n, k in enumerate(private)},
        listener=Listener(LOOPBACK, free_port(), folder / "server.pem", folder / "server-key.pem"),
        greatest_reply=2**31,
    )
    host.start()
    command = [sys.executable, "-c", _ECHO, f"{LOOPBACK}:{host.port}", str(folder / "ca.pem")]
    processes = [
        subprocess.Popen([*command, str(folder / f"node-{n}.pem")])  # noqa: S603  our own module
        for n in range(sites)
    ]
    try:
        grid = FleetGrid(host, reply_seconds=120)
        while len(list(grid.get_node_ids())) < sites:
            time.sleep(0.1)
        memory.settle()
        yield grid
    finally:
        for process in processes:
            process.kill()
            process.wait()
        host.close()


def _terms(rounds: int, sites: int) -> dict[str, Any]:
    return {
        "run": "round-time",
        "rounds": rounds + 1,  # the first one is not timed: it makes the sites' models
        "minimum_cohort": sites,
        "model": {"name": "linear"},
        "data": {"name": "digits", "scale": 16.0},
        "training": {"local_steps": 1, "learning_rate": 1.0},
        "privacy": {
            "epsilon": 30.0,
            "delta": 1e-5,
            "clip_norm": 0.3,
            "batch": 64,
            "noise_multiplier": 2.0,
        },
    }


def _stamps(log: str) -> Iterator[float]:
    for line in log.splitlines():
        facts = json.loads(line) if line.startswith("{") else {}
        if facts.get("event") == "round" and facts.get("completed"):
            yield datetime.fromisoformat(facts["time"]).timestamp()


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints medians as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--megabytes", type=float)
    asked = parser.parse_args(arguments)
    report: dict[str, Any] = {"rounds": asked.rounds, "sites": asked.sites}
    if asked.megabytes is None:
        seconds = bract_seconds(asked.rounds, asked.sites)
    else:
        measured = echo_seconds(asked.rounds, asked.sites, asked.megabytes)
        seconds = measured["seconds"]
        report |= {"megabytes": asked.megabytes, "server_mib": measured["server_mib"]}
        report["times_model"] = measured["server_mib"] * 2**20 / (asked.megabytes * 1e6)
    print(json.dumps({**report, "median": statistics.median(seconds), "each": seconds}))


if __name__ == "__main__":
    main()
