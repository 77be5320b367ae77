"""What docs/deployment promises of its units and its image, as far as it can be checked here."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bract.client.settings import SiteSettings

DEPLOYMENT = Path(__file__).parent.parent / "docs/deployment"
UNITS = ("bract-server.service", "bract-client.service")
NEWER = ("RestartSteps", "RestartMaxDelaySec")  # unknown to systemd before 254


def service(unit: str) -> dict[str, str]:
    """The [Service] section; of a key that is given twice, the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[method-assign,assignment]  # as configparser documents it
    parser.read(DEPLOYMENT / unit)
    return dict(parser["Service"])


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_the_unit(unit: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    text = (DEPLOYMENT / unit).read_text()
    (tmp_path / unit).write_text(text.replace("/opt/bract/bin/bract", sys.executable))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    faults = [line for line in done.stderr.splitlines() if not any(new in line for new in NEWER)]
    assert (done.returncode, faults) == (0, [])


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_is_confined_and_may_finish_its_round(unit: str) -> None:
    settings = service(unit)
    assert settings["User"] == "bract"
    assert settings["ProtectSystem"] == "strict"
    assert settings["NoNewPrivileges"] == settings["PrivateTmp"] == "yes"
    assert settings["RestrictAddressFamilies"] == "AF_INET AF_INET6 AF_UNIX"
    assert settings["SystemCallFilter"] == "~@privileged"
    assert settings["Restart"] == "on-failure"
    assert settings["KillSignal"] == "SIGTERM"
    patience = SiteSettings.model_fields["stop_seconds"].default
    assert int(settings["TimeoutStopSec"]) > patience


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_starts_a_command_that_exists(unit: str) -> None:
    from click import Context

    from bract.shared.cli import bract

    program, command, path, *options = service(unit)["ExecStart"].split()
    assert Path(program).name == "bract"
    found = bract.get_command(Context(bract), command)
    assert found is not None
    found.make_context(command, [path, *options])


def test_the_image_runs_as_no_root_and_copies_nothing_secret() -> None:
    lines = (DEPLOYMENT / "Containerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001"]
    copied = {
        name
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert copied == {
        *("constraints.txt", "pyproject.toml", "README.md", "LICENSE"),
        *("server", "client", "shared", "simulations"),
    }
    assert all((DEPLOYMENT.parent.parent / name).exists() for name in copied)
