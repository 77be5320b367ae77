"""A registered site turns hostile: a real server, a real honest site, and a hostile one by hand.

In each round the hostile site gives another answer. None is used, none ends the run, and every
round completes with the honest site.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from attack_helpers import (
    HONEST,
    HOSTILE,
    Caller,
    Insider,
    Logged,
    caller,
    charges,
    edit,
    entries_of,
    give,
    lay_out,
    memory_mib,
    message,
    objects_of,
    raw_object,
    state,
    summary,
)
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.proto.fleet_pb2 import PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from processes import WAIT_SECONDS, until

from bract.client.permits import Permit
from bract.server.strategy import greatest_norm
from bract.shared import arrays, canonical, incarnation, keys, wire
from bract.shared.data import describe, load_part
from bract.shared.errors import Reason
from bract.shared.messages import RefusalReply, TrainReply
from bract.shared.privacy import entries, witness
from bract.shared.updates import ProtectedUpdate, UnprotectedUpdate
from bract.simulations.federations.loopback import Layout

ALPHA, BETA = HONEST
INVALID, FAILED = "invalid-update", "node-failed"


class Round:
    """What the hostile site has in one round: its order, and the answer an honest site would give.

    `said` are the replies of the rounds before.
    """

    def __init__(self, one: Caller, insider: Insider, said: list[TrainReply]) -> None:
        self.one, self.insider, self.said = one, insider, said
        self.envelope, tree = one.order()
        self.order = wire.decode_order(one.read(tree).content)
        self.reply = insider.reply(self.order)

    def signed(self, sent: Any = None, key: Any = None, **facts: Any) -> RecordDict:
        """Returns the answer with another update or other facts, signed as if all were well."""
        sent = sent or self.reply.update
        told = {"update": arrays.digest(sent.arrays), **facts}
        receipt = replace(self.reply.receipt, **told)
        signature = (key or self.insider.key).sign(receipt.digest())
        changed = replace(self.reply, update=sent, receipt=receipt, signature=signature)
        return wire.encode_reply(changed)

    def of(self, change: Callable[[np.ndarray], np.ndarray]) -> RecordDict:
        name, *_ = self.reply.update.arrays
        values = dict(self.reply.update.arrays)
        values[name] = change(values[name].copy())
        return self.signed(ProtectedUpdate(values))

    def released(self, update: ProtectedUpdate) -> RecordDict:
        """Returns an update that the hostile ledger truly released, in a second attempt."""
        self.insider.gate.updates.keep({"gone": np.zeros(1, dtype=np.float32)})
        permit = self.insider.gate.admit(replace(self.order, witness=None))
        assert isinstance(permit, Permit)
        return wire.encode_reply(self.insider.gate.release(permit, update))

    def links(self, change: Callable[[list[Any]], list[Any]]) -> RecordDict:
        ledger = replace(self.reply.ledger, links=tuple(change(list(self.reply.ledger.links))))
        return wire.encode_reply(replace(self.reply, ledger=ledger))

    def give(self, content: RecordDict, **facts: Any) -> None:
        give(self.one, self.envelope.message_id, content, **facts)

    def give_objects(self, root: str, objects: dict[str, bytes]) -> None:
        self.one.answer(self.envelope.message_id, root, objects)

    def whole(self) -> tuple[str, dict[str, bytes]]:
        content = wire.encode_reply(self.reply)
        return objects_of(
            message(
                content, reply_to_message_id=self.envelope.message_id, src_node_id=self.one.node
            )
        )


def _nan(values: np.ndarray) -> np.ndarray:
    values.flat[0] = np.nan
    return values


def _infinite(values: np.ndarray) -> np.ndarray:
    values.flat[-1] = -np.inf
    return values


def _scaled(at: Round, times: float) -> ProtectedUpdate:
    """Returns an update of a multiple of the greatest norm that is taken."""
    agreed = at.order.contract.contract
    shapes = {name: value.shape for name, value in at.order.weights.items()}
    bound = greatest_norm(agreed, agreed.site(HOSTILE), shapes)
    count = sum(value.size for value in at.order.weights.values())
    each = np.float32(times * bound / np.sqrt(count))
    return ProtectedUpdate({n: np.full_like(v, each) for n, v in at.order.weights.items()})


def _with_array(at: Round, shape: Any, dtype: str = "float32", data: bytes = b"\0" * 40) -> None:
    """Gives an answer one of whose arrays says anything of itself."""
    chunk, chunk_bytes = raw_object("ArrayChunk", [], data)
    said = {"dtype": dtype, "shape": shape, "stype": "numpy.ndarray.raw", "arraychunk_ids": [0]}
    _give_array(at, said, {chunk: chunk_bytes}, [chunk])


def _give_array(
    at: Round, said: Any, chunks: dict[str, bytes], children: list[str], names: Any = None
) -> None:
    one, one_bytes = raw_object("Array", children, json.dumps(said).encode())
    listed = dict.fromkeys(names or at.reply.update.arrays, one)
    record, record_bytes = raw_object("ArrayRecord", [one], json.dumps(listed).encode())
    rest = RecordDict(
        {k: v for k, v in wire.encode_reply(at.reply).items() if not isinstance(v, ArrayRecord)}
    )
    _, others = objects_of(message(rest))
    held = {key: value.object_id for key, value in rest.items()} | {"update": record}
    content, content_bytes = raw_object(
        "RecordDict", list(dict.fromkeys(held.values())), json.dumps(held).encode()
    )
    root, root_bytes = _root(at, content)
    wanted = {name: data for name, data in others.items() if name in held.values()}
    objects = {**wanted, **chunks, one: one_bytes, record: record_bytes, content: content_bytes}
    at.give_objects(root, {**objects, root: root_bytes})


def _root(at: Round, content: str) -> tuple[str, bytes]:
    """Returns a message's own object around any content object."""
    root, objects = at.whole()
    body = objects[root].partition(b"\0")[2]
    return raw_object("Message", [content], body)


