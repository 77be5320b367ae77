"""Stored updates as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from bract.client.updates import UpdateStore


@pytest.mark.usefixtures("open_to_all")
def test_stored_updates_are_their_sites_alone_whatever_the_umask(tmp_path: Path) -> None:
    UpdateStore(tmp_path / "updates").keep({})
    assert f"{(tmp_path / 'updates').stat().st_mode:o}" == "40700"
    assert [f"{path.stat().st_mode:o}" for path in (tmp_path / "updates").iterdir()] == ["100600"]
