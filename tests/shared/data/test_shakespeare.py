"""Speaking roles as sites: blocks that stay within a speech, and roles that never train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from bract.shared import data
from bract.shared.data import Examples
from bract.shared.data.partitions import nominal_size
from bract.shared.data.shakespeare import (
    LENGTH,
    SHORTEST,
    _blocks,
    _speeches,
    held_out,
    site_name,
)
from bract.shared.errors import UnknownName, UsageError
from bract.shared.terms import Name
from bract.simulations import simulation
from bract.simulations.benchmarks import shakespeare_baselines
from bract.simulations.experiment import load

TERMS = data.describe("shakespeare")
PRIVATE = "wherefore art thou"


def said(examples: Examples) -> list[bytes]:
    """The bytes of each block, as inputs and targets tell them; they must agree."""
    blocks = []
    for inputs, targets in zip(examples.inputs, examples.targets, strict=True):
        there = targets >= 0
        count = int(there.sum())
        assert there[:count].all()
        assert not inputs[count:].any()
        assert (inputs[1:count] == targets[: count - 1]).all()
        blocks.append(bytes([*inputs[:count], targets[count - 1]]))
    return blocks


def test_every_block_lies_within_one_speech_of_its_role(speeches: Path) -> None:
    splits = data.load(TERMS, speeches)
    plays = (speeches / "input.txt").read_bytes()
    for part in (splits.train, splits.validation, splits.test):
        assert part.groups is not None
        assert part.inputs.shape == part.targets.shape == (len(part), LENGTH)
        blocks = said(part)
        assert all(SHORTEST < len(block) <= LENGTH + 1 for block in blocks)
        assert all(block in plays and b"\n\n" not in block for block in blocks)


def test_blocks_hold_each_byte_once() -> None:
    found = list(_blocks(b"x" * 300))
    assert [len(block) for block in found] == [129, 129, 46]
    assert b"".join([found[0], *(block[1:] for block in found[1:])]) == b"\n" + b"x" * 300 + b"\n"
    assert list(_blocks(b"x" * 14)) == []
    assert [len(block) for block in _blocks(b"x" * 15)] == [17]


@given(st.binary(max_size=400))
def test_short_ends_alone_are_left_out(text: bytes) -> None:
    found = sum(len(block) - 1 for block in _blocks(text))
    assert 0 <= len(text) + 1 - found < SHORTEST


def test_roles_of_every_part_are_disjoint_and_are_names_of_sites(speeches: Path) -> None:
    splits = data.load(TERMS, speeches)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    names = {key: part.groups.names for key, part in parts.items() if part.groups}
    everyone = [name for group in names.values() for name in group]
    assert len(everyone) == len(set(everyone)) == 302
    for part, group in names.items():
        assert {held_out(name) for name in group} == {part}
        for name in group:
            assert TypeAdapter(Name).validate_python(name) == name == site_name(name)
    assert [len(part) for part in parts.values()] == [9_546, 602, 1_234]


def test_a_site_holds_what_the_simulation_gives_its_role(speeches: Path) -> None:
    train = data.load(TERMS, speeches).train
    assert train.groups is not None
    own = data.load_part(TERMS, speeches, "First-Citizen")
    rows = train.groups.rows()["First-Citizen"]
    np.testing.assert_array_equal(own.inputs, train.inputs[rows])
    np.testing.assert_array_equal(own.targets, train.targets[rows])
    assert data.check_part(TERMS, speeches, "First-Citizen", 50) == []
    with pytest.raises(UnknownName, match="did you mean 'First-Citizen'"):
        data.load_part(TERMS, speeches, "First Citizen")


def test_a_held_out_role_never_trains(speeches: Path, tmp_path: Path) -> None:
    public = data.load(TERMS, speeches).test
    assert public.groups is not None
    name = public.groups.names[0]
    with pytest.raises(UnknownName, match="unknown role that trains"):
        data.load_part(TERMS, speeches, name)
    (tmp_path / f"train.{name}.txt").write_text(f"{name}:\nI speak in public alone.\n")
    with pytest.raises(UsageError, match="held out as public"):
        data.load_part(TERMS, tmp_path, name)


def test_server_and_site_each_open_their_own_files_alone(tmp_path: Path) -> None:
    speech = "ROMEO:\nBut soft! what light through yonder window breaks?\n\n"
    (tmp_path / "train.Romeo.txt").write_text(speech * 3)
    own = data.load_part(TERMS, tmp_path, "Romeo")
    assert said(own) == [b"\nBut soft! what light through yonder window breaks?\n"] * 3
    with pytest.raises(UsageError, match=r"no readable input\.txt"):
        data.load_part(TERMS, tmp_path, "Juliet")
    for name in ("validation", "test"):
        (tmp_path / f"{name}.txt").write_text(f"NURSE:\nThis is for the {name} of all.\n")
    validation, test = data.load_public(TERMS, tmp_path)
    assert [*said(validation), *said(test)] == [
        b"\nThis is for the validation of all.\n",
        b"\nThis is for the test of all.\n",
    ]


def test_what_is_no_speech_adds_nothing_and_is_named_without_its_text(tmp_path: Path) -> None:
    path = tmp_path / "train.Romeo.txt"
    path.write_bytes(
        f"{PRIVATE} so long a line\n\nROMEO:\nHere I am, and speak.\n\n\n".encode()
        + f"JULIET:\n{PRIVATE}, whatever it means\n\n\xff\xfe:\n".encode("latin-1")
    )
    assert len(data.load_part(TERMS, tmp_path, "Romeo")) == 1
    problems = data.check_part(TERMS, tmp_path, "Romeo", 1)
    assert problems == [
        f"{path}, row 1: no line ROLE: before it",
        f"{path}, row 7: speech of another role",
        f"{path}, row 10: no line ROLE: before it",
    ]


@given(st.binary(max_size=200))
def test_no_bytes_whatsoever_make_a_joined_site_fail(content: bytes) -> None:
    speeches, strays = _speeches(content)
    assert len(speeches) + len(strays) <= content.count(b"\n") + 1


def test_the_experiment_names_as_many_sites_as_roles_are_large_enough(
    token_model: str, speeches: Path, tmp_path: Path
) -> None:
    settings = [f"data.dir={speeches}"]
    chosen = load("shakespeare", model=token_model, overrides={}, settings=settings)
    run = simulation.begin(chosen, out=tmp_path / "run", state=None, data_dir=None, workers=1)
    with run.prepared() as (_, signed):
        sizes = {site.name: site.nominal_size for site in signed.contract.cohort}
    groups = data.load(TERMS, speeches).train.groups
    assert groups is not None
    assert sizes == {
        name: nominal_size(len(rows)) for name, rows in groups.rows().items() if len(rows) >= 60
    }
    assert len(sizes) == 51


def test_roles_train_on_the_next_byte(
    bract: Callable[..., Any], token_model: str, speeches: Path
) -> None:
    done = bract(
        "simulate", "shakespeare", "--model", token_model, "--rounds", "1", "--workers", "1",
        "--set", f"data.dir={speeches}", "--set", "data.partition.min_size=250", "--sites", "7",
        "--set", "privacy.delta=1e-4", "--out", "run", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["rounds"], summary["refused"]) == (1, [])
    assert 5.0 < summary["test_loss"] < 6.0  # ln 256 is 5.55: nothing is learned in a round


def test_bigrams_predict_better_than_unigrams_and_these_than_nothing(speeches: Path) -> None:
    scores = shakespeare_baselines.measure(speeches.parent)
    unigram, bigram = scores["unigram"], scores["bigram"]
    assert bigram["perplexity"] < unigram["perplexity"] < 256
    assert unigram["perplexity"] == pytest.approx(23.67, abs=0.01)
    assert bigram["perplexity"] == pytest.approx(11.38, abs=0.01)
