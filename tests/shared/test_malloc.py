"""Memory that was freed stays with a process, or goes back, as the process was told."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from bract.shared import malloc

MIB = 1 << 20
PROGRAM = """
import resource
import sys
from pathlib import Path
import numpy as np
from bract.shared import malloc

def resident():
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])

exec(sys.argv[1])
before = resident()
block = np.ones(5 << 20)  # 40 MiB
del block
print(resident() - before)
if len(sys.argv) > 2:
    exec(sys.argv[2])
    print(resident() - before)
"""


KEEPS = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.libc_ver()[1] < "2.35",
    reason="an allocator that does not keep so large a block",
)


@KEEPS
@pytest.mark.parametrize(
    ("told", "kept"),
    [("malloc.keep_freed()", True), ("malloc.give_back(from_bytes=4 << 20, arenas=1)", False)],
)
def test_a_freed_block_stays_or_goes_back(told: str, kept: bool) -> None:
    command = [sys.executable, "-c", PROGRAM, told]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (int(done.stdout) > 30 * MIB) == kept


@KEEPS
def test_what_was_kept_within_a_block_goes_back_at_its_end() -> None:
    told = ("kept = malloc.kept(); kept.__enter__()", "kept.__exit__(None, None, None)")
    command = [sys.executable, "-c", PROGRAM, *told]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    within, after = map(int, done.stdout.split())
    assert within > 30 * MIB
    assert after < 10 * MIB


@pytest.mark.parametrize("older", [False, True])
def test_an_older_allocator_gets_the_most_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    asked: list[tuple[int, int]] = []

    def take(option: int, value: int) -> bool:
        asked.append((option, value))
        return not (older and value > 32 * MIB)

    monkeypatch.setattr(malloc, "_set", take)
    malloc.keep_freed()
    thresholds = [value for option, value in asked if option == malloc._MMAP_THRESHOLD]
    assert thresholds[-1] == (32 * MIB if older else 1 << 30)
