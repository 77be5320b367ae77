"""The link state's file: whole from the start, and made anew where it does not open."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bract.server.flower.host import _link_state
from bract.shared.errors import BractError

# Flower's migrations, as Alembic sees them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BEGUN = """
import sys
from pathlib import Path
from bract.server.flower import host
print("ready", flush=True)
host._link_state(Path(sys.argv[1]))
"""


def test_a_start_that_is_killed_leaves_a_file_that_opens(tmp_path: Path) -> None:
    path, dice = tmp_path / "superlink.sqlite", random.Random()
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", BEGUN, str(path)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(dice.uniform(0.05, 0.6))
            process.kill()
    _, state = _link_state(path)
    assert state.get_nodes(1) == set()


def test_a_file_that_does_not_open_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "superlink.sqlite"
    path.write_bytes(b"x" * 5000)
    with caplog.at_level(logging.WARNING, "bract.server"):
        for _ in range(2):
            _, state = _link_state(path)
            assert state.get_nodes(1) == set()
    assert [r.message for r in caplog.records if r.name == "bract.server"] == [
        "superlink.sqlite does not open (DatabaseError): made anew"
    ]
    assert all(file.name.startswith("superlink.sqlite") for file in tmp_path.iterdir())


def test_where_none_can_be_made_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "superlink.sqlite"
    with pytest.raises(BractError, match=f"cannot make {path}: free some space"):
        _link_state(path)