def _surrogate(at: Round) -> None:
    """Names an array by half a character, which JSON can spell and no encoding can."""
    chunk, data = raw_object("ArrayChunk", [], bytes(40))
    said = {"dtype": "float32", "shape": [10], "stype": "numpy.ndarray.raw", "arraychunk_ids": [0]}
    _give_array(at, said, {chunk: data}, [chunk], names=["\ud800"])


def _bomb(at: Round) -> None:
    """One chunk of 4 MB that an array names a million times: 4 TB once inflated."""
    chunk, data = raw_object("ArrayChunk", [], b"\0" * 4_000_000)
    said = {
        "dtype": "float32",
        "shape": [10**12],
        "stype": "numpy.ndarray.raw",
        "arraychunk_ids": [0] * 1_000_000,
    }
    _give_array(at, said, {chunk: data}, [chunk])


def _many_names(at: Round) -> None:
    """One array under a hundred thousand names: each is copied where it is read."""
    chunk, data = raw_object("ArrayChunk", [], b"\0" * 4_000_000)
    said = {"dtype": "float32", "shape": [1_000_000], "stype": "numpy.ndarray.raw",
            "arraychunk_ids": [0]}  # fmt: skip
    one, one_bytes = raw_object("Array", [chunk], json.dumps(said).encode())
    names = {str(place): one for place in range(60_000)}
    record, record_bytes = raw_object("ArrayRecord", [one], json.dumps(names).encode())
    content, content_bytes = raw_object(
        "RecordDict", [record], json.dumps({"update": record}).encode()
    )
    root, root_bytes = _root(at, content)
    at.give_objects(
        root,
        {chunk: data, one: one_bytes, record: record_bytes, content: content_bytes,
         root: root_bytes},
    )  # fmt: skip


def _doubling_tree(at: Round) -> None:
    """A small tree in which each object holds the one before it twice: 2^60 objects, written out.

    Each is registered with the children it is first seen with, so the sent tree stays small.
    """
    names, objects = [], {}
    for place in range(60):
        name, data = raw_object("ArrayChunk", [], b"%d" % place)
        names.append(name)
        objects[name] = data
    root, root_bytes = raw_object("ArrayChunk", [], b"root")
    steps = [
        ObjectTree(object_id=after, children=[ObjectTree(object_id=before)] * 2)
        for before, after in pairwise(names)
    ]
    reply = at.one.begin(at.envelope.message_id, ObjectTree(object_id=root, children=steps))
    session = PushMessagesResponse.FromString(reply.content).session_id
    for name, data in {**objects, root: root_bytes}.items():
        assert at.one.upload(session, name, data).status_code == 200


