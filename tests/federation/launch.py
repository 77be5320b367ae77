"""Starts bract with a fault at one exact point: a real signal, of the real process to itself.

    python launch.py "kill before bract.client.gate:Gate.admit 2" -- client SITE.toml

A point is "ACTION before|after MODULE:FUNCTION [NUMBER [TEXT]]": the action is taken at the
NUMBER-th call (the first where none is given) of those whose arguments show TEXT. Nothing of the
product knows of it.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(words: Sequence[str]) -> None:
    """Runs a bract command with faults; what stands before `--` are points."""
    cut = list(words).index("--")
    for point in words[:cut]:
        install(point)
    from bract.shared import cli

    sys.argv = ["bract", *words[cut + 1 :]]
    cli.main()


def forked(words: Sequence[str], log: Path, parent: int) -> None:
    """Runs in a process forked from one whose imports are done; it ends with the test run."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["BRACT_TEST_GO"] = f"{log}.go"
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    main(words)


def install(point: str) -> None:
    """Wraps the function that a point names."""
    action, when, target, *rest = point.split(" ", 4)
    number, text = int(rest[0]) if rest else 1, rest[1] if len(rest) > 1 else ""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    called = getattr(owner, name)
    counter = itertools.count(1)  # objects are pushed by several threads

    @functools.wraps(called)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        shown = not text or text in repr((args, kwargs))
        here = shown and next(counter) == number
        if here and when == "before":
            ACTIONS[action](*args)
        result = called(*args, **kwargs)
        if here and when == "after":
            ACTIONS[action](*args)
        return result

    setattr(owner, name, wrapper)


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _term(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)  # training that takes this long


def _spill(transaction: Any, *_: Any) -> None:
    """Makes SQLite write into the file before it commits, and kills: a journal stays behind."""
    path = transaction._connection.execute("PRAGMA database_list").fetchone()[2]
    before = os.path.getsize(path)
    transaction._connection.execute("PRAGMA cache_size = 1")
    for number in range(64):
        transaction._connection.execute(
            "INSERT INTO documents VALUES ('policy', ?, ?)", (str(number), "x" * 16_384)
        )
    journal = os.path.getsize(path + "-journal")
    print("spilled", os.path.getsize(path) > before, journal > 0, file=sys.stderr, flush=True)
    _kill()


def _wait(*_: Any) -> None:
    """Holds this thread alone, until the test lets it go on."""
    print("waiting", file=sys.stderr, flush=True)
    go = Path(os.environ["BRACT_TEST_GO"])
    while not go.exists():
        time.sleep(0.02)
    go.unlink()


def _hurry(*_: Any) -> None:
    """Has the server wait for a locked link state no longer than a moment."""
    importlib.import_module("bract.server.flower.host").BUSY_SECONDS = 0.3  # type: ignore[attr-defined]


def _twice(connection: Any, reply: Any) -> None:
    """Gives the same answer again on the same connection."""
    connection.send(reply)


ACTIONS: dict[str, Callable[..., None]] = {
    "kill": _kill,
    "stop": _stop,
    "term": _term,
    "spill": _spill,
    "twice": _twice,
    "wait": _wait,
    "hurry": _hurry,
}


def _end_with(parent: int) -> None:
    select.select([os.pidfd_open(parent)], [], [])
    _kill()


if __name__ == "__main__":
    main(sys.argv[1:])
elif __name__ == "forked":
    forked(*REQUEST)  # noqa: F821  given by whoever runs this file in a forked process
