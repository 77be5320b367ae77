"""`bract server`: what does not fit together is one line before anything is served."""

from __future__ import annotations

import fcntl
import json
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bract.server import checkpoint, service
from bract.server.flower.host import Host, Listener
from bract.shared import canonical, federation, keys, locks, logs, pki
from bract.shared import contract as contracts
from bract.shared.contract import Contract
from bract.shared.errors import BractError, UsageError, VerificationFailed
from bract.shared.reports import schema
from bract.simulations.federations.loopback import Layout

Bract = Callable[..., Any]


@pytest.fixture(autouse=True)
def _keep_the_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "begin", lambda form: None)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def replaced(layout: Layout, old: str, new: str) -> None:
    text = layout.federation.read_text()
    assert text.count(old) == 1, old
    layout.federation.write_text(text.replace(old, new))


def signed_anew(layout: Layout, **changes: Any) -> None:
    """Puts another contract of the same coordinator in the place of the federation's."""
    agreed = contracts.read(layout.contract).contract
    made = Contract.model_validate({**agreed.model_dump(), **changes})
    key = keys.load(layout.federation.parent / "coordinator.pem")
    layout.contract.write_bytes(contracts.sign(made, key).to_bytes())


# Contract and federation file


def test_a_contract_that_fits_its_file_is_read(layout: Layout) -> None:
    chosen = federation.read(layout.federation)
    assert service.read_contract(chosen) == contracts.read(layout.contract).contract
    (layout.federation.parent / "coordinator.pem").unlink()  # kept elsewhere
    assert service.read_contract(chosen).run == "trial"


