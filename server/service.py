"""A coordinator's process: Flower's SuperLink hosted here, and the round loop beside it."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from bract.server import auditing, checkpoint, memory, stopping
from bract.server.app import app
from bract.server.checkpoint import RoundState
from bract.server.flower.grid import FleetGrid
from bract.server.flower.host import Host, Listener, usable
from bract.shared import canonical, contract, federation, keyfiles, keys, locks, pki, tracking
from bract.shared.contract import Contract
from bract.shared.errors import BractError, UsageError, VerificationFailed
from bract.shared.federation import Federation
from bract.shared.policy import check_delta
from bract.shared.privacy import accounting, entries
from bract.shared.reports.runs import GUARANTEE_PRIVATE, ServerSummary, facts_of
from bract.shared.reports.services import ServerStatus

logger = logging.getLogger("bract.server")

DATABASE = "superlink.sqlite"
LOCK = ".lock"  # in out; apart from the state's, where one folder is both
STATUS_SECONDS = 1.0
PAUSE_SECONDS = 60.0  # at most, before sites that refused for what may pass are asked again


def serve(path: Path, trackers: Sequence[str] = ()) -> ServerSummary:
    """Runs a federation file's contract to its end and returns what the server knows of it.

    Started again after a kill, it goes on from the last whole round. `trackers` follow the run
    (`tracking.TRACKERS`).

    Raises:
        UsageError: where contract and federation file do not fit together.
        BractError: where another process serves it or writes its out, the port cannot be had, or
            too few sites come.
    """
    tracking.check(trackers)
    chosen = federation.read(path)
    agreed = read_contract(chosen)
    listener = _listener(chosen)
    out, state = Path(chosen.server.out), Path(chosen.server.state)
    for name, folder, mode in (("state", state, 0o700), ("out", out, 0o777)):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=mode)
        except OSError as error:
            raise UsageError(
                f"cannot make the folder {folder}: {error.strerror}; correct server.{name}"
            ) from error
    door = auditing.door_of(chosen)
    with (
        locks.held(state / "lock", "one server carries a run; stop the other"),
        # Another federation file may name another state, and the same folder for its run.
        locks.held(out / LOCK, "one server writes it; stop the other or correct server.out"),
    ):
        for folder in (state, out, out / "checkpoint"):
            canonical.remove_leftovers(folder)
        # Before anything in it is replaced: an out of another run is not this one's.
        checkpoint.load(out / "checkpoint", agreed.sha256)
        canonical.write_atomically(out / "contract.json", Path(chosen.contract).read_bytes())
        with tracking.following(out, trackers), usable(state / DATABASE):
            return _serve(chosen, agreed, listener, door)


def _serve(
    chosen: Federation, agreed: Contract, listener: Listener, door: auditing.Door | None
) -> ServerSummary:
    out, state = Path(chosen.server.out), Path(chosen.server.state)
    host = Host(
        database=state / DATABASE,
        sites={site.name: site.node_key for site in chosen.sites},
        listener=listener,
        greatest_reply=chosen.server.greatest_reply_mib * 2**20,
    )
    host.start()
    memory.settle()
    logger.info("serving", extra={"event": "serving", "port": host.port})
    journal = Journal(host, state / "status.json", agreed)
    journal.start()
    desk = None
    try:
        if door is not None:
            desk = auditing.begun(chosen, agreed, door)
        grid = FleetGrid(host, reply_seconds=chosen.deadlines.reply)
        app(grid, _context(chosen, host.run))
    finally:
        stopping.heard()
        if desk is not None:
            desk.stop()
        journal.stop()
        host.close()
    result: dict[str, Any] = canonical.decode((out / "checkpoint" / "result.json").read_bytes())
    summary = _summary(chosen, agreed, result)
    canonical.write_atomically(
        out / "summary.json", canonical.encode(summary.model_dump(mode="json"))
    )
    return summary


def status(path: Path) -> ServerStatus:
    """Returns who is connected and how far the run is, from the files and /health."""
    chosen = federation.read(path)
    agreed = read_contract(chosen)
    file = Path(chosen.server.state) / "status.json"
    said = canonical.decode(file.read_bytes()) if file.exists() else {}
    state = checkpoint.load(Path(chosen.server.out) / "checkpoint", agreed.sha256)
    healthy = said.get("port") is not None and _is_healthy(chosen, said["port"])
    return ServerStatus(
        run=agreed.run,
        doing=said.get("doing", "never started") if healthy else "not running",
        healthy=healthy,
        connected=said.get("connected", []) if healthy else [],
        round=state.round if state else 0,
        rounds=agreed.rounds,
        attempts=state.attempts if state else 0,
        epsilon_run=_epsilon(chosen, agreed, state) if state else 0.0,
        written=said.get("written"),
    )


def read_contract(chosen: Federation) -> Contract:
    """Returns the contract that a federation file names, checked against the file.

    Raises:
        UsageError: where it is missing, or one of them was changed since.
    """
    path = Path(chosen.contract)
    if not path.exists():
        raise UsageError(
            f"no contract at {path}: propose one with bract contract make FEDERATION.toml -o {path}"
        )
    signed = contract.read(path)
    try:
        agreed = signed.verify(signed.contract.coordinator)
    except VerificationFailed as error:
        raise VerificationFailed(f"{path}: {error}: put back what was signed") from error
    coordinator = Path(chosen.coordinator_key)
    # The key may be kept elsewhere: sites pin it, and check the signature for themselves.
    if coordinator.exists() and keys.load(coordinator).public != agreed.coordinator:
        raise UsageError(f"{path} was signed by another key than coordinator_key: make it anew")
    listed = {(s.name, s.key, s.domain, s.nominal_size) for s in chosen.sites}
    signed_for = {(s.name, s.key, s.domain, s.nominal_size) for s in agreed.cohort}
    if listed != signed_for:
        raise UsageError(
            f"{path} was signed for other sites than the federation file lists: make it anew"
        )
    if agreed.witness != keys.load(Path(chosen.server.witness_key)).public:
        raise UsageError(f"{path} names another witness than server.witness_key: make it anew")
    check_delta(chosen.privacy.delta, max(site.nominal_size for site in agreed.cohort))
    name = _departure(chosen, agreed)
    if name is not None:
        raise UsageError(
            f"{path} was signed for another {name} than the federation file says: put it back, or "
            "make the contract anew"
        )
    return agreed


def _departure(chosen: Federation, agreed: Contract) -> str | None:
    """Returns the first key of a federation file that a contract was not signed for, or None."""
    privacy, held = agreed.privacy, agreed.data
    folder = federation.public_folder(chosen)
    settled = {"offset": held.offset, "scale": held.scale, "public": held.public}
    found = {} if chosen.model.frozen else {"frozen": agreed.model.frozen}
    both: dict[str, tuple[Any, Any]] = {
        "run": (chosen.run, agreed.run),
        "rounds": (chosen.rounds, agreed.rounds),
        "spare_attempts": (chosen.spare_attempts, agreed.max_attempts - agreed.rounds),
        "model": (chosen.model.model_copy(update=found), agreed.model),
        "training": (chosen.training, agreed.training),
        "evaluation": (chosen.evaluation or "none", agreed.evaluation or "none"),
        "data.name": (chosen.data.name, agreed.data.name),
        "data.offset": (chosen.data.offset, agreed.data.offset),
        "data.scale": (chosen.data.scale, agreed.data.scale),
        "data": (chosen.data.terms(folder).model_copy(update=settled), held),
        "privacy.clip_norm": (chosen.privacy.clip_norm, privacy.clip_norm),
        "privacy.batch": (federation.sampling_rate(chosen), privacy.sampling_rate),
        "privacy.noise_multiplier": (chosen.privacy.noise_multiplier, privacy.noise_multiplier),
    }
    # What the file leaves open was settled when the contract was made.
    return next((name for name, (one, other) in both.items() if one not in (None, other)), None)


class Journal:
    """Writes what the process is doing to a file, for `--status`."""

    def __init__(self, host: Host, path: Path, agreed: Contract) -> None:
        self._host, self._path, self._agreed = host, path, agreed
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def stop(self) -> None:
        """Writes the last word."""
        self._stopped.set()
        self._thread.join(timeout=5)
        self._write("stopped")

    def _run(self) -> None:
        while not self._stopped.wait(STATUS_SECONDS):
            try:
                self._write("serving")
            except BractError as error:  # who is connected; the main thread meets it, and decides
                logger.warning("cannot write the status file: %s", error)

    def _write(self, doing: str) -> None:
        facts = {
            "doing": doing,
            "pid": os.getpid(),
            "port": self._host.port if doing == "serving" else None,
            "connected": self._host.connected() if doing == "serving" else [],
            "contract": self._agreed.sha256,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            canonical.write_atomically(self._path, canonical.encode(facts))
        except OSError as error:
            logger.warning("cannot write the status file: %s", error.strerror)


def _summary(chosen: Federation, agreed: Contract, result: dict[str, Any]) -> ServerSummary:
    charges, delta = result.pop("charges"), chosen.privacy.delta
    spent = entries.events_of_attempts(agreed, attempts=charges, completed=result["rounds"])
    rows = agreed.data.rows_per_person
    person = accounting.epsilon_of_person(spent, delta, rows) if rows else None
    replaced = accounting.epsilon_replace_one(spent, delta) if rows else None
    return ServerSummary(
        **facts_of(agreed),
        epsilon_run=accounting.epsilon(spent, delta),
        epsilon_person=canonical.finite(person),
        rows_kept=rows,
        epsilon_replaced=canonical.finite(replaced),
        delta=delta,
        guarantee=GUARANTEE_PRIVATE,
        out=chosen.server.out,
        **result,
    )


def _epsilon(chosen: Federation, agreed: Contract, state: RoundState) -> float:
    spent = entries.events_of_attempts(agreed, attempts=state.charges, completed=state.round)
    return accounting.epsilon(spent, chosen.privacy.delta)


def _is_healthy(chosen: Federation, port: int) -> bool:
    """Returns whether the port answers with this federation's own certificate."""
    host = "127.0.0.1" if chosen.server.host in ("0.0.0.0", "::") else chosen.server.host  # noqa: S104  a comparison
    try:
        pinned = ssl.create_default_context(cafile=chosen.server.certificate)
        pinned.check_hostname = False  # asked at a local address, which need not be a name in it
        pinned.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),  # the port is this machine's own: no proxy knows it
            urllib.request.HTTPSHandler(context=pinned),
        )
        with opener.open(f"https://{host}:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _listener(chosen: Federation) -> Listener:
    for name in ("certificate", "key"):
        path = Path(getattr(chosen.server, name))
        if not path.is_file():
            raise UsageError(f"no server.{name} at {path}: make it with bract keys server")
    try:
        _fits(chosen)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(
            f"server.key {chosen.server.key} does not fit server.certificate "
            f"{chosen.server.certificate}, or one of them cannot be read: name the two that bract "
            "keys server made together"
        ) from error
    until = pki.certificates(Path(chosen.server.certificate))[0].not_valid_after_utc
    if until < datetime.now(UTC):
        raise UsageError(
            f"server.certificate {chosen.server.certificate} expired at {until:%Y-%m-%d %H:%M}: no "
            "site will connect; make another with bract keys server"
        )
    keyfiles.warn_if_open(Path(chosen.server.key))
    return Listener(
        host=chosen.server.host,
        port=chosen.server.port,
        certificate=Path(chosen.server.certificate),
        key=Path(chosen.server.key),
    )


def _fits(chosen: Federation) -> None:
    # A password would be asked for on a terminal that nobody watches.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chosen.server.certificate, chosen.server.key, password="")


def _context(chosen: Federation, run: int) -> Context:
    return Context(
        run_id=run,
        node_id=1,
        node_config={},
        state=RecordDict(),
        run_config={
            "contract": str(Path(chosen.server.out) / "contract.json"),
            "out": chosen.server.out,
            "data-folder": str(federation.public_folder(chosen) or ""),
            "delta": chosen.privacy.delta,
            "init-seed": chosen.init_seed,
            "wait-seconds": chosen.deadlines.gather,
            "minimum-cohort": chosen.minimum_cohort,
            "sites-seconds": chosen.deadlines.sites,
            "pause-seconds": min(chosen.deadlines.sites, PAUSE_SECONDS),
            "round-seconds": chosen.deadlines.round,
            "close-seconds": chosen.deadlines.close,
            "witness-key": chosen.server.witness_key,
            "head-file": str(Path(chosen.server.state) / "heads.json"),
        },
    )
