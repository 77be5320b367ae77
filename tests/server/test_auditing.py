"""The auditor's service: who is answered, with what, and what a dishonest server cannot tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bract.server import auditing, checkpoint, received
from bract.server.auditing import AuditServer, Door
from bract.server.checkpoint import RoundState
from bract.server.disclosure import Disclosure
from bract.shared import auditor, federation, keyfiles, keys, node_keys, pki
from bract.shared.auditor import Credentials
from bract.shared.errors import BractError, UsageError, VerificationFailed
from bract.shared.keys import SigningKey
from bract.shared.privacy import entries, witness
from bract.shared.privacy.receipts import Received
from bract.shared.proto import audit_pb2 as pb
from bract.shared.proto import audit_pb2_grpc
from bract.simulations.federations.loopback import Layout

LOCAL = "127.0.0.1"


@dataclass
class Run:
    """A server's run folder, made by a real gate's replies, and the service on it."""

    folder: Path
    world: Any
    witness: SigningKey
    authority: pki.Identity
    signed: Any
    replies: list[Any]
    port: int = 0
    server: AuditServer | None = None

    @property
    def out(self) -> Path:
        return self.folder / "run"

    @property
    def lines(self) -> Path:
        return self.out / received.NAME

    def serve(self, *listed: pki.Identity) -> None:
        self.stop()
        identity = pki.issue_server(self.authority, [LOCAL])
        door = Door(
            address=f"{LOCAL}:0",
            certificate=identity.certificate_pem(),
            key=identity.key_pem(),
            authority=self.authority.certificate_pem(),
            auditors={pki.fingerprint(one.certificate): "erin" for one in listed},
        )
        disclosure = Disclosure(self.out, self.signed.contract, self.witness)
        self.server = AuditServer(door, disclosure)
        self.port = self.server.start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
        self.server = None

    def save(self, replies: list[Any], *, void: tuple[int, ...] = ()) -> None:
        """Writes receipts and a checkpoint as the round loop does."""
        self.lines.unlink(missing_ok=True)
        for number, reply in enumerate(replies, start=1):
            line = Received(
                reply.receipt, reply.signature, reply.ledger, number, number not in void
            )
            received.append(self.out, [line])
        last = [r for n, r in enumerate(replies, start=1) if n not in void][-1].receipt
        head = {"domain": "ward", "sequence": last.head_sequence, "hash": last.head_hash}
        state = RoundState(
            contract=self.signed.contract.sha256,
            weights={},
            velocity={},
            round=len(replies) - len(void),
            attempts=len(replies),
            heads={"alpha": head},
        )
        checkpoint.save(state, self.out / "checkpoint")

    def credentials(self, identity: pki.Identity, roots: pki.Identity | None = None) -> Credentials:
        name = pki.fingerprint(identity.certificate)[:16]
        paths = [self.folder / f"{name}{end}" for end in (".pem", "-key.pem", "-ca.pem")]
        if not paths[0].exists():
            keyfiles.create(
                [
                    keyfiles.public(paths[0], identity.certificate_pem()),
                    keyfiles.private(paths[1], identity.key_pem()),
                    keyfiles.public(paths[2], (roots or self.authority).certificate_pem()),
                ]
            )
        return Credentials(*paths)

    def pull(self, identity: pki.Identity, name: str = "pulled", **more: Any) -> auditor.Pulled:
        return auditor.pull(
            f"{LOCAL}:{self.port}",
            self.credentials(identity),
            coordinator=more.get("coordinator"),
            folder=self.folder / name,
        )

    def kept(self, name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / name).iterdir()}

    def channel(self, identity: pki.Identity) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(
            self.authority.certificate_pem(), identity.key_pem(), identity.certificate_pem()
        )
        return grpc.secure_channel(f"{LOCAL}:{self.port}", credentials)


@pytest.fixture
def run(world: Any) -> Iterator[Run]:
    """Three rounds of one site, the second void, and the witness of the first kept by the site."""
    desk = keys.generate()
    signed = world.sign(world.contract(witness=desk.public))
    gate, replies = world.gate(), []
    seen = None
    for number in (1, 2, 3):
        order = replace(world.order(signed, number), witness=seen)
        reply = world.serve(gate, order)
        replies.append(reply)
        if number == 1:
            seen = witness.sign("alpha", "ward", reply.receipt.head, desk)
    gate.ledger.close()
    made = Run(world.folder, world, desk, pki.new_authority(), signed, replies)
    made.out.mkdir()
    (made.out / "contract.json").write_bytes(signed.to_bytes())
    made.save(replies, void=(2,))
    yield made
    made.stop()


@pytest.fixture
def erin(run: Run) -> pki.Identity:
    identity = pki.issue_auditor(run.authority, "erin")
    run.serve(identity)
    return identity


# What is told


def test_a_listed_auditor_is_told_contract_heads_entries_and_updates(
    run: Run, erin: pki.Identity
) -> None:
    pulled = run.pull(erin, coordinator=run.world.coordinator.public)
    assert pulled.signed == run.signed
    shown, followed = pulled.shown["alpha"], pulled.followed["alpha"]
    last = run.replies[-1].receipt
    assert shown.head == witness.sign("alpha", "ward", last.head, run.witness)
    # A genesis, and a charge and a release of each of three rounds; the void one is shown too.
    assert len(shown.ledger.links) == 7
    assert followed.shown == 6
    assert [(one.receipt.round, one.counted) for one in shown.updates] == [
        (1, True),
        (2, False),
        (3, True),
    ]
    kept = {path.name for path in (run.folder / "pulled").iterdir()}
    assert kept == {"contract.json", "witnesses.json", "receipts.jsonl", "entries.jsonl"}
    assert (run.folder / "pulled" / "receipts.jsonl").read_bytes() == run.lines.read_bytes()


def test_what_a_kill_could_take_back_is_not_told(run: Run, erin: pki.Identity) -> None:
    late = Received(
        run.replies[2].receipt, run.replies[2].signature, run.replies[2].ledger, 4, True
    )
    received.append(run.out, [late])
    assert len(run.pull(erin).shown["alpha"].updates) == 3
    received.settle(run.out, attempts=3)
    assert len(run.lines.read_bytes().splitlines()) == 3
    with run.lines.open("ab") as file:
        file.write(b'{"half of a li')
    received.settle(run.out, attempts=3)
    assert len(run.lines.read_bytes().splitlines()) == 3


def test_a_ledger_that_the_server_knows_from_an_earlier_run_begins_at_its_witness(
    run: Run, erin: pki.Identity
) -> None:
    """The site showed its first entries to the same witness in another run."""
    run.save(run.replies[1:], void=())
    shown = run.pull(erin).shown["alpha"]
    assert shown.ledger.since == witness.sign(
        "alpha", "ward", run.replies[0].receipt.head, run.witness
    )
    assert len(shown.ledger.links) == 4


def test_a_second_pull_must_extend_the_first(run: Run, erin: pki.Identity) -> None:
    run.save(run.replies[:1])
    assert run.pull(erin).extended == ()
    run.save(run.replies, void=(2,))
    assert run.pull(erin).extended == ("alpha",)
    run.save(run.replies[:1])
    with pytest.raises(VerificationFailed, match="entry 6, is gone"):
        run.pull(erin)
    with pytest.raises(UsageError, match="is not empty and holds no earlier pull"):
        run.pull(erin, "run")


def test_what_a_pull_brought_must_come_again(run: Run, erin: pki.Identity) -> None:
    """The server leaves out a void round's receipt, and later alters one that it has shown."""
    run.pull(erin)
    before = run.kept("pulled")
    run.save(run.replies[:1] + run.replies[2:])
    run.serve(erin)
    said = r"no longer shows 2 of the 3 lines of .*pulled/receipts\.jsonl: keep that folder"
    with pytest.raises(VerificationFailed, match=said):
        run.pull(erin)
    assert run.kept("pulled") == before
    run.save(run.replies, void=(1, 2))
    run.serve(erin)
    with pytest.raises(VerificationFailed, match="no longer shows"):
        run.pull(erin)
    assert run.kept("pulled") == before
    run.save(run.replies, void=(2,))
    run.serve(erin)
    assert run.pull(erin).extended == ("alpha",)
    assert run.kept("pulled") == before