def _error(at: Round) -> None:
    whole = make_message(
        metadata=message(RecordDict()).metadata, error=Error(7, "x\nforged line reason=none")
    )
    at.give_objects(*objects_of(whole))


def _refusal(site: str) -> Callable[[Round], RecordDict]:
    return lambda at: wire.encode_refusal(
        RefusalReply(site=site, round=1, reason=Reason.SITE_FAILED)
    )


def _undercharged(at: Round) -> RecordDict:
    """A ledger that is whole and signed, whose charge costs next to nothing."""
    links = list(at.reply.ledger.links)
    bodies = [json.loads(link.body) if link.body else None for link in links]
    start = next(i for i, body in enumerate(bodies) if body and body["kind"] == "charge"
                 and body["round"] == at.order.round)  # fmt: skip
    bodies[start]["event"]["noise_multiplier"] = (1e6).hex()
    since = at.reply.ledger.since
    previous = since.hash if since else entries.NO_PREVIOUS
    made = []
    for link, body in zip(links, bodies, strict=True):
        if body is None:
            made.append(link)
            previous = entries.link(previous, link.body_hash)
            continue
        body["previous"] = previous
        text = canonical.encode(body)
        made.append(witness.Link(entries.body_hash(text), text))
        previous = entries.link(previous, made[-1].body_hash)
    changed = replace(at.reply, ledger=replace(at.reply.ledger, links=tuple(made)))
    receipt = replace(at.reply.receipt, head_hash=previous)
    return wire.encode_reply(
        replace(changed, receipt=receipt, signature=at.insider.key.sign(receipt.digest()))
    )


def _hide(kind: str) -> Callable[[Round], RecordDict]:
    """Leaves out the bodies of one kind: only their hashes are shown."""

    def change(links: list[Any]) -> list[Any]:
        return [
            replace(link, body=b"") if b'"kind":"%s"' % kind.encode() in link.body else link
            for link in links
        ]

    return lambda at: at.links(change)


def _forged_body(links: list[Any]) -> list[Any]:
    last = links[-1]
    return [*links[:-1], replace(last, body=last.body.replace(b'"attempt":1', b'"attempt":2'))]


def _half_then_whole(at: Round) -> None:
    """Begins one answer, gives half of it, then gives another whole one: which is taken?"""
    half, _ = raw_object("ArrayChunk", [], b"never given")
    first, _ = at.whole()
    tree = ObjectTree(object_id=first, children=[ObjectTree(object_id=half)])
    assert at.one.begin(at.envelope.message_id, tree).status_code == 200
    at.give(at.of(_nan))


