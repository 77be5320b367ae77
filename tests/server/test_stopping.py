"""A server's end by a signal: it comes again where it was lost, and not once it was heard."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

LOST = """
import os, signal, sys, time, weakref
from bract.server import stopping

number = signal.Signals[sys.argv[1]]
stopping.AGAIN_SECONDS = 0.1

class Freed:
    pass

def ask(_):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the signal is handled here, of which no exception comes out

before = signal.getsignal(signal.SIGTERM)
freed = Freed()
reference = weakref.ref(freed, ask)
try:
    with stopping.stoppable():
        try:
            del freed
            print("lost")
            time.sleep(60)
            print("never again")
        except KeyboardInterrupt:
            print("again")
            stopping.heard()
            time.sleep(0.5)
            print("ends")
            raise
except KeyboardInterrupt:
    kept = signal.getsignal(signal.SIGTERM) == before
    print("ended", kept, signal.getitimer(signal.ITIMER_REAL))
"""


@pytest.mark.parametrize("name", [signal.SIGTERM.name, signal.SIGINT.name])
def test_a_stop_that_was_lost_comes_again_until_it_is_heard(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST, name], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["lost", "again", "ends", "ended True (0.0, 0.0)"]
    assert "Exception ignored" in done.stderr
