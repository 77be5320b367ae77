"""Real federations with faults: real processes, real signals, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Self

import processes
import pytest
from processes import Forked, reserved_port

from bract.server import checkpoint
from bract.shared import canonical, contract, trained
from bract.shared.privacy import head_file, receipts, verification
from bract.shared.privacy.chain import Chain
from bract.simulations.federations import loopback
from bract.simulations.federations.loopback import Layout, Processes, SitePlan

LAUNCH = Path(__file__).with_name("launch.py")
TRAINING = 1300  # examples of digits that sites share
BUDGET = 40.0
TERMS: dict[str, Any] = {
    "run": "faults",
    "rounds": 3,
    "spare_attempts": 3,
    "minimum_cohort": 2,
    "deadlines": {"sites": 60.0, "round": 60.0, "reply": 45.0, "close": 3.0},
    "model": {"name": "linear"},
    "data": {"name": "digits"},
    "training": {"local_steps": 20, "learning_rate": 1.0},
    "privacy": {
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "batch": 64.0,
        "noise_multiplier": 0.8,
    },
}


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Forks processes whose imports are done, so that a start takes no seconds of each core."""
    return processes.forkserver()


@dataclass(slots=True)
class ForkedProcesses(Processes):
    """A federation's processes, forked, each with the points at which it faults."""

    context: ForkServerContext = field(kw_only=True)
    points: tuple[str, ...] = ()

    def _start(self, name: str, arguments: Sequence[str]) -> Any:
        before = self.running.get(name)
        assert before is None or before.poll() is not None, f"{name} is running already"
        words = [*self.points, "--", *arguments]
        process = self.context.Process(
            target=runpy.run_path,
            args=(str(LAUNCH),),
            kwargs={
                "init_globals": {"REQUEST": (words, self.log_path(name), os.getpid())},
                "run_name": "forked",
            },
            daemon=True,
        )
        process.start()
        self.running[name] = Forked(process)  # type: ignore[assignment]
        return self.running[name]


@pytest.fixture
def forked(forkserver: ForkServerContext) -> Callable[[Layout], Processes]:
    """Starts the processes of a federation without faults."""
    return partial(ForkedProcesses, context=forkserver)


