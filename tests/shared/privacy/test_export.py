"""An exported ledger says what the file says, and what is no such export is refused by its line."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bract.shared import canonical
from bract.shared.errors import LedgerError, VerificationFailed
from bract.shared.privacy import contents, export, verification

WARD = ("alpha", "ward")
Lines = list[dict[str, Any]]


@pytest.fixture
def exported(world: Any) -> Path:
    """Two rounds of a site, and the file that its operator sends."""
    gate, signed = world.gate(), world.sign(world.contract())
    for number in (1, 2):
        world.serve(gate, world.order(signed, number))
    gate.ledger.close()
    path: Path = world.folder / "x.jsonl"
    path.write_bytes(export.to_bytes(contents.read(world.ledger_path)))
    return path


def verify(world: Any, path: Path) -> list[verification.Verified]:
    return verification.verify(path, site_keys={"alpha": world.key.public}, anchors={})


def test_an_export_says_what_the_ledger_says(world: Any, exported: Path) -> None:
    (own,), (told,) = verify(world, world.ledger_path), verify(world, exported)
    assert told.chain.head == own.chain.head
    assert told.chain.events == own.chain.events
    assert (told.policy, told.last_contract) == (own.policy, own.last_contract)
    assert export.to_bytes(export.contents(exported)) == exported.read_bytes()


def test_it_holds_no_secret(world: Any, exported: Path) -> None:
    text = exported.read_bytes()
    for key in (world.key, world.coordinator):
        raw = key.private.private_bytes_raw()
        assert raw not in text
        assert raw.hex().encode() not in text


def edited(path: Path, edit: Callable[[Lines], Any]) -> Path:
    """Returns a copy whose lines were changed by a forger who keeps to the form."""
    lines: Lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    changed = edit(lines)
    lines = lines if changed is None else changed
    copy = path.with_name("copy.jsonl")
    copy.write_bytes(b"".join(canonical.encode(line) + b"\n" for line in lines))
    return copy


def of(lines: Lines, kind: str) -> dict[str, Any]:
    return next(line for line in lines if line.get("kind") == kind)


def without(kind: str) -> Callable[[Lines], Lines]:
    return lambda lines: [line for line in lines if line is not of(lines, kind)]


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (without("contract"), "the contract [0-9a-f]{64} of a charge is missing"),
        (without("policy"), "the policy [0-9a-f]{64} that entries name is missing"),
        (without("head"), "its heads are not its entries'"),
        (without("entry"), "the first entry is no genesis|sequence number"),
        (lambda lines: lines[:-3] + lines[-1:], "its heads are not its entries'"),
        (lambda lines: [*lines, lines[-1]], "line 10: stands there a second time"),
        (lambda lines: [*lines[:1], lines[2], lines[1], *lines[3:]], "line 3: not in its place"),
        (lambda lines: of(lines, "entry").update(kind="note"), "unknown kind of line"),
        (lambda lines: of(lines, "entry").update(more=1), "more in it than its kind has"),
        (lambda lines: of(lines, "entry").pop("signature") and None, "not a line of an export"),
        (
            lambda lines: of(lines, "entry").update(
                signature=of(lines, "entry")["signature"].upper()
            ),
            "a signature in another spelling",
        ),
        (lambda lines: of(lines, "policy")["document"].update(site="beta"), "not what its hash"),
        (lambda lines: of(lines, "head").update(sequence=9), "its heads are not its entries'"),
        (lambda lines: [lines[0]], "the ledger is empty"),
    ],
)
def test_what_was_changed_is_refused(
    world: Any, exported: Path, edit: Callable[[Lines], Any], fault: str
) -> None:
    with pytest.raises(VerificationFailed, match=fault):
        verify(world, edited(exported, edit))


def test_a_respelt_policy_is_refused(world: Any, exported: Path) -> None:
    """The same policy, written otherwise: its bytes are not those that its hash is of."""

    def edit(lines: Lines) -> None:
        of(lines, "policy")["document"]["domains"]["ward"]["epsilon"] = 8

    with pytest.raises(VerificationFailed, match=r"policy .*second spelling"):
        verify(world, edited(exported, edit))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"", "no bract ledger"),
        (b"{}\n", "neither a ledger nor an export"),
        (b'{"bract":"ledger","schema_version":2}\n', "has ledger schema 2, .* or a newer one"),
        (b'{"bract":"ledger","schema_version":1}\n', "the ledger is empty"),
        (b'{"bract":"ledger","schema_version":1}', "cut short, its last line is not whole"),
        (b'{"bract": "ledger", "schema_version": 1}\n', "neither a ledger nor an export"),
    ],
    ids=["nothing", "other json", "newer", "empty", "cut", "respelt"],
)
def test_files_that_are_no_whole_export_are_named(world: Any, text: bytes, fault: str) -> None:
    path = world.folder / "x.jsonl"
    path.write_bytes(text)
    with pytest.raises(VerificationFailed, match=fault):
        verify(world, path)


def test_a_copy_that_broke_off_is_refused_anywhere(world: Any, exported: Path) -> None:
    text, short = exported.read_bytes(), exported.with_name("short.jsonl")
    ends = [at + 1 for at, byte in enumerate(text) if byte == ord("\n")][:-1]
    for end in (*ends, len(text) - 1, 10):
        short.write_bytes(text[:end])
        with pytest.raises(VerificationFailed):
            verify(world, short)


def test_a_ledger_that_would_be_mended_is_not_exported(world: Any, exported: Path) -> None:
    changes = {
        "UPDATE entries SET domain = 'clinic'": "is stored as",
        "UPDATE entries SET sequence = 9 WHERE sequence = 4": "is stored as",
        "UPDATE entries SET body = replace(body, ',', ', ')": "not canonical",
        "UPDATE entries SET body = '{}' WHERE sequence = 1": "cannot be read",
        "UPDATE documents SET body = body || ' '": "not canonical",
    }
    for number, (statement, fault) in enumerate(changes.items()):
        path = world.folder / f"{number}.sqlite"
        path.write_bytes(world.ledger_path.read_bytes())
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()
        with pytest.raises(VerificationFailed, match=fault):
            export.to_bytes(contents.read(path))


def test_a_missing_file_is_named(world: Any) -> None:
    with pytest.raises(LedgerError, match="or an export of it"):
        export.contents(world.folder / "none.jsonl")