# What is given in each round, and the reason the server has for not using it.
CASES: dict[str, tuple[Callable[[Round], Any], str]] = {
    "not a number": (lambda at: at.of(_nan), INVALID),
    "infinite": (lambda at: at.of(_infinite), INVALID),
    "huge but finite": (lambda at: at.of(lambda v: np.full_like(v, 1e30)), INVALID),
    "over the greatest norm": (lambda at: at.released(_scaled(at, 1.01)), INVALID),
    "another shape": (lambda at: at.of(lambda v: v.reshape(-1)[:-1].copy()), INVALID),
    "an extra array": (
        lambda at: at.signed(
            ProtectedUpdate({**at.reply.update.arrays, "more": np.zeros(1, dtype=np.float32)})
        ),
        INVALID,
    ),
    "a missing array": (
        lambda at: at.signed(ProtectedUpdate(dict(list(at.reply.update.arrays.items())[1:]))),
        INVALID,
    ),
    "another dtype": (lambda at: _with_array(at, [5], "float64"), INVALID),
    "objects": (lambda at: _with_array(at, [5], "object"), INVALID),
    "a shape in words": (lambda at: _with_array(at, ["ten"]), FAILED),
    "a shape in fractions": (lambda at: _with_array(at, [2.0, 5.0]), FAILED),
    "a shape below zero": (lambda at: _with_array(at, [-10]), INVALID),
    "a shape of truths": (lambda at: _with_array(at, [True, 10]), INVALID),
    "a name that is no text": (_surrogate, INVALID),
    "unprotected": (lambda at: at.signed(UnprotectedUpdate(at.reply.update.arrays)), INVALID),
    "another contract": (lambda at: at.signed(contract="f" * 64), INVALID),
    "another round": (lambda at: at.signed(round=at.order.round + 1), INVALID),
    "a round before": (lambda at: at.signed(round=1), INVALID),
    "an update sent again": (lambda at: wire.encode_reply(at.said[0]), INVALID),
    "a forged signature": (
        lambda at: wire.encode_reply(replace(at.reply, signature=bytes(64))),
        INVALID,
    ),
    "a receipt of another update": (lambda at: at.signed(update="0" * 64), INVALID),
    "a head of its own making": (lambda at: at.signed(head_hash="0" * 64), INVALID),
    "a head further on": (
        lambda at: at.signed(head_sequence=at.reply.receipt.head_sequence + 1),
        INVALID,
    ),
    "in another site's name": (lambda at: at.signed(site=ALPHA), INVALID),
    "in another site's name, by its own ledger key": (
        lambda at: at.signed(
            site=ALPHA, key=keys.load(at.insider.layout.site(ALPHA).parent / "ledger.pem")
        ),
        INVALID,
    ),
    "by another site's ledger key": (
        lambda at: at.signed(key=keys.load(at.insider.layout.site(ALPHA).parent / "ledger.pem")),
        INVALID,
    ),
    "a site that does not exist": (lambda at: at.signed(site="nobody\nforged line"), INVALID),
    "links cut": (lambda at: at.links(lambda links: links[1:]), INVALID),
    "links cut at the end": (lambda at: at.links(lambda links: links[:-1]), INVALID),
    "links turned": (lambda at: at.links(lambda links: links[::-1]), INVALID),
    "no links": (lambda at: at.links(lambda links: []), INVALID),
    "a body forged": (lambda at: at.links(_forged_body), INVALID),
    "a charge not shown": (_hide("charge"), INVALID),
    "a release not shown": (_hide("release"), INVALID),
    "a charge that costs less": (_undercharged, INVALID),
    "a witness forged": (
        lambda at: wire.encode_reply(
            replace(
                at.reply,
                ledger=replace(
                    at.reply.ledger,
                    since=witness.sign(
                        HOSTILE,
                        HOSTILE,
                        entries.Head(0, "0" * 64),
                        at.insider.key,
                    ),
                ),
            )
        ),
        INVALID,
    ),
    "a refusal in another's name": (_refusal(ALPHA), Reason.SITE_FAILED.value),
    "a reason that is none": (
        lambda at: RecordDict(
            {"refusal": ConfigRecord({"site": "x", "round": 1, "reason": "n = 433"})}
        ),
        INVALID,
    ),
    "an extra record": (
        lambda at: RecordDict({**wire.encode_reply(at.reply), "more": ConfigRecord({"n": 433})}),
        INVALID,
    ),
    "metrics": (lambda at: RecordDict({"metrics": MetricRecord({"n": 433})}), FAILED),
    "nothing": (lambda at: RecordDict(), INVALID),
    "a pickled array": (
        lambda at: RecordDict(
            {
                "update": ArrayRecord([np.zeros(3)]),
                "receipt": ConfigRecord({}),
                "ledger": ConfigRecord({}),
            }
        ),
        INVALID,
    ),
    "an error": (_error, FAILED),
    "no message": (
        lambda at: at.give_objects(*_alone(raw_object("ConfigRecord", [], b""))),
        FAILED,
    ),
    "no object of Flower's": (
        lambda at: at.give_objects(*_alone((canonical.sha256(b"x"), b"x"))),
        FAILED,
    ),
    "an array that grows": (_bomb, FAILED),
    "an array of many names": (_many_names, FAILED),
    "a tree that doubles": (_doubling_tree, FAILED),
    "half of one, then another": (_half_then_whole, INVALID),
}


def _alone(one: tuple[str, bytes]) -> tuple[str, dict[str, bytes]]:
    return one[0], dict([one])


