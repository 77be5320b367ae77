"""The README's real federation, as a coordinator and a site would type it."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bract.client.settings import SiteSettings
from bract.shared.configuration import parse
from bract.shared.federation import Federation

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README.partition("## Real federation")[2].partition("\n## ")[0]
FEDERATION, SITE = re.findall(r"```toml\n(.*?)```", SECTION, re.S)
TYPED = [line for line in SECTION.splitlines() if line.startswith("bract ")]

Bract = Callable[..., Any]


def typed(start: str) -> list[str]:
    """The words of the one command line that begins so."""
    (line,) = (line for line in TYPED if line.startswith(f"bract {start}"))
    return line.partition("#")[0].split()[1:]


def test_both_files_are_whole() -> None:
    federation = parse(Federation, tomllib.loads(FEDERATION), source="README")
    site = parse(SiteSettings, tomllib.loads(SITE), source="README")
    assert federation.privacy.ceiling == site.domains["digits"].epsilon
    assert federation.privacy.delta == site.domains["digits"].delta
    assert site.site in [entry.name for entry in federation.sites]


def test_the_commands_lead_to_a_contract_that_the_gate_accepts(
    bract: Bract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator, homes = tmp_path / "coordinator", [tmp_path / "north", tmp_path / "south"]
    coordinator.mkdir()
    monkeypatch.chdir(coordinator)
    pinned = tomllib.loads(bract(*typed("keys coordinator")).stdout)["coordinators"]
    assert bract(*typed("keys server")).returncode == 0
    federation = FEDERATION
    for entry, home in zip(tomllib.loads(FEDERATION)["sites"], homes, strict=True):
        home.mkdir()
        monkeypatch.chdir(home)
        command = [home.name if word == "north" else word for word in typed("keys site")]
        (sent,) = tomllib.loads(bract(*command).stdout)["sites"]
        for name in ("key", "node_key"):
            federation = federation.replace(entry[name], sent[name])
        assert {**sent, "node_key": ""} == {**entry, "key": sent["key"], "node_key": ""}
    monkeypatch.chdir(coordinator)
    Path("FEDERATION.toml").write_text(federation)
    assert bract(*typed("contract make")).returncode == 0
    monkeypatch.chdir(homes[0])
    (printed,) = tomllib.loads(SITE)["coordinators"]
    Path("SITE.toml").write_text(SITE.replace(printed, pinned[0]))
    shutil.copy(coordinator / "pki/ca.pem", homes[0])
    shutil.copy(coordinator / "contract.json", homes[0])
    checked = bract(*typed("client SITE.toml --check"), "--json")
    assert checked.returncode == 0, checked.stderr
    report = json.loads(checked.stdout)
    assert (report["accepted"], report["problems"]) == (True, [])
    assert report["epsilon_after"] <= 4.0

    # What the README says of a ceiling without room for the filter.
    Path("tight.toml").write_text(Path("SITE.toml").read_text().replace("= 4.5", "= 4.0"))
    refused = bract("client", "tight.toml", "--check", "contract.json")
    assert refused.returncode == 1
    assert "privacy.ceiling" in refused.stderr
