"""The ledger under what really happens to files: crashes, full disks, several processes."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bract.client.permits import Permit
from bract.shared import arrays, keys
from bract.shared.errors import LedgerBusy, LedgerError, Reason, Refusal, VerificationFailed
from bract.shared.messages import TrainReply
from bract.shared.privacy import contents, entries, ledger, ledger_file, verification
from bract.shared.privacy.entries import Head
from bract.shared.privacy.ledger import Ledger
from bract.shared.privacy.transaction import Transaction

ALPHA = ("alpha", "ward")


def charged(world: Any, rounds: int = 3) -> Any:
    """Returns the gate of a site that served some rounds."""
    gate, signed = world.gate(), world.sign(world.contract())
    for number in range(1, rounds + 1):
        world.serve(gate, world.order(signed, number))
    return gate


def hashes(path: Path, key: str) -> list[str]:
    rows = contents.read(path).rows.get(ALPHA, [])
    return [entries.read(text, signature, key=key).hash for _, text, signature in rows]


def edit(path: Path, *statements: str) -> None:
    """Alters a ledger behind its back."""
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_chain_survives_that_its_file_is_closed_and_opened(world: Any) -> None:
    gate = charged(world)
    before = hashes(world.ledger_path, world.key.public)
    gate.ledger.close()
    agreed = world.sign(world.contract())
    world.serve(world.gate(), world.order(agreed))
    after = hashes(world.ledger_path, world.key.public)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 2


def test_a_file_that_an_earlier_bract_began_is_charged_and_verified_as_before(world: Any) -> None:
    edit(
        world.ledger_path,
        "CREATE TABLE entries (\n    site TEXT NOT NULL, domain TEXT NOT NULL, sequence INTEGER NOT"
        " NULL,\n    body TEXT NOT NULL, signature BLOB NOT NULL,\n    PRIMARY KEY (site, domain,"
        " sequence)\n) WITHOUT ROWID, STRICT",
        "CREATE TABLE witnesses (\n    site TEXT NOT NULL, domain TEXT NOT NULL, key TEXT NOT NULL,"
        " body TEXT NOT NULL,\n    PRIMARY KEY (site, domain, key)\n) WITHOUT ROWID, STRICT",
        "CREATE TABLE documents (\n    kind TEXT NOT NULL, sha256 TEXT NOT NULL, body TEXT NOT"
        " NULL,\n    PRIMARY KEY (kind, sha256)\n) WITHOUT ROWID, STRICT",
        f"PRAGMA application_id = {ledger_file.APPLICATION_ID}",
        "PRAGMA user_version = 1",
    )
    gate = charged(world)
    found = verification.verify(gate.ledger.path, site_keys={"alpha": world.key.public}, anchors={})
    assert len(hashes(world.ledger_path, world.key.public)) == 7
    assert found


def test_a_file_is_little_more_than_what_it_holds(world: Any) -> None:
    quiet = {"sampling_rate": 0.01, "noise_multiplier": 4.0}
    signed = world.sign(world.contract(rounds=40, max_attempts=40, privacy=quiet))
    gate = world.gate()
    for number in range(1, 41):
        world.serve(gate, world.order(signed, number))
    held = contents.read(gate.ledger.path)
    entries_held = sum(len(text) + len(signed) for _, text, signed in held.rows[ALPHA])
    documents = sum(map(len, held.documents.values()))
    assert gate.ledger.path.stat().st_size < 1.5 * (entries_held + documents) + 8 * 4096


def test_the_file_explains_its_entries_by_the_documents_that_they_name(world: Any) -> None:
    gate = charged(world)
    held = contents.read(world.ledger_path)
    bodies = [
        entries.read(text, signature, key=world.key.public).body
        for _, text, signature in held.rows[ALPHA]
    ]
    named = {("policy", body.policy) for body in bodies}
    named |= {("contract", body.contract) for body in bodies if hasattr(body, "contract")}
    assert set(held.documents) == named
    assert held.documents["policy", gate.policy.sha256] == gate.policy.to_bytes()


def write_and_fail(world: Any, gate: Any, error: type[BaseException], number: int = 1) -> None:
    """Adds a release and a document in a transaction that then fails."""
    with gate.ledger.transaction() as transaction:
        chain = transaction.chain(*ALPHA, key=world.key.public)
        (contract,), before = chain.attempts, chain.length
        facts = {"kind": "release", "contract": contract, "round": number, "update": "0" * 64}
        body = entries.Release.model_validate({**gate.book.common(chain, 1), **facts})
        transaction.append(chain, body, world.key)
        transaction.keep("policy", "a" * 64, b"{}")
        assert chain.length == before + 1
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_transaction_that_fails_leaves_nothing(world: Any, error: type[BaseException]) -> None:
    gate = world.gate()
    gate.admit(world.order(world.sign(world.contract())))
    before = world.ledger_path.read_bytes()
    with pytest.raises(error):
        write_and_fail(world, gate, error)
    assert world.ledger_path.read_bytes() == before
    with gate.ledger.transaction() as transaction:
        assert transaction.chain(*ALPHA, key=world.key.public).length == 2


def test_what_another_process_added_is_read_on(world: Any) -> None:
    one, two = charged(world, rounds=1), world.gate()
    agreed = world.sign(world.contract())
    world.serve(two, world.order(agreed, 1))
    world.serve(one, world.order(agreed, 2))
    world.serve(two, world.order(agreed, 3))
    assert len(hashes(world.ledger_path, world.key.public)) == 1 + 2 * 4


@pytest.mark.parametrize(
    "cut",
    [
        "DELETE FROM entries WHERE sequence = (SELECT max(sequence) FROM entries)",
        "DELETE FROM entries",
    ],
    ids=["tail", "all"],
)
def test_a_file_that_lost_entries_stays_refused_by_the_process_that_saw_them(
    world: Any, cut: str
) -> None:
    gate = charged(world)
    edit(world.ledger_path, cut)
    order = world.order(world.sign(world.contract()))
    for _ in range(2):
        with pytest.raises(Refusal, match="gone or changed") as refused:
            gate.admit(order)
        assert refused.value.reason is Reason.LEDGER_ROLLED_BACK


def test_an_older_copy_is_refused_even_after_a_transaction_that_failed(world: Any) -> None:
    gate, signed = world.gate(), world.sign(world.contract())
    world.serve(gate, world.order(signed, 1))
    gate.admit(world.order(signed, 2))
    with pytest.raises(ValueError):  # noqa: PT011  raised as it is, without words
        write_and_fail(world, gate, ValueError, 2)
    edit(world.ledger_path, "DELETE FROM entries WHERE sequence = 3")
    with pytest.raises(Refusal, match="gone or changed"):
        gate.admit(world.order(signed, 3))


def test_a_refused_order_does_not_make_the_site_read_its_ledger_anew(world: Any) -> None:
    gate = charged(world)
    with gate.ledger.transaction() as transaction:
        before = transaction.chain(*ALPHA, key=world.key.public)
    with pytest.raises(Refusal, match="budget-exhausted"):
        gate.admit(world.order(world.sign(world.contract(rounds=300, max_attempts=300))))
    with gate.ledger.transaction() as transaction:
        assert transaction.chain(*ALPHA, key=world.key.public) is before


def test_an_altered_entry_keeps_a_site_from_charging(world: Any) -> None:
    charged(world).ledger.close()
    edit(world.ledger_path, "UPDATE entries SET signature = zeroblob(64) WHERE sequence = 2")
    with pytest.raises(Refusal) as refused:
        world.gate().admit(world.order(world.sign(world.contract())))
    assert refused.value.reason is Reason.LEDGER_UNAVAILABLE


def test_a_consistent_copy_can_be_taken_while_the_ledger_is_open(world: Any) -> None:
    gate, copy = charged(world), world.folder / "copy.sqlite"
    gate.ledger.copy_to(copy)
    assert hashes(copy, world.key.public) == hashes(world.ledger_path, world.key.public)


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    text, other, newer = (tmp_path / name for name in ("a.sqlite", "b.sqlite", "c.sqlite"))
    text.write_bytes(b"no database at all" * 100)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE entries (a)")
    Ledger(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 2")
    for path, said in ((text, "ledger"), (other, "no bract ledger"), (newer, "schema 2")):
        with pytest.raises(LedgerError, match=said):
            contents.read(path)
    with pytest.raises(LedgerError, match="no ledger at"):
        contents.read(tmp_path / "missing.sqlite")
    with pytest.raises(LedgerError, match="schema 2"):
        Ledger(newer)
    with pytest.raises(LedgerError):
        Ledger(text)


# What follows runs in processes of their own: one that imports once and forks a child for each
# request, so that a child is charging within milliseconds and can be killed at any moment.
HOST = """
import json, os, resource, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from bract.client.gate import Gate
from bract.client.updates import UpdateStore
from bract.shared import contract, keys
from bract.shared.errors import BractError, Refusal
from bract.shared.messages import TrainOrder
from bract.shared.policy import Policy
from bract.shared.privacy.ledger import Ledger
from bract.shared.updates import ProtectedUpdate