def test_another_contract_is_no_extension(run: Run, erin: pki.Identity) -> None:
    """Before the first round no head is there that could tell."""
    state = run.out / "checkpoint" / "state.json"
    text = state.read_bytes()
    state.unlink()
    assert run.pull(erin).extended == ()
    before = run.kept("pulled")
    other = run.world.sign(run.world.contract(witness=run.witness.public, rounds=4))
    (run.out / "contract.json").write_bytes(other.to_bytes())
    with pytest.raises(VerificationFailed, match=r"another contract than .*pulled/contract\.json"):
        run.pull(erin)
    assert run.kept("pulled") == before
    (run.out / "contract.json").write_bytes(run.signed.to_bytes())
    state.write_bytes(text)
    assert len(run.pull(erin).shown["alpha"].updates) == 3


def test_a_pull_that_lacks_a_file_is_not_extended(run: Run, erin: pki.Identity) -> None:
    run.pull(erin)
    (run.folder / "pulled" / "receipts.jsonl").unlink()
    before = run.kept("pulled")
    with pytest.raises(UsageError, match=r"cannot read .*receipts\.jsonl of the earlier pull"):
        run.pull(erin)
    assert run.kept("pulled") == before


def test_another_history_is_no_extension(run: Run, erin: pki.Identity) -> None:
    """The site's ledger was begun anew, and the server plays along."""
    run.pull(erin)
    other = type(run.world)(
        folder=run.folder / "other", coordinator=run.world.coordinator, key=run.world.key
    )
    other.folder.mkdir()
    gate = other.gate()
    replies = [other.serve(gate, other.order(run.signed, number)) for number in (1, 2, 3, 4)]
    gate.ledger.close()
    run.save(replies[:3])
    run.serve(erin)
    with pytest.raises(VerificationFailed, match="entries were taken back"):
        run.pull(erin)
    assert run.pull(erin, "elsewhere").shown["alpha"].head.sequence == 6


