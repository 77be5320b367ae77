"""Lays out a whole federation in a folder, and runs its real processes on this machine.

Keys, certificates and both kinds of TOML file are what a coordinator and sites would make; the
processes are `bract server` and `bract client`, ended by their pid.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import tomli_w

from bract.shared import cli, federation, keyfiles, keys, node_keys, pki
from bract.shared.errors import BractError

LOOPBACK = "127.0.0.1"
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site to lay out: its public terms, its budget, and where its data lie."""

    name: str
    nominal_size: int
    data_name: str
    part: str
    data_folder: str | None = None
    epsilon: float = 8.0
    delta: float = 1e-5


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a federation: one folder for the coordinator, one for each site."""

    root: Path
    sites: tuple[str, ...]
    port: int

    @property
    def federation(self) -> Path:
        """FEDERATION.toml."""
        return self.root / "coordinator" / "FEDERATION.toml"

    @property
    def contract(self) -> Path:
        """The signed contract."""
        return self.root / "coordinator" / "contract.json"

    @property
    def auditor(self) -> Path:
        """The folder of the auditor's certificate, where the federation has one."""
        return self.root / "auditor"

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.root / "coordinator" / "run"

    def site(self, name: str) -> Path:
        """A site's SITE.toml."""
        return self.root / "sites" / name / "SITE.toml"

    def ledger(self, name: str) -> Path:
        """A site's ledger."""
        return self.root / "sites" / name / "state" / "ledger.sqlite"


def lay_out(
    root: Path,
    *,
    sites: Sequence[SitePlan],
    port: int,
    terms: Mapping[str, Any],
    public_data: str | None = None,
    audit_port: int | None = None,
) -> Layout:
    """Returns a federation whose keys, TOML files and signed contract are in a new folder.

    Args:
        root: made here; may hold data, and nothing else.
        sites: who takes part.
        port: of the server on loopback.
        terms: the tables of FEDERATION.toml that say what to train: rounds, model, data,
            training, privacy, deadlines and the like.
        public_data: the folder of the server's public examples.
        audit_port: where the server answers an auditor, who is listed then.
    """
    names = tuple(site.name for site in sites)
    layout = Layout(root=root, sites=names, port=port)
    coordinator = layout.federation.parent
    coordinator.mkdir(parents=True)
    authority, signing, witness = pki.new_authority(), keys.generate(), keys.generate()
    served = pki.issue_server(authority, [LOOPBACK, "localhost"])
    keyfiles.create(
        [
            keyfiles.public(coordinator / "ca.pem", authority.certificate_pem()),
            keyfiles.private(coordinator / "ca-key.pem", authority.key_pem()),
            keyfiles.public(coordinator / "server.pem", served.certificate_pem()),
            keyfiles.private(coordinator / "server-key.pem", served.key_pem()),
            keyfiles.private(coordinator / "coordinator.pem", keys.to_pem(signing)),
            keyfiles.private(coordinator / "witness.pem", keys.to_pem(witness)),
        ]
    )
    entries = []
    for site in sites:
        folder = layout.site(site.name).parent
        folder.mkdir(parents=True, exist_ok=True)  # it may hold the site's data already
        ledger_key, node_key = keys.generate(), node_keys.new()
        keyfiles.create(
            [
                keyfiles.public(folder / "ca.pem", authority.certificate_pem()),
                keyfiles.private(folder / "ledger.pem", keys.to_pem(ledger_key)),
                keyfiles.private(folder / "node-key.pem", node_keys.to_pem(node_key)),
            ]
        )
        layout.site(site.name).write_text(
            tomli_w.dumps(_site_tables(site, signing.public, str(terms["model"]["name"]), port))
        )
        entries.append(
            {
                "name": site.name,
                "key": ledger_key.public,
                "node_key": node_keys.public_line(node_key.public_key()),
                "domain": site.name,
                "nominal_size": site.nominal_size,
            }
        )
    server: dict[str, Any] = {
        "listen": f"{LOOPBACK}:{port}",
        "certificate": "server.pem",
        "key": "server-key.pem",
        "witness_key": "witness.pem",
        "out": "run",
    }
    if public_data is not None:
        server["public_data"] = public_data
    tables = {"coordinator_key": "coordinator.pem", **terms, "server": server, "sites": entries}
    if audit_port is not None:
        tables |= _audited(layout.auditor, authority, audit_port)
    layout.federation.write_text(tomli_w.dumps(tables))
    signed = federation.propose(federation.read(layout.federation))
    layout.contract.write_bytes(signed.to_bytes())
    return layout


def _audited(folder: Path, authority: pki.Identity, port: int) -> dict[str, Any]:
    """Returns the tables of a server that answers an auditor, whose files are made here."""
    identity = pki.issue_auditor(authority, "erin")
    folder.mkdir()
    keyfiles.create(
        [
            keyfiles.public(folder / "ca.pem", authority.certificate_pem()),
            keyfiles.public(folder / "auditor.pem", identity.certificate_pem()),
            keyfiles.private(folder / "auditor-key.pem", identity.key_pem()),
        ]
    )
    listed = {"name": "erin", "certificate_sha256": pki.fingerprint(identity.certificate)}
    return {"audit": {"listen": f"{LOOPBACK}:{port}"}, "auditors": [listed]}


def free_port() -> int:
    """Returns a port that nothing on this machine listens to now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Processes:
    """The running processes of a federation; every one is ended when the block ends.

    Args:
        layout: the federation's files.
        environment: of every process, beside this one's.
        stop_seconds: how long a process may take to stop before it is killed.
    """

    layout: Layout
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_seconds: float = 10.0
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.stop_seconds
        for process in self.running.values():
            try:
                process.wait(timeout=max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_server(self, *options: str) -> subprocess.Popen[bytes]:
        """Returns the server's process, started now."""
        return self._start("server", ["server", str(self.layout.federation), *options])

    def start_client(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """Returns a site's process, started now."""
        return self._start(name, ["client", str(self.layout.site(name)), *options])

    def log(self, name: str) -> str:
        """Returns what a process (or `server`) has written so far, over all its lives."""
        path = self.log_path(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def log_path(self, name: str) -> Path:
        """Returns the file of a process's log."""
        return self.layout.root / f"{name}.log"

    def wait_for_server(self, timeout_seconds: float) -> None:
        """Returns once the server has ended well.

        Raises:
            BractError: where it failed or took too long, with the last line of its log.
        """
        try:
            code = self.running["server"].wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise BractError(f"the server was not done within {timeout_seconds:g} s") from error
        if code != 0:
            last = self.log("server").strip().splitlines()[-1:]
            raise BractError(f"the server ended with {code}: {' '.join(last)}")

    def _start(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        before = self.running.get(name)
        if before is not None and before.poll() is None:
            raise BractError(f"{name} is running already")
        with self.log_path(name).open("ab") as log:
            self.running[name] = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [*cli.PROGRAM, *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT, **self.environment},
            )
        return self.running[name]


def _site_tables(site: SitePlan, coordinator: str, model: str, port: int) -> dict[str, Any]:
    data = {"name": site.data_name, "part": site.part}
    if site.data_folder is not None:
        data["folder"] = site.data_folder
    return {
        "site": site.name,
        "server": f"{LOOPBACK}:{port}",
        "state": "state",
        "head_file": "head.json",
        "device": "cpu",
        "coordinators": [coordinator],
        "models": [model],
        "keys": {
            "root_certificate": "ca.pem",
            "node": "node-key.pem",
            "ledger": "ledger.pem",
        },
        "domains": {site.name: {"epsilon": site.epsilon, "delta": site.delta, "data": data}},
    }