folder = Path(sys.argv[1])
opened = []

def gate(name):
    return Gate(
        policy=Policy.model_validate_json((folder / "policy.json").read_bytes()),
        key=keys.load(folder / "key.pem"),
        ledger=Ledger(folder / "alpha.sqlite"),
        updates=UpdateStore(folder / name),
        holdings=SimpleNamespace(
            check=lambda domain, data: None, open=lambda domain, data: opened.append(1)
        ),
        simulation=False,
        randomness="csprng",
    )

def admit(site, number):
    weights = {"w": np.full(3, number, np.float32)}
    signed = contract.read(folder / f"{site.updates._folder.name}.json")
    permit = site.admit(TrainOrder(contract=signed, round=number, weights=weights))
    permit.open_examples()
    return permit

def release(site, permit):
    return site.release(permit, ProtectedUpdate({"w": np.full(3, permit.round, np.float32)}))

def charge(say, name, first, count):
    site = gate(name)
    for number in range(first, first + count):
        permit = admit(site, number)
        say(round=number, attempt=permit.attempt)
        receipt = release(site, permit).receipt
        say(head=[receipt.head_sequence, receipt.head_hash])

def hold(say, until):
    with Ledger(folder / "alpha.sqlite").transaction():
        say(held=True)
        while not Path(until).exists():
            time.sleep(0.01)

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def fill(say):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    site, number = gate("full"), 0
    limit((folder / "alpha.sqlite").stat().st_size)
    try:
        while number < 200:
            number += 1
            say(admitted=admit(site, number).attempt, round=number)
    except Refusal as refusal:
        limit(resource.RLIM_INFINITY)
        say(refused=refusal.reason, cause=type(refusal.__cause__).__name__, opened=len(opened))
    permit = admit(site, number)
    say(round=number, attempt=permit.attempt)
    limit(16)
    try:
        release(site, permit)
    except BractError as error:
        limit(resource.RLIM_INFINITY)
        say(unreleased=type(error).__name__)
    permit = admit(site, number)
    say(round=number, attempt=permit.attempt)
    receipt = release(site, permit).receipt
    say(head=[receipt.head_sequence, receipt.head_hash], opened=len(opened))

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    acknowledged, call, arguments = request
    child = os.fork()
    if child == 0:
        file = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        def say(**values):
            os.write(file, json.dumps(values).encode() + b"\\n")
        try:
            globals()[call](say, *arguments)
            say(done=True)
        except BaseException as error:
            say(failed=repr(error))
        os._exit(0)
    print(child, flush=True)
