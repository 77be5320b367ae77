"""A hostile server, and everything between: a real site trains on nothing it should not."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack_helpers import (
    HONEST,
    Logged,
    MaliciousServer,
    charges,
    contract_of,
    edit,
    lay_out,
    memory_mib,
    message,
    raw_object,
    train_message,
)
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.proto.message_pb2 import ObjectTree
from processes import until

from bract.client.faults import Disconnected
from bract.client.flower import Address, Connection
from bract.shared import contract as contracts
from bract.shared import keys, models, node_keys, pki, wire
from bract.shared.contract import Contract, SignedContract
from bract.shared.errors import BractError
from bract.shared.messages import RefusalReply, TrainOrder, TrainReply
from bract.shared.privacy import witness
from bract.shared.privacy.entries import Head
from bract.simulations.federations.loopback import LOOPBACK, Layout

SITE, OTHER = HONEST


class Coordinator:
    """Who holds the coordinator's and the witness's key, and uses them as it likes."""

    def __init__(self, layout: Layout) -> None:
        folder = layout.federation.parent
        self.key = keys.load(folder / "coordinator.pem")
        self.witness = keys.load(folder / "witness.pem")
        self.agreed = contract_of(layout)

    def sign(self, agreed: Contract) -> SignedContract:
        return contracts.sign(agreed, self.key)

    def order(self, signed: SignedContract | None = None, **changes: Any) -> TrainOrder:
        signed = signed or self.sign(self.agreed)
        model = models.build("linear", (1, 8, 8), 10, {})
        shapes = models.released_shapes(model)
        weights = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        return replace(TrainOrder(contract=signed, round=1, weights=weights), **changes)

    def changed(self, **changes: Any) -> SignedContract:
        """Returns another contract of the coordinator's own, well signed."""
        return self.sign(self.altered(**changes))

    def altered(self, **changes: Any) -> Contract:
        facts = self.agreed.model_dump()
        for path, value in changes.items():
            table, _, name = path.rpartition("__")
            (facts[table] if table else facts)[name] = value
        return Contract.model_validate(facts)

    def site(self, **changes: Any) -> SignedContract:
        cohort = [
            {**one.model_dump(), **(changes if one.name == SITE else {})}
            for one in self.agreed.cohort
        ]
        return self.changed(cohort=tuple(cohort))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    made = lay_out(tmp_path_factory.mktemp("server") / "federation", HONEST)
    edit(
        made.site(SITE),
        'device = "cpu"\n',
        'device = "cpu"\ngreatest_order_mib = 8\nmax_sampling_rate = 0.5\n'
        "min_noise_multiplier = 1.0\n",
    )
    return made


@pytest.fixture(scope="module")
def hostile(layout: Layout) -> Iterator[tuple[Logged, MaliciousServer, Coordinator]]:
    """One real site for all of it; at the end it serves an honest order, charged once."""
    with MaliciousServer(layout) as server, Logged(layout) as processes:
        processes.join(SITE)
        coordinator = Coordinator(layout)
        yield processes, server, coordinator
        assert processes.running[SITE].poll() is None
        before = charges(layout, SITE)
        fresh = coordinator.changed(nonce=contracts.new_nonce(), run="after-it-all")
        reply = server.reply_to(train_message(coordinator.order(fresh)), "an honest order")
        assert isinstance(reply, TrainReply)
        reply.verify(keys.load(layout.site(SITE).parent / "ledger.pem").public)
        assert charges(layout, SITE) == before + 1


def _unsigned(at: Coordinator) -> SignedContract:
    return SignedContract(contract=at.agreed, signature="0" * 128)


def _by_another(at: Coordinator) -> SignedContract:
    key = keys.generate()
    return contracts.sign(at.agreed.model_copy(update={"coordinator": key.public}), key)