# Whom the server does not answer


def test_a_certificate_that_is_not_listed_is_refused_with_the_remedy(
    run: Run, erin: pki.Identity
) -> None:
    stranger = pki.issue_auditor(run.authority, "erin")  # a name is not what is listed
    sha256 = pki.fingerprint(stranger.certificate)
    with pytest.raises(BractError, match=rf"{sha256} is no listed auditor's: .*\[\[auditors\]\]"):
        run.pull(stranger)
    assert not (run.folder / "pulled").exists()


def test_health_and_reflection_answer_listed_auditors_alone(run: Run, erin: pki.Identity) -> None:
    asked = health_pb2.HealthCheckRequest(service=auditing.SERVICE)
    with run.channel(erin) as channel:
        told = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=20)
        assert told.status == health_pb2.HealthCheckResponse.SERVING
        watched = health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=20)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        watched.cancel()
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([question]), timeout=20)
        names = {service.name for service in answer.list_services_response.service}
        assert "bract.audit.v1.Audit" in names
    with run.channel(pki.issue_auditor(run.authority, "mallory")) as channel:
        for call in (
            lambda: health_pb2_grpc.HealthStub(channel).Check(asked, timeout=20),
            lambda: list(
                reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                    iter([question]), timeout=20
                )
            ),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_no_other_certificate_comes_through_the_door(
    run: Run, erin: pki.Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor, "CONNECT_SECONDS", 3.0)
    monkeypatch.setattr(auditor, "CALL_SECONDS", 3.0)
    monkeypatch.setattr(pki, "check_auditor", lambda certificate, key: None)  # a forger's own bract
    server = pki.issue_server(run.authority, [LOCAL])
    foreign = pki.issue_auditor(pki.new_authority(), "erin")
    for identity in (server, foreign):
        run.serve(identity)  # listed or not
        with pytest.raises(BractError, match=r"refused|no answer"):
            run.pull(identity)
    with grpc.insecure_channel(f"{LOCAL}:{run.port}") as channel, pytest.raises(grpc.RpcError):
        list(_stub(channel).Heads(pb.HeadsRequest(), timeout=3))
    anonymous = grpc.ssl_channel_credentials(run.authority.certificate_pem())
    with (
        grpc.secure_channel(f"{LOCAL}:{run.port}", anonymous) as channel,
        pytest.raises(grpc.RpcError),
    ):
        list(_stub(channel).Heads(pb.HeadsRequest(), timeout=3))