@dataclass(frozen=True)
class Done:
    """A run that has ended, and what it left."""

    processes: Logged
    state: dict[str, Any]

    def refused(self, number: int) -> list[tuple[str, str]]:
        return [(r["site"], r["reason"]) for r in self.state["refused"] if r["round"] == number]

    def replied(self, number: int) -> int:
        return int(self.state["metrics"][number - 1]["replied"])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Done]:
    """A whole run: a round for each hostile answer, and three more.

    In the first of those a large update that is yet within bounds, then a final refusal by a node
    that says it is the honest site's, and then the honest site alone.
    """
    layout = lay_out(
        tmp_path / "federation",
        (ALPHA, HOSTILE),
        rounds=len(CASES) + 3,
        minimum_cohort=1,
        training={"local_steps": 1, "learning_rate": 0.5},
    )
    edit(layout.federation, 'out = "run"\n', 'out = "run"\ngreatest_reply_mib = 64\n')
    with Logged(layout) as processes:
        processes.serve()
        insider, said = Insider(layout), []
        processes.join(ALPHA)
        until(lambda: processes.lines("server", event="connected", site=ALPHA), "alpha connects")
        with caller(layout) as one:
            one.activate(seconds=600)
            for attack, _ in CASES.values():
                at = Round(one, insider, said)
                said.append(at.reply)
                content = attack(at)
                if content is not None:
                    at.give(content)
            at = Round(one, insider, said)
            at.give(at.released(_scaled(at, 0.99)))
            at = Round(one, insider, said)
            last = RefusalReply(site=ALPHA, round=1, reason=Reason.BUDGET_EXHAUSTED)
            at.give(wire.encode_refusal(last), src_node_id=_node(layout, ALPHA))
        processes.wait_for_server(WAIT_SECONDS)
        yield Done(processes, state(layout))


def test_no_hostile_answer_is_used_and_every_round_completes(run: Done) -> None:
    """One run for all: what is asked of its logs is asked here too."""
    layout, met = run.processes.layout, {}
    for number, case in enumerate(CASES, start=1):
        met[case] = (run.refused(number), run.replied(number))
    assert met == {case: ([(HOSTILE, reason)], 1) for case, (_, reason) in CASES.items()}
    for reason in {reason for _, reason in CASES.values()} | {"unreadable-answer"}:
        assert run.processes.lines("server", event="refused", site=HOSTILE, reason=reason)

    large = len(CASES) + 1  # an update that honest steps could just reach is used
    assert (run.refused(large), run.replied(large)) == ([], 2)

    last = large + 1  # a node refuses for its own site, and the one that it named is asked still
    assert run.refused(last) == [(HOSTILE, Reason.BUDGET_EXHAUSTED.value)]
    assert (run.replied(last), run.replied(last + 1)) == (1, 1)

    assert summary(layout)["rounds"] == len(CASES) + 3
    assert charges(layout, ALPHA) == len(CASES) + 3
    assert {refusal["site"] for refusal in summary(layout)["refused"]} == {HOSTILE}
    assert "server-failed" not in run.processes.reasons("server")
    for line in run.processes.log("server").splitlines():
        assert not line.startswith("forged"), line
    no_log_holds_a_key_a_true_size_a_loss_or_a_weight(run)


# What the logs must not hold


def secrets_of(layout: Layout) -> dict[str, list[str]]:
    """Returns every spelling of every private key of a federation, by file."""
    found = {}
    for path in sorted(layout.root.rglob("*.pem")):
        if b"PRIVATE KEY" not in path.read_bytes():
            continue
        key = (
            serialization.load_ssh_private_key(path.read_bytes(), None)
            if b"OPENSSH" in path.read_bytes()
            else serialization.load_pem_private_key(path.read_bytes(), None)
        )
        if isinstance(key, Ed25519PrivateKey):
            raw = key.private_bytes_raw()
        else:
            raw = key.private_numbers().private_value.to_bytes(48, "big")  # type: ignore[union-attr]
        found[str(path.relative_to(layout.root))] = spellings(raw) + [
            line for line in path.read_text().splitlines() if not line.startswith("-")
        ]
    return found


def spellings(raw: bytes) -> list[str]:
    """Returns how bytes could be written; pieces, since base64 depends on where it begins."""
    encoded = [base64.b64encode(raw[start:])[4:-4].decode() for start in range(3)]
    return [raw.hex(), raw.hex().upper(), str(int.from_bytes(raw, "big")), repr(raw)[2:-1],
            *encoded, *(e.replace("+", "-").replace("/", "_") for e in encoded)]  # fmt: skip


