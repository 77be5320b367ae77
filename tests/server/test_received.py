"""receipts.jsonl as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from bract.server import received
from bract.shared import canonical


@pytest.mark.usefixtures("open_to_all")
def test_receipts_have_the_rights_of_their_neighbours_whatever_the_umask(tmp_path: Path) -> None:
    received.append(tmp_path, [])
    canonical.write_atomically(tmp_path / "summary.json", b"{}")
    rights = {path.name: f"{path.stat().st_mode:o}" for path in tmp_path.iterdir()}
    assert rights == {received.NAME: "100644", "summary.json": "100644"}