@dataclass(slots=True)
class Federation:
    """One federation of a test: its files, its processes, and what is known of them."""

    layout: Layout
    processes: ForkedProcesses

    def server(self, *points: str) -> Any:
        """Starts the server, which faults at these points, and returns once it serves."""
        lives = self.count("server", event="serving")
        self.processes.points = points
        process = self.processes.start_server("--log-format", "json")
        self.until(lambda: self.count("server", event="serving") > lives, "the server serves")
        return process

    def client(self, name: str, *points: str) -> Any:
        """Starts a site, which faults at these points."""
        self.processes.points = points
        return self.processes.start_client(name, "--log-format", "json")

    def clients(self, *names: str) -> None:
        """Starts sites without a fault; all of them where none is named."""
        for name in names or self.layout.sites:
            self.client(name)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Returns the log lines of a process over all its lives."""
        lines = self.processes.log(name).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def count(self, name: str, **facts: Any) -> int:
        """Returns how many log lines hold these facts."""
        return sum(facts.items() <= event.items() for event in self.events(name))

    def until(self, holds: Callable[[], Any], what: str, *, seconds: float = 60.0) -> None:
        """Returns once a condition holds; one that never comes is named."""
        processes.until(holds, what, seconds=seconds)

    def connected(self, *names: str, times: int = 1) -> None:
        """Returns once the server has let these sites in, over all its lives."""
        for name in names or self.layout.sites:
            self.until(
                lambda name=name: self.count("server", event="connected", site=name) >= times,
                f"{name} connected",
            )

    def rounds(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl."""
        path = self.layout.out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def done(self, *, seconds: float = 90.0) -> Outcome:
        """Returns what a run left once its server has ended well."""
        self.processes.wait_for_server(seconds)
        return outcome(self.layout)

    def ended(self, name: str, code: int, *, seconds: float = 60.0) -> None:
        """Returns once a process has ended with this code."""
        assert self.processes.running[name].wait(timeout=seconds) == code, self.processes.log(name)

    def stopped(self, name: str, *, seconds: float = 60.0) -> None:
        """Returns once a process stands still."""
        pid = self.processes.running[name].pid
        self.until(
            lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T",
            f"{name} stopped",
            seconds=seconds,
        )

    def waits(self, name: str, times: int = 1) -> None:
        """Returns once a process has come to a point at which it waits."""
        self.until(
            lambda: self.processes.log(name).splitlines().count("waiting") >= times,
            f"{name} waits",
        )

    def go(self, name: str) -> None:
        """Lets a process that waits go on."""
        self.processes.log_path(name).with_suffix(".log.go").touch()

    def signal(self, name: str, number: int) -> None:
        """Sends a signal to one process, by its pid."""
        os.kill(self.processes.running[name].pid, number)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run left: the server's word, and the chains of the sites' ledgers."""

    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    chains: dict[str, Chain]
    contract: str
    attempts: int

    def charges(self, site: str) -> dict[int, int]:
        """Returns how often each round was charged at a site."""
        return {number: len(charges) for (_, number), charges in self.chains[site].charges.items()}

    def once(self, rounds: int = 3) -> dict[int, int]:
        """Returns one charge a round: what an undisturbed site pays."""
        return {number: 1 for number in range(1, rounds + 1)}


def outcome(layout: Layout) -> Outcome:
    """Returns what a run left, once everything that must hold after any fault was checked.

    No round is aggregated twice; every ledger is whole against its head file and against what the
    server witnessed; every update that was received stands behind an earlier charge; the summary
    is of the model beside it, and tells no less of ε than the receipts.
    """
    agreed = contract.read(layout.contract).contract
    summary = json.loads((layout.out / "summary.json").read_text())
    metrics = [json.loads(line) for line in (layout.out / "metrics.jsonl").read_text().splitlines()]
    state = checkpoint.load(layout.out / "checkpoint", agreed.sha256)
    assert state is not None
    assert summary["rounds"] == state.round == agreed.rounds
    assert [line["round"] for line in metrics] == list(range(1, agreed.rounds + 1))
    assert [dict(line) for line in state.metrics] == metrics
    assert state.round <= state.attempts <= agreed.max_attempts
    assert 0 < summary["seconds"] == state.seconds < 600
    assert summary["epsilon_run"] >= metrics[-1]["epsilon_run"] > 0
    told = trained.read(layout.out)
    assert told.unproven(told.summary()) == []
    assert not list(layout.out.rglob(".*.tmp"))
    assert not list(layout.root.glob("sites/*/state/updates/.*.tmp"))
    keys = {site.name: site.key for site in agreed.cohort}
    received = receipts.read(layout.out / "receipts.jsonl")
    for line in metrics:
        counted = [r for r in received if r.counted and r.receipt.round == line["round"]]
        assert len(counted) == line["replied"]
    chains = {}
    for site in layout.sites:
        if not layout.ledger(site).exists():
            continue
        anchors = head_file.heads(
            canonical.decode((layout.site(site).parent / "head.json").read_bytes())
        )
        (held,) = verification.verify(
            layout.ledger(site), site_keys=keys, anchors=anchors, received=received
        )
        assert held.anchor is not None
        assert held.chain.head == anchors[site, site], "the head file is the newest head"
        chains[site] = held.chain
        for (_, number), release in held.chain.releases.items():
            (*_, charge) = held.chain.charges[agreed.sha256, number]
            assert charge.sequence < release.sequence
        if site in summary["heads"]:
            seen = head_file.heads(summary)
            verification.verify(layout.ledger(site), site_keys=keys, anchors=seen)
    assert set(summary["heads"]) <= set(chains), "a head of a site that has no ledger"
    for line in metrics:
        released = [c for c in chains.values() if (agreed.sha256, line["round"]) in c.releases]
        assert line["replied"] <= len(released), "an update that no ledger released"
    return Outcome(summary, metrics, chains, agreed.sha256, state.attempts)


@pytest.fixture
def federate(tmp_path: Path, forkserver: ForkServerContext) -> Iterator[Callable[..., Federation]]:
    """Lays out a federation of this test's own; all of its processes end with the test."""
    with contextlib.ExitStack() as stack:

        def made(*sites: str, audited: bool = False, **terms: Any) -> Federation:
            names = sites or ("alpha", "beta")
            port = stack.enter_context(reserved_port())
            audit_port = stack.enter_context(reserved_port()) if audited else None
            layout = loopback.lay_out(
                tmp_path / "federation",
                sites=[
                    SitePlan(
                        name,
                        TRAINING // len(names),
                        "digits",
                        f"{place + 1}/{len(names)}",
                        epsilon=BUDGET,
                    )
                    for place, name in enumerate(names)
                ],
                port=port,
                terms=_merged(TERMS, terms),
                audit_port=audit_port,
            )
            processes = ForkedProcesses(layout, context=forkserver)
            stack.callback(_end, processes)
            return Federation(layout, processes)

        yield made


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, forkserver: ForkServerContext) -> Outcome:
    """What a run of two sites gives where nothing goes wrong."""
    with reserved_port() as port:
        layout = loopback.lay_out(
            tmp_path_factory.mktemp("undisturbed") / "federation",
            sites=[
                SitePlan("alpha", TRAINING // 2, "digits", "1/2", epsilon=BUDGET),
                SitePlan("beta", TRAINING // 2, "digits", "2/2", epsilon=BUDGET),
            ],
            port=port,
            terms=TERMS,
        )
        processes = ForkedProcesses(layout, context=forkserver)
        try:
            federation = Federation(layout, processes)
            federation.server()
            federation.clients()
            return federation.done()
        finally:
            _end(processes)


@pytest.fixture
def link() -> Iterator[Callable[[Federation, str], Link]]:
    """Puts a cable between one site and the server of a federation that is not running yet."""
    with contextlib.ExitStack() as stack:

        def made(federation: Federation, name: str) -> Link:
            cable = stack.enter_context(Link(federation.layout.port))
            site, port = federation.layout.site(name), federation.layout.port
            site.write_text(site.read_text().replace(f":{port}", f":{cable.port}"))
            return cable

        yield made


class Link:
    """A cable between a client and the server that can be cut, mended and cut again."""

    def __init__(self, server_port: int) -> None:
        self._server_port, self._lock = server_port, threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._limit: int | None = None
        self._listener = socket.create_server((loopback.LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        self.is_cut, self.cuts = False, 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        # Closing alone would leave the accepting thread waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def cut_after_upload(self, limit: int) -> None:
        """Cuts once so many more bytes came from the client."""
        with self._lock:
            self._limit = limit

    def cut(self, *, server_notices: bool = True) -> None:
        """Resets every connection, at the server's side only where it shall notice."""
        with self._lock:
            self.is_cut, self.cuts, self._limit = True, self.cuts + 1, None
            for client, server in self._pairs:
                _reset(client)
                if server_notices:
                    _reset(server)
            self._pairs = [] if server_notices else self._pairs

    def mend(self) -> None:
        """Lets connections through again."""
        self.is_cut = False

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.is_cut:
                    raise ConnectionError
                server = socket.create_connection((loopback.LOOPBACK, self._server_port), 10)
                server.settimeout(None)
            except OSError:
                _reset(client)
                continue
            with self._lock:
                self._pairs.append((client, server))
            for ends in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, upload: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16_384):
                if upload and self._limit is not None:
                    self._limit -= len(data)
                    if self._limit < 0:
                        self.cut()
                        return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it
    end.close()


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], None]]:
    """Mounts a file system of a few hundred KiB on a folder, where that is allowed."""
    with contextlib.ExitStack() as stack:

        def mount(folder: Path) -> None:
            folder.mkdir(mode=0o700)
            command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
            if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
                pytest.skip("needs the right to mount a file system")
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)

        yield mount


def _merged(tables: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {
        **tables,
        **{
            name: {**tables[name], **value} if isinstance(value, dict) else value
            for name, value in changes.items()
        },
    }


def _end(processes: Processes) -> None:
    """Ends every process by its pid; one that was stopped cannot be asked."""
    for process in processes.running.values():
        process.kill()
    for process in processes.running.values():
        process.wait(timeout=30)


@pytest.fixture
def fault(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Notes which fault a test makes, for the count at the end of the test run."""
    return lambda name: record_property("fault", name)