def words_of(log: str) -> str:
    """Returns the words of a log without its times, and without the folder it stands in."""
    lines = []
    for line in log.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            lines.append(line)
            continue
        event.pop("time", None)
        if event.get("event") == "charged":  # ε so far, from public terms and the ledger alone
            event["message"] = re.sub(r"epsilon \d+\.\d{4} by", "", event["message"])
        lines.append(json.dumps(event))
    return "\n".join(lines)


def leaks(log: str, secrets: dict[str, list[str]], sizes: list[int]) -> list[str]:
    """Returns what of the private a log tells: keys in any spelling, true sizes, exact figures."""
    words = words_of(log)
    found = [file for file, texts in secrets.items() if any(text in words for text in texts)]
    found += [str(size) for size in sizes if re.search(rf"(?<![\w.-]){size}(?![\w-])", words)]
    return found + re.findall(r"-?\d+\.\d{3,}(?:e-?\d+)?", words)


def no_log_holds_a_key_a_true_size_a_loss_or_a_weight(run: Done) -> None:
    layout = run.processes.layout
    secrets = secrets_of(layout)
    # coordinator, authority, witness, server's TLS; ledger and node of each site
    assert len(secrets) == 8
    sizes = [len(load_part(describe("digits"), None, f"{place}/2")) for place in (1, 2)]
    assert leaks(run.processes.log(ALPHA), secrets, sizes) == []
    # Its last line is the summary: figures of public examples, and ε from public terms.
    served = "\n".join(run.processes.log("server").splitlines()[:-1])
    assert leaks(served, secrets, sizes) == []
    for path in layout.root.rglob("*.sqlite"):
        held = path.read_bytes()
        for texts in secrets.values():
            assert not any(text.encode() in held for text in texts), path


def test_the_search_for_leaks_finds_each_kind(tmp_path: Path) -> None:
    layout = lay_out(tmp_path / "federation", (ALPHA, HOSTILE))
    secrets = secrets_of(layout)
    raw = keys.load(layout.site(ALPHA).parent / "ledger.pem").private.private_bytes_raw()
    for planted in (
        raw.hex(),
        base64.b64encode(b"x" + raw).decode(),
        base64.urlsafe_b64encode(b"xy" + raw).decode(),
        next(iter(secrets.values()))[-1],
        "650 examples",
        "loss 0.6931471",
        "weight -1.25e-3, 0.1250",
    ):
        assert leaks(json.dumps({"time": "t", "message": planted}), secrets, [650]), planted
    assert (
        leaks(json.dumps({"time": "12:00:00.650Z", "message": "port 16503"}), secrets, [650]) == []
    )


# Orders


def _rows(layout: Layout, query: str, *values: Any) -> list[Any]:
    path = layout.federation.parent / "state" / "superlink.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(query, values).fetchall()


def _node(layout: Layout, name: str) -> int:
    public = caller(layout, name)
    with public:
        (row,) = _rows(layout, "SELECT node_id FROM node WHERE public_key = ?", public.public)
    return int(row[0]) % 2**64


