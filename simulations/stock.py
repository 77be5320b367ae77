"""Stock Flower on this machine: a SuperLink and SuperNodes as shipped, over TLS with node keys.

Every server listens on 127.0.0.1; processes are ended by the ids they were started with.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bract.shared import keyfiles, node_keys, pki
from bract.shared.errors import BractError
from bract.simulations.federations.loopback import free_port

HOST = "127.0.0.1"
START_SECONDS, STOP_SECONDS = 120.0, 10.0
_POLL_SECONDS = 0.1
_LINK = "stock"


@dataclass(frozen=True, slots=True)
class StockFederation:
    """A SuperLink and its SuperNodes, up and registered.

    Args:
        folder: certificates, keys and logs.
        address: the SuperLink's HOST:PORT.
        environment: what every process of Flower is started with.
        processes: the SuperLink and the SuperNodes by name.
    """

    folder: Path
    address: str
    environment: Mapping[str, str]
    processes: Mapping[str, subprocess.Popen[bytes]]

    def submit(self, bundle: str, run_config: Mapping[str, Any]) -> None:
        """Starts a run of the bundle `federations/NAME` by `flwr run`.

        Raises:
            BractError: where `flwr run` fails.
        """
        # A file: on the command line, values with spaces would be split.
        config = self.folder / "run-config.toml"
        config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in run_config.items()))
        with resources.as_file(
            resources.files("bract.simulations") / "federations" / bundle
        ) as app:
            _flwr(self.environment, "run", str(app), _LINK, "--run-config", str(config))

    def await_file(self, path: Path, *, timeout_seconds: float) -> None:
        """Returns once a run has left a file.

        Raises:
            BractError: where a process ended, or the time is over; names the log to read.
        """
        _await(
            path.exists,
            self.processes,
            self.folder,
            timeout_seconds=timeout_seconds,
            what=path.name,
        )


@contextmanager
def stock_federation(
    folder: Path, node_configs: Sequence[Mapping[str, str | int]]
) -> Iterator[StockFederation]:
    """Yields a federation of one SuperNode for each node configuration, and ends it.

    Nothing of Flower's timing is changed: polls, isolation and state are as shipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, authority = free_port(), folder / "ca.pem"
    _certify(folder)
    address = f"{HOST}:{port}"
    environment = _environment(folder)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    federation = StockFederation(folder, address, environment, processes)
    with ExitStack() as stack:

        def start(name: str, *command: str) -> None:
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            processes[name] = stack.enter_context(_process(command, environment, log))

        tls = [
            f"--ssl-{kind}file={folder / name}.pem"
            for kind, name in (("ca-cert", "ca"), ("cert", "server"), ("key", "server-key"))
        ]
        start(
            "superlink", "flower-superlink", *tls, "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", f"--host={HOST}", f"--port={port}",
        )  # fmt: skip
        _await(lambda: _listens(port), processes, folder, what="the SuperLink")
        _name_link(folder, address, authority)
        for place, config in enumerate(node_configs):
            key = _node_key(folder / f"node-{place}")
            _flwr(environment, "supernode", "register", f"{key}.pub", _LINK)
            start(
                f"supernode-{place}", "flower-supernode", f"--superlink={address}",
                f"--root-certificates={authority}", f"--auth-supernode-private-key={key}",
                f"--node-config={_words(config)}", f"--host={HOST}", f"--port={free_port()}",
            )  # fmt: skip
        yield federation


@contextmanager
def _process(
    command: Sequence[str], environment: Mapping[str, str], log: Any
) -> Iterator[subprocess.Popen[bytes]]:
    program = str(Path(sys.executable).with_name(command[0]))
    process = subprocess.Popen(  # noqa: S603  a program of this environment, no shell
        [program, *command[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )
    try:
        yield process
    finally:
        # What it started watches for its end, and ends too.
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(
    done: Any,
    processes: Mapping[str, subprocess.Popen[bytes]],
    folder: Path,
    *,
    what: str,
    timeout_seconds: float = START_SECONDS,
) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not done():
        for name, process in processes.items():
            if process.poll() is not None:
                raise BractError(f"{name} ended with {process.returncode}: see {folder}/{name}.log")
        if time.monotonic() > deadline:
            raise BractError(f"no {what} in {timeout_seconds:g} s: see the logs in {folder}")
        time.sleep(_POLL_SECONDS)


def _flwr(environment: Mapping[str, str], *arguments: str) -> None:
    program = str(Path(sys.executable).with_name("flwr"))
    done = subprocess.run(  # noqa: S603  a program of this environment, no shell
        [program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).split())
        raise BractError(f"flwr {arguments[0]} ended with {done.returncode}: {words[-300:]}")


def _environment(folder: Path) -> dict[str, str]:
    own = Path(sys.executable).parent
    return {
        **os.environ,
        # Flower starts its children by name.
        "PATH": f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _name_link(folder: Path, address: str, authority: Path) -> None:
    home = folder / "flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f"[superlink.{_LINK}]\naddress = {json.dumps(address)}\n"
        f"root-certificates = {json.dumps(str(authority))}\n"
    )


def _words(config: Mapping[str, str | int]) -> str:
    return " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _node_key(path: Path) -> Path:
    """Returns the file of a new node key, with its public half beside it, in OpenSSH's form."""
    key = node_keys.new()
    public = node_keys.public_line(key.public_key()).encode()
    beside = path.with_name(f"{path.name}.pub")
    keyfiles.create(
        [keyfiles.private(path, node_keys.to_pem(key)), keyfiles.public(beside, public)]
    )
    return path


def _certify(folder: Path) -> None:
    """Writes ca.pem, server.pem and server-key.pem, good for this machine."""
    authority = pki.new_authority()
    server = pki.issue_server(authority, [HOST, "localhost"])
    keyfiles.create(
        [
            keyfiles.public(folder / "ca.pem", authority.certificate_pem()),
            keyfiles.public(folder / "server.pem", server.certificate_pem()),
            keyfiles.private(folder / "server-key.pem", server.key_pem()),
        ]
    )