CHANGED = {
    "run": ('run = "trial"', 'run = "another"', "another run than"),
    "rounds": ("rounds = 3", "rounds = 4", "another rounds than"),
    "spare attempts": ("rounds = 3", "rounds = 3\nspare_attempts = 9", "another spare_attempts"),
    "model": ('name = "linear"', 'name = "cnn"', "another model than"),
    "learning rate": ("learning_rate = 0.5", "learning_rate = 0.25", "another training than"),
    "clip norm": ("clip_norm = 1.0", "clip_norm = 2.0", "another privacy.clip_norm than"),
    "batch": ("batch = 10.0", "batch = 20.0", "another privacy.batch than"),
    "sigma": ("batch = 10.0", "batch = 10.0\nnoise_multiplier = 1.0", "noise_multiplier than"),
    "scale": ('name = "digits"', 'name = "digits"\nscale = 2.0', "another data.scale than"),
    "evaluation": (
        "[training]",
        "[evaluation]\nevery = 1\nnoise_multiplier = 5.0\n[training]",
        "another evaluation than",
    ),
    "site": ('domain = "alpha"', 'domain = "ward"', "signed for other sites"),
    "size": ("nominal_size = 100", "nominal_size = 90", "signed for other sites"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_file_that_was_changed_since_its_contract_was_signed_is_refused(
    layout: Layout, what: str
) -> None:
    old, new, said = CHANGED[what]
    replaced(layout, old, new)
    with pytest.raises(UsageError, match=said):
        service.read_contract(federation.read(layout.federation))


def test_what_the_contract_does_not_say_may_change(layout: Layout) -> None:
    replaced(layout, "rounds = 3", "rounds = 3\ninit_seed = 4\nminimum_cohort = 1")
    replaced(layout, "epsilon = 2.0", "epsilon = 1.0")
    assert service.read_contract(federation.read(layout.federation))


def test_a_contract_of_another_key_witness_or_hand_is_refused(layout: Layout) -> None:
    chosen = federation.read(layout.federation)
    original = layout.contract.read_bytes()
    signed_anew(layout, witness=keys.generate().public)
    with pytest.raises(UsageError, match="names another witness"):
        service.read_contract(chosen)
    stranger = keys.generate()
    agreed = contracts.from_bytes(original).contract
    made = agreed.model_copy(update={"coordinator": stranger.public})
    layout.contract.write_bytes(contracts.sign(made, stranger).to_bytes())
    with pytest.raises(UsageError, match="signed by another key than coordinator_key"):
        service.read_contract(chosen)
    value = json.loads(original)
    value["contract"]["rounds"] = 4
    layout.contract.write_bytes(canonical.encode(value))
    with pytest.raises(VerificationFailed, match="signature"):
        service.read_contract(chosen)
    layout.contract.unlink()
    with pytest.raises(UsageError, match="propose one with bract contract make"):
        service.read_contract(chosen)


# The command, where it cannot serve


def other_key(layout: Layout) -> None:
    folder = layout.federation.parent
    served = pki.issue_server(pki.new_authority(), ["127.0.0.1"])
    (folder / "server-key.pem").write_bytes(served.key_pem())


def expired(layout: Layout) -> None:
    folder, then = layout.federation.parent, datetime.now(UTC) - timedelta(days=40)
    authority = pki.new_authority(now=then)
    served = pki.issue_server(authority, ["127.0.0.1"], days=30, now=then)
    (folder / "server-key.pem").write_bytes(served.key_pem())
    (folder / "server.pem").write_bytes(served.certificate_pem())


def another_delta(layout: Layout) -> None:
    text = layout.federation.read_text()
    assert text.count("delta = 1e-05") == 1
    layout.federation.write_text(text.replace("delta = 1e-05", "delta = 0.5"))


def another_run(layout: Layout) -> None:
    out = layout.federation.parent / "run"
    (out / "checkpoint").mkdir(parents=True)
    state = checkpoint.RoundState(contract="0" * 64, weights={}, velocity={})
    checkpoint.save(state, out / "checkpoint")
    (out / "contract.json").write_text("of another run")


def no_text(layout: Layout) -> None:
    (layout.federation.parent / "server.pem").write_bytes(b"\x00\xff")


def without(name: str) -> Callable[[Layout], None]:
    return lambda layout: (layout.federation.parent / name).unlink()


def a_file_for_a_folder(name: str) -> Callable[[Layout], None]:
    return lambda layout: (layout.federation.parent / name).write_text("in the way") and None


BAD: dict[str, tuple[Callable[[Layout], Any], str]] = {
    "no federation": (without("FEDERATION.toml"), "cannot read"),
    "no contract": (without("contract.json"), "no contract at"),
    "no certificate": (without("server.pem"), "no server.certificate at"),
    "no key": (without("server-key.pem"), "no server.key at"),
    "no witness": (without("witness.pem"), "no key at"),
    "a key of another certificate": (other_key, "does not fit server.certificate"),
    "a certificate that is over": (expired, "no site will connect; make another with bract keys"),
    "a delta over one over the sites' sizes": (another_delta, "delta 0.5 must be"),
    "no certificate in the file": (no_text, "does not fit server.certificate"),
    "a file for the state": (a_file_for_a_folder("state"), "correct server.state"),
    "a file for the run": (a_file_for_a_folder("run"), "correct server.out"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_served_is_one_line_and_bad_usage(
    layout: Layout, bract: Bract, case: str
) -> None:
    spoil, said = BAD[case]
    spoil(layout)
    done = bract("server", str(layout.federation), "--json")
    assert done.returncode == 2
    value = json.loads(done.stdout)
    jsonschema.validate(value, schema("error"))
    assert said in value["error"]["message"]
    assert done.stdout.count("\n") == done.stderr.count("\n") == 1
    assert "unexpected" not in done.stderr


def test_a_run_folder_of_another_run_is_left_as_it_is(layout: Layout, bract: Bract) -> None:
    another_run(layout)
    done = bract("server", str(layout.federation))
    assert done.returncode == 1
    assert "the checkpoint of another contract: name another folder as out" in done.stderr
    held = layout.federation.parent / "run/contract.json"
    assert held.read_text() == "of another run"


def test_a_key_behind_a_password_is_bad_usage_and_asks_nobody(layout: Layout, bract: Bract) -> None:
    from cryptography.hazmat.primitives import serialization

    path = layout.federation.parent / "server-key.pem"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    done = bract("server", str(layout.federation))
    assert (done.returncode, "does not fit" in done.stderr) == (2, True)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flower's own state
def test_a_port_that_is_taken_is_one_line(layout: Layout, bract: Bract, taken: int) -> None:
    replaced(layout, f"127.0.0.1:{layout.port}", f"127.0.0.1:{taken}")
    done = bract("server", str(layout.federation), "--json")
    assert done.returncode == 1
    message = json.loads(done.stdout)["error"]["message"]
    assert message == (
        f"cannot serve on 127.0.0.1:{taken}: the port is taken; correct server.listen"
    )
    assert done.stderr.endswith(f"bract: {message}\n")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flower's own state
def test_an_address_of_another_machine_is_one_line(layout: Layout, bract: Bract) -> None:
    replaced(layout, f"127.0.0.1:{layout.port}", "192.0.2.1:8443")
    done = bract("server", str(layout.federation))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("bract: cannot serve on 192.0.2.1:8443: ")
    assert last.endswith("; correct server.listen")
    assert "taken" not in last
    assert "certificate" not in last


@pytest.mark.parametrize(
    ("lock", "said"),
    [
        ("state/lock", "/state: one server carries a run; stop the other"),
        ("run/.lock", "/run: one server writes it; stop the other or correct server.out"),
    ],
    ids=["of one state", "of one out"],
)
def test_a_second_server_leaves_the_run_of_the_first_alone(
    layout: Layout, bract: Bract, monkeypatch: pytest.MonkeyPatch, lock: str, said: str
) -> None:
    monkeypatch.setattr("bract.shared.locks.LOCK_SECONDS", 0.1)
    folder = layout.federation.parent
    for name in ("state", "run"):
        (folder / name).mkdir()
    (folder / "state" / "lock").touch()
    monkeypatch.setattr(Host, "__init__", None)  # it would end the run that it finds
    with (folder / lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = contents(layout.root)
        done = bract("server", str(layout.federation))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.endswith(f"{said}\n")
        assert contents(layout.root) == before
        assert bract("server", str(layout.federation), "--status").returncode == 0


def test_a_server_holds_state_and_out_and_lets_go_of_them_when_it_ends(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = layout.federation.parent
    places = [folder / "state" / "lock", folder / "run" / ".lock"]

    def fail(*_: Any) -> None:
        assert all(map(locks.is_held, places))
        raise BractError("it ended")

    monkeypatch.setattr(service, "_serve", fail)
    for _ in range(2):
        with pytest.raises(BractError, match="it ended"):
            service.serve(layout.federation)
        assert not any(map(locks.is_held, places))


# What is said of a run


@pytest.fixture
def free() -> int:
    """A port that nobody serves any more."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_the_status_of_a_run_that_was_never_started_is_that(layout: Layout, bract: Bract) -> None:
    before = contents(layout.root)
    done = bract("server", str(layout.federation), "--status", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    jsonschema.validate(value, schema("server-status"))
    assert value == {
        "run": "trial", "doing": "not running", "healthy": False, "connected": [], "round": 0,
        "rounds": 3, "attempts": 0, "epsilon_run": 0.0, "written": None,
    }  # fmt: skip
    assert contents(layout.root) == before
    text = bract("server", str(layout.federation), "--status")
    assert "trial: not running, healthy False, round 0 of 3, connected none" in text.stdout


@pytest.mark.parametrize("certificate", ["there", "gone", "no certificate"])
def test_the_status_of_a_server_that_was_killed_is_not_what_it_last_said(
    layout: Layout, free: int, certificate: str
) -> None:
    state = layout.federation.parent / "state"
    state.mkdir()
    path = layout.federation.parent / "server.pem"
    if certificate == "gone":
        path.unlink()
    elif certificate == "no certificate":
        path.write_text("x")
    said = {"doing": "serving", "port": free, "connected": ["alpha"], "written": "then"}
    (state / "status.json").write_bytes(canonical.encode(said))
    report = service.status(layout.federation)
    assert (report.doing, report.healthy, report.connected) == ("not running", False, [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flower's own state
def test_the_status_of_a_server_that_serves_asks_no_proxy(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    chosen = federation.read(layout.federation)
    state = Path(chosen.server.state)
    state.mkdir()
    host = Host(
        database=state / "superlink.sqlite",
        sites={site.name: site.node_key for site in chosen.sites},
        listener=Listener("127.0.0.1", 0, Path(chosen.server.certificate), Path(chosen.server.key)),
        greatest_reply=2**20,
    )
    host.start()
    try:
        said = {"doing": "serving", "port": host.port, "connected": [], "written": "then"}
        (state / "status.json").write_bytes(canonical.encode(said))
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{free}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        report = service.status(layout.federation)
    finally:
        host.close()
    assert (report.doing, report.healthy) == ("serving", True)


def test_a_run_without_a_round_fails_and_prints_one_object(
    layout: Layout, bract: Bract, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Summary:
        rounds = 0
        refused = ()
        test_accuracy, epsilon_run, delta, out = 0.1, 0.0, 1e-5, "run"

    monkeypatch.setattr(service, "serve", lambda path, trackers: Summary())
    done = bract("server", str(layout.federation), "--json")
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "no round was completed" in json.loads(done.stdout)["error"]["message"]


def test_a_folder_is_no_federation(bract: Bract) -> None:
    for words in (("server", "."), ("server", "nowhere.toml"), ("server", ".", "--status")):
        done = bract(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "cannot read" in done.stderr