def test_an_order_is_its_nodes_alone(tmp_path: Path) -> None:
    """Fetching, answering and feeding another site's order; and every way to answer one's own."""
    layout = lay_out(tmp_path / "federation", (ALPHA, HOSTILE), rounds=1)
    with (
        Logged(layout) as processes,
        caller(layout, ALPHA) as victim,
        caller(layout) as one,
    ):
        processes.serve()
        victim.activate(), one.activate()
        theirs, their_tree = victim.order()
        mine, _ = one.order()
        root = their_tree.object_id

        def refusal(reply: httpx.Response, status: int, reason: str) -> None:
            assert (reply.status_code, reply.json()["detail"]) == (status, reason)
            processes.await_refusal("server", reason)

        refusal(one.fetch(root), 404, "not-your-object")
        alone = ObjectTree(object_id="0" * 64)
        refusal(one.begin(theirs.message_id, alone), 410, "no-such-order")
        refusal(one.begin("1" * 64, alone), 410, "no-such-order")
        refusal(
            one.begin(mine.message_id, alone, src_node_id=victim.node),
            400,
            "answers-for-another-site",
        )
        bad = ObjectTree(object_id="not a name\nforged line")
        refusal(one.begin(mine.message_id, bad), 400, "bad-request")
        refusal(one.begin(mine.message_id, alone, message_id="2" * 64), 400, "bad-request")
        begun = victim.begin(theirs.message_id, ObjectTree(object_id="3" * 64))
        session = PushMessagesResponse.FromString(begun.content).session_id
        refusal(one.upload(session, "3" * 64, b"x"), 404, "not-your-object")
        refusal(victim.upload(session, "3" * 64, b"x"), 400, "bad-request")
        refusal(victim.upload(session, "4" * 64, b"x"), 404, "not-your-object")

        # The victim's half answer holds objects of the same name, and is not disturbed.
        answers = {}
        for name, who, order in ((ALPHA, victim, theirs), (HOSTILE, one, mine)):
            insider = Insider(layout, name)
            told = insider.reply(wire.decode_order(who.read(who_tree(who, order)).content))
            answers[name] = wire.encode_reply(told)
        give(one, mine.message_id, answers[HOSTILE])
        late = one.begin(mine.message_id, alone)
        assert late.json()["detail"] in ("already-answered", "no-such-order")  # taken by now
        give(victim, theirs.message_id, answers[ALPHA])
        processes.wait_for_server(WAIT_SECONDS)
        assert summary(layout)["rounds"] == 1
        assert summary(layout)["refused"] == []


def who_tree(one: Caller, order: Any) -> ObjectTree:
    """Returns the tree of an order, asked for anew as after a restart."""
    one.shown = incarnation.new(one.key)
    one.activate()
    again, tree = one.order()
    assert again.message_id == order.message_id
    return tree


def test_a_late_answer_and_one_sent_again_are_refused(tmp_path: Path) -> None:
    layout = lay_out(tmp_path / "federation", (HOSTILE,), rounds=2, minimum_cohort=1)
    with Logged(layout) as processes, caller(layout) as one:
        processes.serve()
        one.activate()
        insider, said = Insider(layout), []
        first = Round(one, insider, said)
        first.give(wire.encode_reply(first.reply))
        second = Round(one, insider, said)
        with pytest.raises(AssertionError, match="no-such-order"):
            first.give(wire.encode_reply(first.reply))
        processes.await_refusal("server", "no-such-order")
        second.give(wire.encode_reply(second.reply))
        processes.wait_for_server(WAIT_SECONDS)
        assert summary(layout)["rounds"] == 2


def test_an_answer_larger_than_allowed_is_refused_as_it_comes(tmp_path: Path) -> None:
    layout = lay_out(tmp_path / "federation", (HOSTILE,), rounds=1, minimum_cohort=1)
    edit(layout.federation, 'out = "run"\n', 'out = "run"\ngreatest_reply_mib = 16\n')
    with Logged(layout) as processes, caller(layout) as one:
        server = processes.serve()
        one.activate()
        at = Round(one, Insider(layout), [])
        held = []
        for _ in range(12):  # begun again and again, each time almost to the bound
            pieces = dict(
                raw_object("ArrayChunk", [], secrets.token_bytes(4_000_000)) for _ in range(5)
            )
            root, *_ = pieces
            others = [ObjectTree(object_id=name) for name in pieces if name != root]
            begun = one.begin(at.envelope.message_id, ObjectTree(object_id=root, children=others))
            session = PushMessagesResponse.FromString(begun.content).session_id
            status = [
                one.upload(session, name, content).status_code for name, content in pieces.items()
            ]
            assert status == [200, 200, 200, 200, 413]
            held.append(memory_mib(server.pid))
        processes.await_refusal("server", "too-large")
        assert held[-1] < held[3] + 64  # each is forgotten with the next: else it were 128
        at.give(wire.encode_reply(at.reply))
        processes.wait_for_server(WAIT_SECONDS)
        assert summary(layout)["rounds"] == 1


# Ledgers put back, and two processes


