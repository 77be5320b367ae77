"""The heads kept apart from the ledger: an older copy is noticed by a process that never saw it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.client.gate import Gate
from bract.client.permits import Permit
from bract.shared import canonical
from bract.shared.errors import Reason, Refusal, RolledBack, UsageError
from bract.shared.policy import DomainPolicy
from bract.shared.privacy import anchors, head_file, verification
from bract.shared.privacy.entries import Head
from bract.shared.privacy.head_file import HeadFile
from bract.shared.privacy.ledger import Ledger

NAMES = st.text(min_size=1, max_size=8)
HEADS = st.builds(Head, sequence=st.integers(0, 2**63), hash=st.text("0123456789abcdef"))


def file_of(world: Any) -> HeadFile:
    return HeadFile(world.folder / "apart" / "head.json")


def gate(world: Any, **more: Any) -> Gate:
    """Returns the gate of a new process: nothing of an earlier one is remembered."""
    opened: Gate = world.gate(ledger=Ledger(world.ledger_path, head_file=file_of(world)), **more)
    return opened


def serve(world: Any, rounds: int) -> Any:
    signed, serving = world.sign(world.contract()), gate(world)
    for number in range(1, rounds + 1):
        world.reply = world.serve(serving, world.order(signed, number))
    serving.ledger.close()
    return signed


@given(st.dictionaries(st.tuples(NAMES, NAMES), HEADS))
def test_what_is_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, seen: dict[tuple[str, str], Head]
) -> None:
    file = HeadFile(tmp_path_factory.mktemp("heads") / "head.json")
    assert file.read() == {}
    file.write(seen)
    assert file.read() == seen


def test_the_file_follows_the_ledger_and_anchors_it(world: Any) -> None:
    serve(world, 2)
    receipt = world.reply.receipt
    head = Head(receipt.head_sequence, receipt.head_hash)
    assert file_of(world).read() == {("alpha", "ward"): head}
    known = anchors.heads(world.folder / "apart" / "head.json")
    (found,) = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors=known
    )
    assert found.chain.head == head
    assert found.anchor == head.sequence


def test_a_link_to_another_disk_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, there = tmp_path / "head.json", tmp_path / "disk/head.json"
    link.symlink_to(there)
    for number in (1, 2):
        HeadFile(link).write({("alpha", "ward"): Head(number, "ab" * 32)})
    assert link.is_symlink()
    assert HeadFile(there).read() == {("alpha", "ward"): Head(2, "ab" * 32)}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["head.json"]


def test_what_a_domain_was_allowed_stays_whatever_is_allowed_later(tmp_path: Path) -> None:
    path, head = tmp_path / "head.json", {("alpha", "ward"): Head(3, "ab" * 32)}
    HeadFile(path).write(head)  # as an earlier version left it
    for epsilon, greatest in ((4.5, 4.5), (9.25, 9.25), (2.0, 9.25)):
        HeadFile(path).allow("alpha", {"ward": epsilon})
        found = HeadFile(path)
        assert found.read() == head
        assert (found.ceiling("alpha", "ward"), found.ceiling("alpha", "x")) == (greatest, 0.0)
    found.write({})
    again = HeadFile(path)
    assert (again.read(), again.ceiling("alpha", "ward")) == ({}, 9.25)


def test_an_older_copy_is_refused_by_a_new_process_and_a_newer_one_is_not(world: Any) -> None:
    signed = serve(world, 1)
    older = world.folder / "older.sqlite"
    shutil.copyfile(world.ledger_path, older)
    whole = gate(world)
    world.serve(whole, world.order(signed, 2))
    whole.ledger.close()
    newest = world.ledger_path.read_bytes()

    shutil.copyfile(older, world.ledger_path)
    world.gate().check_ledger()  # the negative control: without the head file nothing is noticed
    again = gate(world)
    with pytest.raises(RolledBack, match="restore the newest copy"):
        again.check_ledger()
    with pytest.raises(Refusal) as refused:
        again.admit(world.order(signed, 3))
    assert refused.value.reason is Reason.LEDGER_ROLLED_BACK
    assert world.opened == 0
    again.ledger.close()

    world.ledger_path.write_bytes(newest)
    assert isinstance(gate(world).admit(world.order(signed, 3)), Permit)


def test_a_ledger_that_is_gone_or_begun_anew_is_refused(world: Any) -> None:
    signed = serve(world, 1)
    world.ledger_path.unlink()
    for _ in range(2):  # the second finds the empty file that the first one made
        with pytest.raises(RolledBack):
            gate(world).check_ledger()
    world.serve(world.gate(), world.order(signed, 1))
    with pytest.raises(RolledBack):
        gate(world).check_ledger()


def test_a_crash_between_commit_and_head_file_leaves_a_ledger_that_goes_on(world: Any) -> None:
    signed = serve(world, 1)
    path = world.folder / "apart" / "head.json"
    before = path.read_bytes()
    late = gate(world)
    world.serve(late, world.order(signed, 2))
    late.ledger.close()
    path.write_bytes(before)  # as if the process had ended before the second write
    assert isinstance(gate(world).admit(world.order(signed, 3)), Permit)


@pytest.mark.parametrize(
    ("fails", "kept", "attempt"),
    [("os.fsync", "nothing was charged", 1), ("pathlib.Path.replace", "the charge stands", 2)],
    ids=["before", "after"],
)
def test_a_head_file_that_cannot_be_written_refuses_before_the_charge_if_it_can(
    world: Any, monkeypatch: pytest.MonkeyPatch, fails: str, kept: str, attempt: int
) -> None:
    """Else a disk that is full or read-only would have every round charged, and none trained."""
    signed = serve(world, 1)
    serving = gate(world)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(fails, full)
        with pytest.raises(Refusal, match=f"No space left.*{kept}") as refused:
            serving.admit(world.order(signed, 2))
        assert refused.value.reason is Reason.LEDGER_UNAVAILABLE
    assert world.opened == 0
    assert not list((world.folder / "apart").glob(".*"))
    permit = serving.admit(world.order(signed, 2))
    assert isinstance(permit, Permit)
    assert permit.attempt == attempt


def test_every_domain_has_its_head(world: Any) -> None:
    domains = {
        "ward": DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=("clinic",)),
        "clinic": DomainPolicy(epsilon=9.0, delta=1e-5),
    }
    serving = gate(world, policy=world.policy(domains=domains))
    world.serve(serving, world.order(world.sign(world.contract())))
    written = json.loads((world.folder / "apart" / "head.json").read_bytes())
    assert [head["domain"] for head in written["heads"]["alpha"]] == ["clinic", "ward"]
    assert {name for _, name in file_of(world).read()} == {"clinic", "ward"}


def test_a_refused_order_leaves_the_file_as_it_was(world: Any) -> None:
    serve(world, 1)
    path = world.folder / "apart" / "head.json"
    before = path.stat().st_mtime_ns
    with pytest.raises(Refusal, match="budget-exhausted"):
        gate(world).admit(world.order(world.sign(world.contract(rounds=300, max_attempts=300))))
    assert path.stat().st_mtime_ns == before


HEAD = {"domain": "ward", "sequence": 3, "hash": "ab"}
BAD: dict[str, Any] = {
    "no json": b"x",
    "no object": b"[]",
    "no heads": b"{}",
    "heads of another form": b'{"heads":[]}',
    "a head of another form": b'{"heads":{"alpha":3}}',
    "no number": {**HEAD, "sequence": "3"},
    "a fraction": {**HEAD, "sequence": 3.5},
    "truth": {**HEAD, "sequence": True},
    "below 0": {**HEAD, "sequence": -1},
    "no hash": {**HEAD, "hash": None},
    "no domain": {"sequence": 3, "hash": "ab"},
    "no text": {**HEAD, "domain": 3},
    "infinite": b'{"heads":{"alpha":{"domain":"ward","hash":"ab","sequence":Infinity}}}',
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_another_form_is_bad_usage_and_never_no_heads(tmp_path: Path, case: str) -> None:
    path, value = tmp_path / "head.json", BAD[case]
    text = value if isinstance(value, bytes) else canonical.encode({"heads": {"alpha": value}})
    path.write_bytes(text)
    with pytest.raises(UsageError, match="put it back from its backup"):
        HeadFile(path).read()
    with pytest.raises(UsageError, match="holds no heads"):
        anchors.heads(path)
    with pytest.raises(UsageError):
        Ledger(tmp_path / "ledger.sqlite", head_file=HeadFile(path))
    assert not (tmp_path / "ledger.sqlite").exists()


def test_one_head_of_a_site_and_a_list_of_them_are_both_heads() -> None:
    one = head_file.heads({"heads": {"alpha": HEAD, "beta": {**HEAD, "sequence": 4}}})
    assert one == {("alpha", "ward"): Head(3, "ab"), ("beta", "ward"): Head(4, "ab")}
    clinic = {**HEAD, "domain": "clinic", "sequence": 9}
    listed = head_file.heads({"heads": {"alpha": [HEAD, clinic], "beta": []}})
    assert listed == {("alpha", "ward"): Head(3, "ab"), ("alpha", "clinic"): Head(9, "ab")}


def test_an_anchor_that_names_nothing_anchors_nothing_and_is_refused(
    world: Any, bract: Any
) -> None:
    serve(world, 1)
    (world.folder / "none.json").write_text('{"heads":{}}')
    words = ("audit", "verify", str(world.ledger_path), "--site-key", world.key.public)
    done = bract(*words, "--head", str(world.folder / "apart" / "head.json"))
    assert (done.returncode, "anchored" in done.stdout) == (0, True)
    done = bract(*words, "--head", str(world.folder / "none.json"))
    assert done.returncode == 2
    assert "holds no heads" in done.stderr