"""


class Child:
    """A process that charges; `said` is what it acknowledged so far."""

    def __init__(self, pid: int, file: Path) -> None:
        self.pid, self._file = pid, file

    @property
    def said(self) -> list[dict[str, Any]]:
        text = self._file.read_text() if self._file.exists() else ""
        # Killed while it wrote: half a line acknowledges nothing.
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def wait(self, until: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 60
        while not any(until(line) for line in self.said):
            assert not any("failed" in line for line in self.said), self.said[-1]
            assert time.monotonic() < deadline, "the child says nothing"
            time.sleep(0.01)
        return self.said

    def finish(self) -> list[dict[str, Any]]:
        return self.wait(lambda line: "done" in line)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


Fork = Callable[..., Child]


@pytest.fixture
def fork(world: Any) -> Iterator[Fork]:
    privacy = {"sampling_rate": 0.001, "noise_multiplier": 100.0}
    for name in ("one", "two", "before", "full"):  # a contract each, whose rounds only go on
        agreed = world.contract(rounds=100_000, max_attempts=200_000, privacy=privacy)
        (world.folder / f"{name}.json").write_bytes(world.sign(agreed).to_bytes())
    (world.folder / "policy.json").write_bytes(world.policy().to_bytes())
    keys.save(world.key, world.folder / "key.pem")
    command = [sys.executable, "-c", HOST, str(world.folder)]
    pipe = subprocess.PIPE
    children: list[Child] = []
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as host:
        assert host.stdin is not None
        assert host.stdout is not None
        assert host.stdout.readline() == "ready\n"

        def start(call: str, *arguments: Any) -> Child:
            file = world.folder / f"child-{len(children)}.jsonl"
            print(json.dumps([str(file), call, arguments]), file=host.stdin, flush=True)
            children.append(Child(int(host.stdout.readline()), file))
            return children[-1]

        yield start
        host.stdin.close()


def check_whole(world: Any, acknowledged: list[dict[str, Any]]) -> int:
    """Returns the length of the ledger, which verifies and holds all that was acknowledged."""
    found = hashes(world.ledger_path, world.key.public)
    for line in acknowledged:
        if "head" in line:
            sequence, digest = line["head"]
            assert found[sequence] == digest
    heads = [Head(*line["head"]) for line in acknowledged if "head" in line]
    anchors = {ALPHA: max(heads, key=lambda head: head.sequence)} if heads else {}
    (held,) = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors=anchors
    )
    contracts = held.chain.attempts.keys()
    for line in acknowledged:
        if "attempt" in line:
            found = [held.chain.charges.get((name, line["round"]), []) for name in contracts]
            assert max(map(len, found)) >= line["attempt"]
    return held.chain.length


def test_two_processes_charge_one_ledger_and_lose_nothing(world: Any, fork: Fork) -> None:
    children = [fork("charge", name, first, 40) for name, first in (("one", 1), ("two", 1001))]
    said = [line for child in children for line in child.finish()]
    assert sum("attempt" in line for line in said) == 80
    assert check_whole(world, said) == 1 + 2 * 80


def test_a_ledger_held_too_long_by_another_process_is_busy_and_loses_nothing(
    world: Any, fork: Fork
) -> None:
    gate = charged(world)
    impatient = world.gate(ledger=Ledger(world.ledger_path, timeout_seconds=0.1))
    before, until = hashes(world.ledger_path, world.key.public), world.folder / "go"
    holder = fork("hold", str(until))
    holder.wait(lambda line: "held" in line)
    order = world.order(world.sign(world.contract()))
    with pytest.raises(Refusal) as refused:
        impatient.admit(order)
    assert refused.value.reason is Reason.LEDGER_UNAVAILABLE
    assert isinstance(refused.value.__cause__, LedgerBusy)
    with pytest.raises(LedgerBusy, match="another process"):
        Ledger(world.ledger_path, timeout_seconds=0.1)
    until.touch()
    holder.finish()
    assert hashes(world.ledger_path, world.key.public) == before
    assert isinstance(impatient.admit(order), Permit)
    gate.ledger.close()
    assert check_whole(world, []) == len(before) + 1


def test_a_full_disk_refuses_before_the_data_is_opened_and_loses_nothing(
    world: Any, fork: Fork
) -> None:
    fork("charge", "before", 50_000, 1).finish()
    said = fork("fill").finish()
    admitted = sum("admitted" in line for line in said)
    (refused,) = (line for line in said if "refused" in line)
    assert refused == {
        "refused": Reason.LEDGER_UNAVAILABLE.value,
        "cause": "LedgerUnwritable",
        "opened": admitted,
    }
    # The charge of an update that could not be stored stands: its round is charged again.
    assert [line["unreleased"] for line in said if "unreleased" in line] == ["LedgerUnwritable"]
    assert [line["attempt"] for line in said if "attempt" in line] == [1, 2]
    assert check_whole(world, said) == (1 + 2) + admitted + 2 + 1


def test_nothing_acknowledged_is_lost_to_a_storm_of_kills(world: Any, fork: Fork) -> None:
    dice, rounds = random.Random(), iter(range(1, 100_000, 1000))
    names = ("one", "two")
    running = {name: fork("charge", name, next(rounds), 1000) for name in names}
    started = list(running.values())
    for _ in range(15):
        time.sleep(dice.uniform(0.02, 0.25))
        name = dice.choice(names)
        running[name].kill()
        running[name] = fork("charge", name, next(rounds), 1000)
        started.append(running[name])
    for child in running.values():
        child.wait(lambda line: "head" in line)  # a ledger left by kills is charged again
        child.kill()
    time.sleep(0.1)
    said = [line for child in started for line in child.said]
    assert not any("failed" in line for line in said)
    Ledger(world.ledger_path).close()  # undoes a write that the last kill interrupted
    length = check_whole(world, said)
    assert length > sum("attempt" in line for line in said) > 1


def test_a_chain_of_an_unpinned_key_is_not_read(world: Any) -> None:
    gate = charged(world)
    with pytest.raises(VerificationFailed), gate.ledger.transaction() as transaction:
        transaction.chain(*ALPHA, key=keys.generate().public)


def release_of(world: Any, gate: Any, chain: Any, number: int) -> entries.Release:
    (contract,) = chain.attempts
    facts = {"kind": "release", "contract": contract, "round": number, "update": "0" * 64}
    return entries.Release.model_validate({**gate.book.common(chain, 1), **facts})


POLICY = ("policy", "ab")


@contextmanager
def kept_and_undone(transaction: Transaction) -> Iterator[None]:
    transaction.keep("policy", "ab", b"text")
    yield
    raise RuntimeError


def test_a_document_of_an_undone_transaction_is_kept_when_it_is_named_again(
    tmp_path: Path,
) -> None:
    """A ledger remembers what its file holds; else entries would name what is not there."""
    held = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(RuntimeError), held.transaction() as first, kept_and_undone(first):
        pass
    with held.transaction() as second:
        second.keep("policy", "ab", b"text")
        second.keep("policy", "ab", b"text")
    assert contents.read(held.path).documents == {POLICY: b"text"}


def test_a_document_of_an_undone_part_is_kept_when_it_is_named_again(tmp_path: Path) -> None:
    held = Ledger(tmp_path / "ledger.sqlite")
    with held.transaction() as transaction:
        with pytest.raises(RuntimeError), transaction.part(), kept_and_undone(transaction):
            pass
        transaction.keep("policy", "ab", b"text")
    assert contents.read(held.path).documents == {POLICY: b"text"}


def test_a_part_that_fails_undoes_itself_and_leaves_the_rest_of_its_transaction(
    world: Any,
) -> None:
    gate, signed = world.gate(), world.sign(world.contract())
    for number in (1, 2):
        gate.admit(world.order(signed, number))
    before = hashes(world.ledger_path, world.key.public)
    with gate.ledger.transaction() as transaction:
        chain = transaction.chain(*ALPHA, key=world.key.public)
        with transaction.part():
            transaction.append(chain, release_of(world, gate, chain, 1), world.key)
        with pytest.raises(RuntimeError), transaction.part():  # noqa: PT012  the failure is ours
            transaction.append(chain, release_of(world, gate, chain, 2), world.key)
            raise RuntimeError
        chain = transaction.chain(*ALPHA, key=world.key.public)
        assert chain.length == len(before) + 1
        assert chain.head is not None
        kept = chain.head.hash
    assert hashes(world.ledger_path, world.key.public) == [*before, kept]


def test_chains_that_are_long_unused_are_read_again_and_held_to_what_was_seen(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "CHAINS_IN_MEMORY", 0)
    monkeypatch.setattr(ledger, "ENDS_IN_MEMORY", 0)
    gate = charged(world, rounds=2)
    assert not gate.ledger._chains
    assert not gate.ledger._ends
    world.serve(gate, world.order(world.sign(world.contract())))
    edit(world.ledger_path, "DELETE FROM entries WHERE sequence > 2")
    with pytest.raises(Refusal) as refusal:
        gate.admit(world.order(world.sign(world.contract())))
    assert refusal.value.reason == Reason.LEDGER_ROLLED_BACK


# A chain of which only the end is kept


@pytest.fixture
def ends(world: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A site that served two rounds of five, of whose chain the process keeps the end alone."""
    monkeypatch.setattr(ledger, "CHAINS_IN_MEMORY", 0)
    world.signed = world.sign(world.contract())
    world.door = world.gate()
    for number in (1, 2):
        world.serve(world.door, world.order(world.signed, number))
    (end,) = world.door.ledger._ends.values()
    assert (dict(end.charges), end.releases, end.evaluations) == ({}, {}, {})
    assert not world.door.ledger._chains
    return world