def test_files_that_are_no_auditors_are_refused_before_anyone_is_asked(
    run: Run, erin: pki.Identity
) -> None:
    own = run.credentials(erin)
    server = run.credentials(pki.issue_server(run.authority, [LOCAL]))
    node = run.folder / "node-key.pem"
    keyfiles.create([keyfiles.private(node, node_keys.to_pem(node_keys.new()))])
    for credentials, said in (
        (server, "is no auditor's certificate"),
        (replace(own, certificate=own.roots), "is no auditor's certificate"),
        (replace(own, key=node), "is a site's node key"),
        (replace(own, key=server.key), "is not the key of"),
        (replace(own, certificate=run.folder / "none.pem"), "cannot read"),
    ):
        with pytest.raises(UsageError, match=said):
            auditor.pull("127.0.0.1:1", credentials, coordinator=None, folder=run.folder / "no")


def test_a_server_of_another_authority_is_not_believed(
    run: Run, erin: pki.Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor, "CONNECT_SECONDS", 1.0)
    mine = run.credentials(erin)
    other = run.credentials(pki.issue_auditor(pki.new_authority(), "x"), pki.new_authority())
    with pytest.raises(BractError, match="no answer"):
        auditor.pull(
            f"{LOCAL}:{run.port}",
            replace(mine, roots=other.roots),
            coordinator=None,
            folder=run.folder / "no",
        )


# Bounds, and questions for what is not there


def _stub(channel: grpc.Channel) -> Any:
    made: Callable[[grpc.Channel], Any] = audit_pb2_grpc.AuditStub
    return made(channel)


def test_questions_are_bounded_and_those_for_what_is_not_there_end(
    run: Run, erin: pki.Identity
) -> None:
    with run.channel(erin) as channel:
        stub = _stub(channel)

        def code(method: str, request: Any) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as ended:
                list(getattr(stub, method)(request, timeout=20))
            found: grpc.StatusCode = ended.value.code()
            return found

        big = "a" * (auditing.GREATEST_REQUEST + 1)
        assert code("Entries", pb.EntriesRequest(site=big)) == (grpc.StatusCode.RESOURCE_EXHAUSTED)
        for method, request in (
            ("Entries", pb.EntriesRequest(site="beta")),
            ("Updates", pb.UpdatesRequest(site="beta")),
            ("Consistency", pb.ConsistencyRequest(site="beta", domain="ward", second=1)),
            ("Consistency", pb.ConsistencyRequest(site="alpha", domain="x", second=1)),
            ("Consistency", pb.ConsistencyRequest(site="alpha", domain="ward", second=7)),
            (
                "Consistency",
                pb.ConsistencyRequest(site="alpha", domain="ward", first=3, second=2),
            ),
        ):
            assert code(method, request) == grpc.StatusCode.NOT_FOUND, (method, request)


def test_an_auditor_bounds_what_a_server_may_send(
    run: Run, erin: pki.Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor, "GREATEST_TOTAL", 3000)
    with pytest.raises(VerificationFailed, match="the server sends over"):
        run.pull(erin)


# What a dishonest server tells


def _altered(run: Run, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Rewrites the server's own file of receipts."""
    values = [json.loads(line) for line in run.lines.read_bytes().splitlines()]
    change(values)
    lines = [json.dumps(v, sort_keys=True, separators=(",", ":")) for v in values]
    run.lines.write_text("".join(f"{line}\n" for line in lines))


def _drop_link(values: list[dict[str, Any]]) -> None:
    del values[0]["links"][1]


def _other_body(values: list[dict[str, Any]]) -> None:
    values[0]["links"][1]["body"]["round"] = 2


def _other_attempt(values: list[dict[str, Any]]) -> None:
    values[2]["receipt"]["attempt"] = 2


def _hidden_charge(values: list[dict[str, Any]]) -> None:
    values[2]["links"][2]["body"] = None


def _counted_twice(values: list[dict[str, Any]]) -> None:
    values[1]["counted"] = True
    values[1]["receipt"], values[1]["signature"] = values[0]["receipt"], values[0]["signature"]
    values[1]["links"], values[1]["since"] = values[0]["links"], values[0]["since"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_drop_link, "do not lead|another place"),
        (_other_body, "not the one that was hashed"),
        (_other_attempt, "signature does not verify"),
        (_hidden_charge, "stands behind no charge"),
        (_counted_twice, "counted twice|behind no charge"),
    ],
    ids=["link dropped", "body changed", "receipt changed", "charge hidden", "counted twice"],
)
def test_what_a_server_alters_is_shown(
    run: Run, erin: pki.Identity, change: Callable[[Any], None], fault: str
) -> None:
    _altered(run, change)
    with pytest.raises(VerificationFailed, match=fault):
        run.pull(erin)
    assert not (run.folder / "pulled").exists()


