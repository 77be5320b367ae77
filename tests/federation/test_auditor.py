"""An auditor asks a running server, over real sockets, and so does everyone who may not."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bract.shared import keyfiles, pki

WAIT_BEFORE_ROUND = "wait before bract.server.strategy:PublicFedAvg.configure_train"
Bract = Callable[..., Any]


def pull(bract: Bract, federation: Any, folder: Path, *more: str, **files: Path) -> Any:
    own = federation.layout.auditor
    cert, key = files.get("cert", own / "auditor.pem"), files.get("key", own / "auditor-key.pem")
    return bract(
        "audit",
        "pull",
        f"127.0.0.1:{audit_port(federation)}",
        *("--cert", str(cert), "--key", str(key)),
        *("--root-certificates", str(own / "ca.pem"), "-o", str(folder), *more),
    )


def audit_port(federation: Any) -> int:
    (*_, event) = [e for e in federation.events("server") if e.get("event") == "auditing"]
    return int(event["port"])


def test_an_auditor_pulls_from_a_running_server_and_from_one_that_was_killed(
    federate: Callable[..., Any], bract: Bract, tmp_path: Path, fault: Callable[[str], None]
) -> None:
    fault("server killed between two pulls of an auditor")
    federation = federate(audited=True)
    layout, folder = federation.layout, tmp_path / "pulled"
    federation.server(f"{WAIT_BEFORE_ROUND} 1", f"{WAIT_BEFORE_ROUND} 2", f"{WAIT_BEFORE_ROUND} 3")
    federation.until(lambda: federation.count("server", event="auditing"), "auditors are answered")
    federation.clients()
    federation.connected()
    federation.waits("server")

    # Before the first round nothing is witnessed yet.
    early = pull(bract, federation, tmp_path / "early", "--json")
    assert early.returncode == 0, early.stderr
    assert json.loads(early.stdout)["sites"] == []

    federation.go("server")
    federation.waits("server", 2)
    first = pull(bract, federation, folder, "--json")
    assert first.returncode == 0, first.stderr
    told = {site["site"]: site for site in json.loads(first.stdout)["sites"]}
    assert set(told) == {"alpha", "beta"}
    assert [(s["updates"], s["entries"], s["shown"]) for s in told.values()] == [(1, 3, 2)] * 2

    # A listed certificate is what is asked for, not one that the authority issued.
    stranger = _stranger(layout, tmp_path)
    refused = pull(bract, federation, tmp_path / "no", **stranger)
    assert refused.returncode == 1
    assert "is no listed auditor's" in refused.stderr
    site = layout.site("alpha").parent
    wrong = pull(
        bract, federation, tmp_path / "no", cert=site / "ca.pem", key=site / "node-key.pem"
    )
    assert (wrong.returncode, "is no auditor's certificate" in wrong.stderr) == (2, True)
    assert not (tmp_path / "no").exists()

    # What was pulled is held against a ledger that its site exported, with no secret at hand.
    federation.go("server")
    federation.waits("server", 3)
    exported = tmp_path / "alpha.jsonl"
    assert (
        bract("audit", "export", str(layout.ledger("alpha")), "-o", str(exported)).returncode == 0
    )
    held = ("--contract", str(folder / "contract.json"), "--head", str(folder / "witnesses.json"))
    received = ("--received", str(folder / "receipts.jsonl"))
    checked = bract("audit", "verify", str(exported), *held, *received)
    assert checked.returncode == 0, checked.stderr
    assert "anchored" in checked.stdout
    assert "1 updates received, each behind its charge" in checked.stdout

    federation.signal("server", signal.SIGKILL)
    federation.ended("server", -signal.SIGKILL)
    federation.server(f"{WAIT_BEFORE_ROUND} 1")
    federation.waits("server", 4)
    again = pull(bract, federation, folder, "--json", "--coordinator", _coordinator(layout))
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["pinned"]
    assert [(s["updates"], s["extends"]) for s in report["sites"]] == [(2, True)] * 2
    federation.go("server")
    outcome = federation.done()
    assert outcome.summary["rounds"] == 3


def _stranger(layout: Any, folder: Path) -> dict[str, Path]:
    """Returns the files of an auditor whom the authority knows and the federation does not list."""
    home = layout.federation.parent
    authority = pki.load_authority(home / "ca.pem", home / "ca-key.pem")
    identity = pki.issue_auditor(authority, "mallory")
    files = {"cert": folder / "mallory.pem", "key": folder / "mallory-key.pem"}
    keyfiles.create(
        [
            keyfiles.public(files["cert"], identity.certificate_pem()),
            keyfiles.private(files["key"], identity.key_pem()),
        ]
    )
    return files


def _coordinator(layout: Any) -> str:
    key: str = json.loads(layout.contract.read_bytes())["contract"]["coordinator"]
    return key