def _of_another_run(at: Coordinator) -> SignedContract:
    other = at.changed(nonce=contracts.new_nonce())
    return SignedContract(contract=at.agreed, signature=other.signature)


def _altered(at: Coordinator) -> SignedContract:
    signed = at.sign(at.agreed)
    weaker = at.altered(privacy__noise_multiplier=1.0)
    return SignedContract(contract=weaker, signature=signed.signature)


def _weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., TrainOrder]:
    def order(at: Coordinator) -> TrainOrder:
        honest = at.order()
        return replace(honest, weights=change(dict(honest.weights)))

    return order


def _first(values: dict[str, Any], value: Any) -> dict[str, Any]:
    name = next(iter(values))
    return {**values, name: value(values[name])}


def _seen(site: str, domain: str, *, key: keys.SigningKey | None = None) -> Any:
    def order(at: Coordinator) -> TrainOrder:
        seen = witness.sign(site, domain, Head(5, "0" * 64), key or at.witness)
        return at.order(witness=seen)

    return order


# What the server sends, and the reason the site gives.
REFUSED: dict[str, tuple[Callable[[Coordinator], Any], str]] = {
    "unsigned": (lambda at: at.order(_unsigned(at)), "contract-untrusted"),
    "signed by another key": (lambda at: at.order(_by_another(at)), "contract-untrusted"),
    "signed for another run": (lambda at: at.order(_of_another_run(at)), "contract-untrusted"),
    "altered after signing": (lambda at: at.order(_altered(at)), "contract-untrusted"),
    "without this site": (
        lambda at: at.order(at.changed(cohort=tuple(at.agreed.model_dump()["cohort"][1:]))),
        "not-in-contract",
    ),
    "another ledger key": (
        lambda at: at.order(at.site(key=keys.generate().public)),
        "not-in-contract",
    ),
    "too little noise": (
        lambda at: at.order(at.changed(privacy__noise_multiplier=0.9)),
        "policy-noise",
    ),
    "too great a rate": (
        lambda at: at.order(at.changed(privacy__sampling_rate=0.6)),
        "policy-sampling",
    ),
    "another model": (lambda at: at.order(at.changed(model__name="mlp")), "policy-model"),
    "a model of its own": (
        lambda at: at.order(at.changed(model__name="os:system")),
        "policy-model",
    ),
    "no noise": (
        lambda at: at.order(at.changed(simulation=True, privacy__mechanism="none")),
        "policy-mechanism",
    ),
    "noise from a seed": (
        lambda at: at.order(at.changed(simulation=True, privacy__randomness="seeded")),
        "simulation-only",
    ),
    "another domain": (lambda at: at.order(at.site(domain="elsewhere")), "policy-domain"),
    "other data": (lambda at: at.order(at.changed(data__name="fashion-mnist")), "policy-domain"),
    "data of another shape": (lambda at: at.order(at.changed(data__classes=9)), "policy-domain"),
    "a size beyond delta": (lambda at: at.order(at.site(nominal_size=10**6)), "policy-delta"),
    "over the budget": (
        lambda at: at.order(at.changed(rounds=10**6, max_attempts=2 * 10**6)),
        "budget-exhausted",
    ),
    "round 0": (lambda at: at.order(round=0), "round-out-of-range"),
    "a round too many": (lambda at: at.order(round=3), "round-out-of-range"),
    "weights that are no numbers": (
        _weights(lambda w: _first(w, lambda v: np.full_like(v, np.nan))),
        "weights-invalid",
    ),
    "great weights": (
        _weights(lambda w: _first(w, lambda v: np.full_like(v, 1e30))),
        "weights-invalid",
    ),
    "weights of another shape": (
        _weights(lambda w: _first(w, lambda v: v.reshape(-1)[1:].copy())),
        "weights-invalid",
    ),
    "weights of more": (
        _weights(lambda w: {**w, "more": np.zeros(1, dtype=np.float32)}),
        "weights-invalid",
    ),
    "a witness by another key": (_seen(SITE, SITE, key=keys.generate()), "witness-invalid"),
    "a witness of another site": (_seen(OTHER, SITE), "witness-invalid"),
    "a witness of another domain": (_seen(SITE, OTHER), "witness-invalid"),
    "a witness of what never was": (_seen(SITE, SITE), "ledger-rolled-back"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_order_against_the_rules_is_refused_and_charges_nothing(
    case: str, hostile: tuple[Logged, MaliciousServer, Coordinator]
) -> None:
    processes, server, coordinator = hostile
    make, reason = REFUSED[case]
    before, charged = processes.reasons(SITE).count(reason), charges(processes.layout, SITE)
    reply = server.reply_to(train_message(make(coordinator)), case)
    assert isinstance(reply, RefusalReply)
    assert reply.reason.value == reason
    processes.await_refusal(SITE, reason, before)
    assert charges(processes.layout, SITE) == charged


def test_an_order_of_a_run_that_is_over_buys_nothing_new(
    hostile: tuple[Logged, MaliciousServer, Coordinator],
) -> None:
    processes, server, coordinator = hostile
    old = coordinator.changed(nonce=contracts.new_nonce(), run="old", rounds=1, max_attempts=1)
    order = coordinator.order(old)
    first = server.reply_to(train_message(order), "its own run")
    assert isinstance(first, TrainReply)
    charged = charges(processes.layout, SITE)
    again = server.reply_to(train_message(order, run_id=99, group_id="7"), "the same again")
    assert isinstance(again, TrainReply)
    assert again.receipt == first.receipt  # the stored bytes: nothing was computed
    other = replace(order, weights=_first(dict(order.weights), lambda v: v + 1))
    later = replace(order, round=2)
    for asked, reason in ((other, "weights-changed"), (later, "round-out-of-range")):
        reply = server.reply_to(train_message(asked), reason)
        assert isinstance(reply, RefusalReply)
        assert reply.reason.value == reason
    (processes.layout.ledger(SITE).parent / "updates").joinpath(
        f"{first.receipt.update}.safetensors"
    ).unlink()
    lost = server.reply_to(train_message(order), "once its bytes are gone")
    assert isinstance(lost, RefusalReply)
    assert lost.reason.value == "attempts-exhausted"
    assert charges(processes.layout, SITE) == charged


def _order_record(**changes: Any) -> Callable[[Coordinator], RecordDict]:
    def content(at: Coordinator) -> RecordDict:
        encoded = wire.encode_order(at.order())
        terms = ConfigRecord({**dict(encoded["order"]), **changes})
        return RecordDict({"weights": encoded["weights"], "order": terms})

    return content


MISFORMED: dict[str, Callable[[Coordinator], RecordDict]] = {
    "nothing": lambda at: RecordDict(),
    "a contract that is none": _order_record(contract=b"{}"),
    "a contract that is no JSON": _order_record(contract=b"[" * 100_000),
    "a round in words": _order_record(round="one"),
    "one fact more": _order_record(more=1),
    "a witness that is none": _order_record(witness=b"{}"),
    "metrics": lambda at: RecordDict({"weights": ArrayRecord(), "order": ConfigRecord()}),
    "pickled arrays": lambda at: RecordDict(
        {"weights": ArrayRecord([np.zeros(2)]), "order": wire.encode_order(at.order())["order"]}
    ),
}


@pytest.mark.parametrize("case", MISFORMED)
def test_an_order_of_another_form_is_refused(
    case: str, hostile: tuple[Logged, MaliciousServer, Coordinator]
) -> None:
    processes, server, coordinator = hostile
    reply = server.reply_to(message(MISFORMED[case](coordinator)), case)
    assert isinstance(reply, RefusalReply)
    assert reply.reason.value == "contract-untrusted"
    assert charges(processes.layout, SITE) <= 1


def _kind(name: str) -> Callable[[MaliciousServer, Coordinator], None]:
    return lambda server, at: server.offer(train_message(at.order(), message_type=name))


def _an_error(server: MaliciousServer, at: Coordinator) -> None:
    server.offer(make_message(metadata=message(RecordDict()).metadata, error=Error(1, "x")))


def _metrics(server: MaliciousServer, at: Coordinator) -> None:
    server.offer(message(RecordDict({"m": MetricRecord({"n": 1})})))


def _offered(
    server: MaliciousServer, root: str, objects: dict[str, bytes], tree: ObjectTree | None = None
) -> None:
    flat = [ObjectTree(object_id=name) for name in objects if name != root]
    tree = tree or ObjectTree(object_id=root, children=flat)
    server.offer_raw(message(RecordDict()), tree, objects)


def _broad(server: MaliciousServer, at: Coordinator) -> None:
    children = [ObjectTree(object_id=f"{n:064x}") for n in range(30_000)]
    _offered(server, "f" * 64, {}, ObjectTree(object_id="f" * 64, children=children))


def _large(server: MaliciousServer, at: Coordinator) -> None:
    more = {str(n): np.full(2**20, n, dtype=np.float32) for n in range(4)}
    server.offer(train_message(at.order(weights=more)))


def _grows(server: MaliciousServer, at: Coordinator) -> None:
    chunk, data = raw_object("ArrayChunk", [], bytes(4_000_000))
    said = {"dtype": "float32", "shape": [10**12], "stype": "numpy.ndarray.raw",
            "arraychunk_ids": [0] * 1_000_000}  # fmt: skip
    one, one_data = raw_object("Array", [chunk], json.dumps(said).encode())
    record, record_data = raw_object("ArrayRecord", [one], json.dumps({"w": one}).encode())
    content, content_data = raw_object(
        "RecordDict", [record], json.dumps({"weights": record}).encode()
    )
    root, root_data = raw_object("Message", [content], b"")
    _offered(server, root, {chunk: data, one: one_data, record: record_data,
                            content: content_data, root: root_data})  # fmt: skip


def _unnamed(server: MaliciousServer, at: Coordinator) -> None:
    _offered(server, "../../etc/passwd", {})


UNREADABLE: dict[str, tuple[Callable[[MaliciousServer, Coordinator], None], str]] = {
    "a kind that is not served": (_kind("evaluate.nothing"), "unreadable-order"),
    "a kind that names code": (_kind("train.os:system"), "unreadable-order"),
    "a kind without a name": (_kind(""), "unreadable-order"),
    "an error": (_an_error, "unreadable-order"),
    "metrics": (_metrics, "unreadable-order"),
    "an object without a name": (_unnamed, "unreadable-order"),
    "a broad tree": (_broad, "order-too-large"),
    "a large order": (_large, "order-too-large"),
    "an array that grows": (_grows, "order-too-large"),
}


def met(
    case: str, reason: str, hostile: tuple[Logged, MaliciousServer, Coordinator], send: Any
) -> None:
    """Holds where the site refuses what is sent for a reason, and answers the next order."""
    processes, server, coordinator = hostile
    before, charged = processes.reasons(SITE).count(reason), charges(processes.layout, SITE)
    held = memory_mib(processes.running[SITE].pid)
    send()
    processes.await_refusal(SITE, reason, before)
    server.override.clear()
    next_one = server.reply_to(train_message(coordinator.order(round=0)), f"the order after {case}")
    assert isinstance(next_one, RefusalReply)
    assert charges(processes.layout, SITE) == charged
    assert memory_mib(processes.running[SITE].pid) < held + 200


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_no_site_can_read_is_refused_and_the_site_goes_on(
    case: str, hostile: tuple[Logged, MaliciousServer, Coordinator]
) -> None:
    send, reason = UNREADABLE[case]
    met(case, reason, hostile, lambda: send(hostile[1], hostile[2]))


def _endless(piece: bytes) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        for _ in range(2**31 // len(piece)):
            yield piece

    return pieces


ANSWERS: dict[str, tuple[tuple[int, dict[str, str], Any], str]] = {
    "two gigabytes": (
        (200, {"content-length": str(2**31)}, _endless(bytes(2**20))),
        "order-too-large",
    ),
    "no end": ((200, {}, _endless(bytes(2**20))), "order-too-large"),
    "no protobuf": (
        (200, {"content-length": "4"}, lambda: iter([b"\xff" * 4])),
        "unreadable-order",
    ),
}


@pytest.mark.parametrize("route", ["pull-messages", "pull-object"])
@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_of_another_size_or_kind_is_refused(
    case: str, route: str, hostile: tuple[Logged, MaliciousServer, Coordinator]
) -> None:
    answer, reason = ANSWERS[case]

    def send() -> None:
        hostile[1].override[route] = answer
        if route == "pull-object":
            hostile[1].offer(train_message(hostile[2].order(round=0)))

    met(case, reason, hostile, send)


def test_a_compressed_answer_is_not_unpacked(
    hostile: tuple[Logged, MaliciousServer, Coordinator],
) -> None:
    processes, server, coordinator = hostile
    packed = gzip.compress(bytes(2**28))
    held = memory_mib(processes.running[SITE].pid)
    headers = {"content-encoding": "gzip", "content-length": str(len(packed))}
    server.asked.clear()
    server.override["pull-messages"] = (200, headers, lambda: iter([packed]))
    until(lambda: server.asked.count("pull-messages") > 2, "the site asks again")
    server.override.clear()
    reply = server.reply_to(train_message(coordinator.order(round=0)), "the order after it")
    assert isinstance(reply, RefusalReply)
    assert memory_mib(processes.running[SITE].pid) < held + 100


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_site_is_not_sent_elsewhere(
    status: int, hostile: tuple[Logged, MaliciousServer, Coordinator]
) -> None:
    """Else a server could have it post to any address that its machine can reach."""
    _, server, coordinator = hostile
    reached: list[str] = []

    class Inner(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reached.append(self.path)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer((LOOPBACK, 0), Inner) as inner:
        threading.Thread(target=inner.serve_forever, daemon=True).start()
        to = f"http://{LOOPBACK}:{inner.server_address[1]}/admin"
        server.asked.clear()
        server.override["pull-messages"] = (
            status,
            {"location": to, "content-length": "0"},
            lambda: iter([]),
        )
        until(lambda: server.asked.count("pull-messages") > 1, "the site asks again")
        server.override.clear()
        reply = server.reply_to(train_message(coordinator.order(round=0)), "the order after it")
        inner.shutdown()
    assert isinstance(reply, RefusalReply)
    assert reached == []


def test_what_the_server_says_writes_no_lines_into_the_sites_log_or_status(
    hostile: tuple[Logged, MaliciousServer, Coordinator],
) -> None:
    processes, server, coordinator = hostile
    body = json.dumps({"detail": "x\nforged line\x1b[2J"}).encode()
    headers = {"content-length": str(len(body))}
    server.asked.clear()
    server.override["pull-messages"] = (400, headers, lambda: iter([body]))
    until(lambda: server.asked.count("pull-messages") > 1, "the site asks again")
    server.override.clear()
    sent = train_message(coordinator.order(round=0), group_id="1\x1b[2J\nforged line")
    assert isinstance(server.reply_to(sent, "a strange group"), RefusalReply)
    assert "forged line" in processes.log(SITE)
    assert not any(line.startswith("forged") for line in processes.log(SITE).splitlines())
    assert "\x1b" not in processes.log(SITE)
    status = (processes.layout.ledger(SITE).parent / "status.json").read_text()
    assert "forged" not in status


# Certificates


def _identity(case: str, root: Path) -> tuple[Path, Path, bytes]:
    """Returns certificate, key and the authority that the site trusts."""
    authority, past = pki.new_authority(), datetime.now(UTC) - timedelta(days=10)
    trusted = authority.certificate_pem()
    if case == "of another authority":
        shown = pki.issue_server(pki.new_authority(), [LOOPBACK])
    elif case == "expired":
        authority = pki.new_authority(now=past)
        trusted = authority.certificate_pem()
        shown = pki.issue_server(authority, [LOOPBACK], days=2, now=past)
    elif case == "not yet valid":
        future = datetime.now(UTC) + timedelta(days=10)
        shown = pki.issue_server(authority, [LOOPBACK], days=2, now=future)
    elif case == "of another host":
        shown = pki.issue_server(authority, ["bank.example"])
    elif case == "an auditor's":
        shown = pki.issue_auditor(authority, "auditor")
    else:
        shown = authority
    (root / "shown.pem").write_bytes(shown.certificate_pem())
    (root / "shown-key.pem").write_bytes(shown.key_pem())
    return root / "shown.pem", root / "shown-key.pem", trusted


CERTIFICATES = {
    "of another authority": "self-signed certificate in certificate chain",
    "expired": "certificate has expired",
    "not yet valid": "certificate is not yet valid",
    "of another host": "IP address mismatch",
    "an auditor's": "purpose",
    "the authority itself": "",
}


@pytest.mark.parametrize("case", CERTIFICATES)
def test_a_site_speaks_to_no_server_that_its_authority_does_not_vouch_for(
    case: str, tmp_path: Path
) -> None:
    layout = lay_out(tmp_path / "federation", HONEST)
    certificate, key, trusted = _identity(case, tmp_path)
    root = layout.site(SITE).parent / "ca.pem"
    root.write_bytes(trusted)
    node_key = node_keys.load(layout.site(SITE).parent / "node-key.pem")
    address = Address(f"{LOOPBACK}:{layout.port}", root)
    with (
        MaliciousServer(layout, certificate, key) as server,
        Connection(address, node_key, greatest_order=2**20) as connection,
        pytest.raises(BractError, match="is not vouched for by") as refused,
    ):
        connection.open()
    assert CERTIFICATES[case] in str(refused.value)
    assert not isinstance(refused.value, Disconnected)  # which would be tried again, for ever
    assert server.asked == []


def test_a_site_ends_with_one_clear_line_where_the_certificate_has_expired(tmp_path: Path) -> None:
    layout = lay_out(tmp_path / "federation", HONEST)
    certificate, key, trusted = _identity("expired", tmp_path)
    (layout.site(SITE).parent / "ca.pem").write_bytes(trusted)
    with MaliciousServer(layout, certificate, key) as server, Logged(layout) as processes:
        processes.join(SITE)
        code, line = processes.ended(SITE)
        assert code == 1
        assert line.startswith(f"the certificate of {LOOPBACK}:{layout.port} is not")
        assert line.endswith("(certificate has expired): nothing was sent")
        assert "Traceback" not in processes.log(SITE)
        assert server.asked == []
        assert charges(layout, SITE) == 0


def test_an_honest_server_is_unknown_to_a_site_that_trusts_another(tmp_path: Path) -> None:
    """The other way about: real server, and a site whose root is another authority's."""
    layout = lay_out(tmp_path / "federation", HONEST, rounds=1, minimum_cohort=1)
    kept = layout.site(SITE).parent / "ca.pem"
    right = tmp_path / "right.pem"
    shutil.copy(kept, right)
    kept.write_bytes(pki.new_authority().certificate_pem())
    with Logged(layout) as processes:
        processes.serve()
        processes.join(SITE)
        code, line = processes.ended(SITE)
        assert code == 1
        assert "is not vouched for by" in line
        assert charges(layout, SITE) == 0
        assert processes.lines("server", event="connected") == []
