"""The user's own labelled text, and a run on it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.server import service
from bract.shared import contract as contracts
from bract.shared import data, federation
from bract.shared.data import text as user_text
from bract.shared.data import tokens
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Images, Text
from bract.shared.terms import DataTerms
from bract.simulations.federations.loopback import SitePlan, lay_out

PRIVATE = "pancreatitis"
SCHEMA = Text(length=32, labels=("no", "yes"))


def terms(schema: Text = SCHEMA, **options: Any) -> DataTerms:
    return data.describe("text", options, schema)


def line(text: object, label: object) -> bytes:
    return json.dumps({"text": text, "label": label}).encode() + b"\n"


def file_of(folder: Path, name: str, *lines: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"".join(lines))
    return folder


def opinions(count: int) -> list[bytes]:
    drawn = random.Random(4)
    each = [(word, label) for word, label in (("fine", "yes"), ("poor", "no"))] * (count // 2)
    return [line(f"{word} " * drawn.randint(1, 4), label) for word, label in each]


def test_one_file_is_split_by_nothing_but_its_number_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"".join(line(f"row {place}", "no") for place in range(200)))
    splits = data.load(terms(), path)
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [160, 10, 30]
    rows = [tokens.decode(row) for part in parts for row in part.inputs]
    assert sorted(rows) == sorted(f"row {place}".encode() for place in range(200))
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"".join(line(f"{place}", "yes") for place in range(200)))
    again = data.dataset("text").load(terms(), other).test
    cut = [int(tokens.decode(row)) for row in again.inputs]
    assert cut == [int(tokens.decode(row).split()[1]) for row in splits.test.inputs]
    validation, test = data.load_public(terms(), path)
    np.testing.assert_array_equal(test.inputs, splits.test.inputs)
    np.testing.assert_array_equal(validation.inputs, splits.validation.inputs)


def test_a_file_too_short_to_be_split_is_refused(tmp_path: Path) -> None:
    folder = file_of(tmp_path, "few.jsonl", *opinions(4))
    with pytest.raises(UsageError, match="has 4 rows: to be split it needs 20"):
        data.load(terms(), folder / "few.jsonl")


def test_server_and_site_each_open_their_own_files_alone(tmp_path: Path) -> None:
    site = file_of(tmp_path / "site", "train.jsonl", line("good", "yes"), line("bad", "no"))
    server = file_of(tmp_path / "server", "validation.jsonl", line("ok", "yes"))
    file_of(server, "test.jsonl", line("meh", "no"), line("so", "no"))
    own = data.load_part(terms(), site, "1/1")
    assert own.targets.tolist() == [1, 0]
    assert [len(part) for part in data.load_public(terms(), server)] == [1, 2]
    with pytest.raises(UsageError, match=r"cannot read .*train\.jsonl"):
        data.load_part(terms(), server, "1/1")
    with pytest.raises(UsageError, match=r"cannot read .*validation\.jsonl"):
        data.load_public(terms(), site)


def test_shares_of_a_site_hold_every_row_once_and_may_be_empty(tmp_path: Path) -> None:
    folder = file_of(tmp_path, "train.jsonl", *(line(f"{i}", "no") for i in range(5)))
    rows = [
        tokens.decode(row)
        for place in range(1, 8)
        for row in data.load_part(terms(), folder, f"{place}/7").inputs
    ]
    assert sorted(rows) == [f"{i}".encode() for i in range(5)]
    with pytest.raises(UsageError, match="part 'all' must be i/n"):
        data.load_part(terms(), folder, "all")


def test_labels_without_a_schema_are_those_of_the_public_part(tmp_path: Path) -> None:
    folder = file_of(tmp_path, "validation.jsonl", line("a", 10), line("b", 9))
    file_of(folder, "test.jsonl", line("c", -1), b"no json\n")
    described = data.describe("text", {"length": 8}, None, folder)  # there is no train.jsonl
    assert isinstance(described.preparation, Text)
    assert described.preparation.labels == ("-1", "9", "10")
    assert (described.shape, described.classes, described.vocabulary) == ((8,), 3, 257)
    file_of(folder, "train.jsonl", line("d", 9), line("e", "9"), line("f", 11))
    assert data.load_part(described, folder, "1/1").targets.tolist() == [1, 1, -1]


def test_training_rows_none_of_which_can_be_read_are_an_error_that_says_why(tmp_path: Path) -> None:
    folder = file_of(tmp_path, "train.jsonl", b"garbage\n" * 40)
    for name in user_text.PUBLIC:
        file_of(folder, name, *opinions(20))
    path = folder / "train.jsonl"
    told = f"{path} has no example that can be read: {path}, row 1: not JSON"
    with pytest.raises(UsageError, match=f"^{re.escape(told)}$"):
        data.load(terms(), folder)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"no example that can be read: .*train\.jsonl is empty"):
        data.load(terms(), folder)
    path.write_bytes(b"garbage\n" * 40)
    with pytest.raises(UsageError, match=r"no example that can be read: .* row 1: not JSON"):
        data.load(terms(), path)  # one file, to be split
    site = data.load_part(terms(), folder, "1/1")  # a joined site goes on without effect
    assert site.targets.tolist() == [user_text.UNREADABLE] * 40


def test_public_rows_that_cannot_be_read_are_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    not_utf8 = b'{"text": "caf\xe9", "label": "no"}\n'  # it is read, so it is not the first fault
    for name in user_text.PUBLIC:
        file_of(tmp_path, name, line("a", "yes"), not_utf8, line("b", "maybe"))
    found = data.load_public(terms(), tmp_path)
    assert [part.targets.tolist() for part in found] == [[1, 0], [1, 0]]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{path}: 1 of 3 examples cannot be read and add nothing: correct them or take them out; "
        f"the first: {path}, row 3: key 'label': not a label of the contract"
        for path in (tmp_path / name for name in user_text.PUBLIC)
    ]


def test_a_split_file_keeps_its_training_rows_and_rids_its_public_ones_of_what_cannot_be_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"".join([*opinions(100), b"garbage\n" * 100]))
    splits, (validation, test) = data.load(terms(), path), data.load_public(terms(), path)
    assert len(splits.train) == 160
    assert user_text.UNREADABLE in splits.train.targets
    for part in (splits.validation, splits.test, validation, test):
        assert user_text.UNREADABLE not in part.targets
    assert 0 < len(test) == len(splits.test) < 30


def test_too_few_public_labels_ask_for_a_schema(tmp_path: Path) -> None:
    folder = file_of(tmp_path, "validation.jsonl", line("a", "x"))
    file_of(folder, "test.jsonl", line("c", "x"))
    with pytest.raises(UsageError, match=r"has 1 labels.*--schema"):
        data.describe("text", {}, None, folder)


def test_what_the_data_set_needs_is_said_in_one_line() -> None:
    with pytest.raises(UsageError, match="--data-file"):
        data.describe("text")
    with pytest.raises(UsageError, match="schema of the kind 'text'"):
        data.describe("text", {}, Images(labels=("a", "b")))
    with pytest.raises(UnknownName, match="did you mean 'length'"):
        terms(lenght=3)


BAD_ROWS = {
    b"{" + PRIVATE.encode(): "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": "x", "label": ' + b"9" * 5_000 + b"}": "not JSON",
    b'["' + PRIVATE.encode() + b'"]': "not a JSON object",
    b'{"label": "yes"}': "key 'text' is missing",
    b'{"text": "' + PRIVATE.encode() + b'"}': "key 'label' is missing",
    b'{"text": 3, "label": "yes"}': "key 'text': not a string",
    b'{"text": "x", "label": true}': "key 'label': neither a string nor a whole number",
    b'{"text": "x", "label": null}': "key 'label': neither a string nor a whole number",
    b'{"text": "x", "label": 1.0}': "key 'label': neither a string nor a whole number",
    b'{"text": "x", "label": ' + b"9" * 1_000 + b"}": (
        "key 'label': neither a string nor a whole number"
    ),
    b'{"text": "x", "label": "' + PRIVATE.encode() + b'"}': "key 'label': not a label",
}


@pytest.mark.parametrize("bad", BAD_ROWS, ids=lambda bad: bad[:24].decode())
def test_a_bad_row_adds_nothing_and_is_named_without_its_values(bad: bytes, tmp_path: Path) -> None:
    folder = file_of(tmp_path, "train.jsonl", line("a", "yes"), b"\n", bad + b"\n")
    found = data.load_part(terms(), folder, "1/1")
    assert found.targets.tolist() == [1, user_text.UNREADABLE]
    (problem,) = data.check_part(terms(), folder, "1/1", 2)
    assert f"{folder / 'train.jsonl'}, row 3: {BAD_ROWS[bad]}" in problem
    assert PRIVATE not in problem


def test_text_that_is_not_utf8_trains_and_is_named(tmp_path: Path) -> None:
    bad = b'{"text": "caf\xe9 ' + PRIVATE.encode() + b'", "label": "no"}\n'
    folder = file_of(tmp_path, "train.jsonl", b"\xef\xbb\xbf" + line("a", "yes"), bad)
    found = data.load_part(terms(), folder, "1/1")
    assert found.targets.tolist() == [1, 0]
    assert tokens.decode(found.inputs[1]).startswith("caf\ufffd ".encode())
    assert data.check_part(terms(), folder, "1/1", 2) == [
        f"{folder / 'train.jsonl'}, row 2: not UTF-8"
    ]


@settings(max_examples=60)
@given(content=st.binary(max_size=300))
def test_no_file_whatsoever_makes_a_joined_site_fail(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = file_of(tmp_path_factory.mktemp("site"), "train.jsonl", content)
    found = data.load_part(terms(), folder, "1/1")
    assert found.inputs.shape == (len(found), 32)
    assert isinstance(data.check_part(terms(), folder, "1/1", 1), list)


def test_a_federation_learns_joins_from_its_public_text_and_a_site_checks_its_own(
    bract: Callable[..., Any], token_model: str, tmp_path: Path
) -> None:
    root = tmp_path / "federation"
    public = file_of(tmp_path / "public", "validation.jsonl", *opinions(40))
    file_of(public, "test.jsonl", *opinions(60))
    (root / "sites/alpha").mkdir(parents=True)
    own = file_of(
        root / "sites/alpha", "train.jsonl", *opinions(200), line(f"a {PRIVATE}", PRIVATE)
    )
    layout = lay_out(
        root,
        sites=[SitePlan("alpha", 200, "text", "1/1", data_folder=".")],
        port=1,
        public_data=str(public),
        terms={
            "run": "trial",
            "rounds": 2,
            "model": {"name": token_model},
            "data": {"name": "text", "options": {"tokens": "byte-pairs", "length": 24}},
            "training": {"local_steps": 1, "learning_rate": 0.5},
            "privacy": {"epsilon": 2.0, "delta": 1e-5, "clip_norm": 1.0, "batch": 20.0},
        },
    )
    agreed = service.read_contract(federation.read(layout.federation))
    assert isinstance(agreed.data.preparation, Text)
    assert agreed.data.preparation.merges
    assert agreed.data.preparation.labels == ("no", "yes")
    checked = bract("client", str(layout.site("alpha")), "--check", str(layout.contract))
    assert checked.returncode == 1
    told = " ".join((checked.stdout + checked.stderr).split())
    assert f"{own / 'train.jsonl'}, row 201: key 'label': not a label of the contract" in told
    assert PRIVATE not in told
    (own / "train.jsonl").write_bytes(b"".join(opinions(200)))
    whole = bract("client", str(layout.site("alpha")), "--check", str(layout.contract))
    assert whole.returncode == 0, whole.stderr


@pytest.mark.parametrize("options", [[], ["--set", "data.options.tokens=byte-pairs"]])
def test_a_run_on_a_file_of_ones_own_says_its_labels_and_joins_in_the_contract(
    options: list[str], bract: Callable[..., Any], token_model: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_bytes(b"".join(opinions(400)))
    done = bract(
        "simulate", "text", "--data-file", "mine.jsonl", "--model", token_model, "--rounds", "2",
        "--set", "privacy.delta=1e-3", "--set", "training.learning_rate=8", *options,
        "--set", "data.options.length=24", "--workers", "1", "--out", "run", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rounds"] == 2
    assert summary["refused"] == []
    assert sum(map(sum, summary["confusion"])) == 60
    agreed = contracts.read(Path("run/contract.json")).contract
    assert isinstance(agreed.data.preparation, Text)
    assert agreed.data.preparation.labels == ("no", "yes")
    assert bool(agreed.data.preparation.merges) == bool(options)