def test_a_ledger_put_back_is_noticed_by_its_site_and_by_the_server(tmp_path: Path) -> None:
    """The hostile site sets the pace: each round waits for its answer."""
    sites = (ALPHA, BETA)
    layout = lay_out(tmp_path / "federation", (*sites, HOSTILE), rounds=4, minimum_cohort=1)
    old = {name: tmp_path / f"{name}.sqlite" for name in sites}
    with Logged(layout) as processes, caller(layout) as pace:
        processes.serve()
        processes.join(*sites)
        pace.activate(seconds=600)
        insider = Insider(layout)
        for number in (1, 2):
            at = Round(pace, insider, [])
            for name in sites:
                ledger = layout.ledger(name)
                until(lambda f=ledger, n=number: entries_of(f, "release") == n, "sites answer")
                if number == 1:
                    shutil.copy(ledger, old[name])
                else:
                    processes.stop(name)
            at.give(wire.encode_reply(at.reply))
        until(lambda: state(layout).get("round") == 2, "two rounds")
        assert state(layout)["refused"] == []

        # With its head file a site does not even start.
        for name in sites:
            shutil.copy(old[name], layout.ledger(name))
        processes.join(ALPHA)
        code, line = processes.ended(ALPHA)
        assert code == 1
        assert "entries seen before are gone" in line

        # Without it a site hears it from the server; one that looks away is caught by the server.
        edit(layout.site(BETA), 'head_file = "head.json"\n', "")
        processes.join(BETA)
        until(lambda: len(processes.lines("server", event="connected", site=BETA)) == 2, "beta")
        with caller(layout, ALPHA) as patched:
            patched.activate()
            at = Round(pace, insider, [])
            at.give(wire.encode_reply(at.reply))
            behind = Round(patched, Insider(layout, ALPHA, ledger=old[ALPHA]), [])
            behind.give(wire.encode_reply(behind.reply))
            processes.await_refusal(BETA, "ledger-rolled-back")
            at = Round(pace, insider, [])
            at.give(wire.encode_reply(at.reply))
            processes.wait_for_server(WAIT_SECONDS)
        for name in sites:
            assert processes.lines("server", reason="ledger-rolled-back", site=name)
        assert summary(layout)["refused"] == [
            {"site": name, "round": 4, "reason": "ledger-rolled-back"} for name in sites
        ]
        assert summary(layout)["rounds"] == 4
        assert charges(layout, BETA) == 1


def test_of_two_processes_with_one_key_the_newest_serves_and_a_killed_one_is_back_at_once(
    tmp_path: Path,
) -> None:
    layout = lay_out(tmp_path / "federation", (ALPHA, HOSTILE), rounds=1)
    twin = layout.site(ALPHA).parent.with_name("twin")
    shutil.copytree(layout.site(ALPHA).parent, twin)  # the same keys, another state
    with Logged(layout) as processes, caller(layout) as pace:
        processes.serve()
        processes.join(ALPHA)
        until(lambda: processes.lines(ALPHA, event="connected"), "alpha connects")

        # A second process on the same state does not start.
        edit(layout.site(ALPHA), 'device = "cpu"', 'device = "cpu" ')
        with Logged(replace(layout)) as second:
            second.running.clear()
            process = second._start("second", ["client", str(layout.site(ALPHA))])
            assert process.wait(timeout=WAIT_SECONDS) == 1
            assert "one process serves a site" in second.log("second").splitlines()[-1]

        # One on a state of its own does, and the older one is told and ends.
        processes._start("twin", ["client", str(twin / "SITE.toml"), "--log-format", "json"])
        until(lambda: processes.lines("twin", event="connected"), "the twin connects")
        code, line = processes.ended(ALPHA)
        assert code == 1
        assert "another process with this site's key has connected since" in line
        processes.await_refusal("server", "superseded")
        assert ALPHA in online(layout)  # the older one did not take the newer one's node along

        # Killed, it is let in again as fast as it can start.
        processes.kill("twin")
        processes._start("again", ["client", str(twin / "SITE.toml"), "--log-format", "json"])
        until(lambda: processes.lines("again", event="connected"), "it connects again")
        refused = [line for line in processes.lines("again") if line["event"] == "disconnected"]
        assert refused == []

        pace.activate()
        at = Round(pace, Insider(layout), [])
        at.give(wire.encode_reply(at.reply))
        processes.wait_for_server(WAIT_SECONDS)
        assert summary(layout)["rounds"] == 1
        assert summary(layout)["refused"] == []


def online(layout: Layout) -> set[str]:
    rows = _rows(
        layout, "SELECT name FROM node WHERE status = 'online' AND online_until > ?", now()
    )
    return {name for (name,) in rows}


def now() -> float:
    return time.time()