def test_a_contract_or_head_by_another_key_is_shown(run: Run, erin: pki.Identity) -> None:
    with pytest.raises(VerificationFailed, match="contract"):
        run.pull(erin, coordinator=keys.generate().public)
    run.witness = keys.generate()
    run.serve(erin)
    with pytest.raises(VerificationFailed, match="another key than the pinned"):
        run.pull(erin)


# In FEDERATION.toml


def test_the_section_names_an_address_and_asks_for_auditors(layout: Layout) -> None:
    text = layout.federation.read_text()
    listed = f'[[auditors]]\nname = "erin"\ncertificate_sha256 = "{"a" * 64}"\n'
    assert auditing.door_of(federation.read(layout.federation)) is None
    layout.federation.write_text(f'{text}\n[audit]\nlisten = "127.0.0.1:0"\n')
    with pytest.raises(UsageError, match=r"\[audit\] answers listed auditors alone"):
        federation.read(layout.federation)
    layout.federation.write_text(f'{text}\n[audit]\nlisten = "here"\n{listed}')
    with pytest.raises(UsageError, match=r"audit\.listen: must be HOST:PORT"):
        federation.read(layout.federation)
    layout.federation.write_text(f'{text}\n[audit]\nlisten = "127.0.0.1:0"\n{listed}{listed}')
    with pytest.raises(UsageError, match="two auditors have the certificate"):
        federation.read(layout.federation)
    layout.federation.write_text(f'{text}\n[audit]\nlisten = "127.0.0.1:0"\n{listed}')
    door = auditing.door_of(federation.read(layout.federation))
    assert door is not None
    assert door.auditors == {"a" * 64: "erin"}
    # Who issued the server's certificate issues the auditors'.
    assert door.authority == (layout.federation.parent / "ca.pem").read_bytes()


def test_an_issuer_that_is_not_beside_the_servers_certificate_must_be_named(layout: Layout) -> None:
    certificate = layout.federation.parent / "server.pem"
    first = x509.load_pem_x509_certificates(certificate.read_bytes())[:1]
    certificate.write_bytes(pki.to_pem(first))
    listed = f'[[auditors]]\nname = "erin"\ncertificate_sha256 = "{"a" * 64}"\n'
    text = f'{layout.federation.read_text()}\n{listed}[audit]\nlisten = "127.0.0.1:0"\n'
    layout.federation.write_text(text)
    with pytest.raises(UsageError, match=r"audit\.authority"):
        auditing.door_of(federation.read(layout.federation))
    layout.federation.write_text(f'{text}authority = "ca.pem"\n')
    assert auditing.door_of(federation.read(layout.federation))


def test_a_port_that_is_taken_is_one_line(run: Run, erin: pki.Identity) -> None:
    identity = pki.issue_server(run.authority, [LOCAL])
    door = Door(
        address=f"{LOCAL}:{run.port}",
        certificate=identity.certificate_pem(),
        key=identity.key_pem(),
        authority=run.authority.certificate_pem(),
        auditors={},
    )
    disclosure = Disclosure(run.out, run.signed.contract, run.witness)
    with pytest.raises(BractError, match="cannot serve auditors on"):
        AuditServer(door, disclosure).start()


def test_entries_are_those_that_the_site_signed(run: Run, erin: pki.Identity) -> None:
    shown = run.pull(erin).shown["alpha"]
    bodies = [link.body for link in shown.ledger.links if link.body]
    kinds = [entries.body(text).kind for text in bodies]
    assert kinds == ["charge", "release"] * 3