def as_a_new_process_sees_it(world: Any) -> Any:
    (found,) = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    return found.chain


def test_a_chain_whose_end_is_kept_goes_on_without_being_read_again(
    ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old entries are not looked at: what they cost does not grow with the rounds."""
    edit(ends.ledger_path, "UPDATE entries SET signature = x'00' WHERE sequence = 1")
    ends.serve(ends.door, ends.order(ends.signed, 3))
    monkeypatch.setattr(ledger, "ENDS_IN_MEMORY", 0)
    with ends.door.ledger.transaction():
        pass
    with pytest.raises(Refusal, match="ledger-unavailable"):
        ends.door.admit(ends.order(ends.signed, 4))


def test_a_kept_end_counts_what_the_whole_chain_does(ends: Any) -> None:
    (end,) = ends.door.ledger._ends.values()
    chain = as_a_new_process_sees_it(ends)
    assert (end.events, end.attempts, end.head) == (chain.events, chain.attempts, chain.head)
    assert (end.policies, end.last, end.genesis) == (chain.policies, chain.last, chain.genesis)


def test_a_round_that_was_forgotten_is_answered_as_one_that_was_not(ends: Any) -> None:
    """The same weights are sent again and cost nothing; others are refused."""
    before = hashes(ends.ledger_path, ends.key.public)
    assert isinstance(ends.door.admit(ends.order(ends.signed, 1)), TrainReply)
    with pytest.raises(Refusal) as refusal:
        ends.door.admit(ends.order(ends.signed, 1, fill=1.0))
    assert refusal.value.reason == Reason.WEIGHTS_CHANGED
    assert hashes(ends.ledger_path, ends.key.public) == before


def test_a_charge_that_waits_for_its_release_is_kept_until_it_has_one(ends: Any) -> None:
    with ends.door.ledger.transaction() as transaction:
        order = ends.order(ends.signed, 3)
        terms = ends.door.check(order)
        ends.door.decide(transaction, terms, order, arrays.digest(order.weights))
    (end,) = ends.door.ledger._ends.values()
    assert list(end.charges) == [(ends.signed.contract.sha256, 3)]
    again = ends.door.admit(ends.order(ends.signed, 3))
    assert (again.attempt, again.round) == (2, 3)
    with ends.door.ledger.transaction() as transaction:
        ends.door.record(transaction, again, "0" * 64, None)
    (end,) = ends.door.ledger._ends.values()
    assert not end.charges
    assert as_a_new_process_sees_it(ends).attempts == end.attempts


def test_what_another_process_adds_to_a_forgotten_round_is_read_with_all_of_it(ends: Any) -> None:
    other = ends.gate()
    for file in (ends.folder / "updates").iterdir():
        file.unlink()  # so that the round is charged again
    ends.serve(other, ends.order(ends.signed, 2))
    other.ledger.close()
    ends.serve(ends.door, ends.order(ends.signed, 3))
    chain = as_a_new_process_sees_it(ends)
    assert chain.attempts[ends.signed.contract.sha256] == 4
    assert len(chain.charges[ends.signed.contract.sha256, 2]) == 2
