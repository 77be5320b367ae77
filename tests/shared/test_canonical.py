from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.shared import canonical
from bract.shared.errors import VerificationFailed

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
)
TEXTS = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner))


@given(VALUES)
def test_a_value_has_one_byte_string_and_comes_back_from_it(value: Any) -> None:
    text = canonical.encode(value)
    assert canonical.encode(canonical.decode(text)) == text
    assert canonical.decode(text) == value


def test_what_json_has_no_word_for_is_none() -> None:
    for value in (math.inf, -math.inf, math.nan, None):
        assert canonical.finite(value) is None
    assert canonical.finite(0.0) == 0.0
    with pytest.raises(ValueError, match="not JSON compliant"):  # the negative control
        canonical.encode(math.inf)


@given(VALUES)
def test_another_spelling_of_the_same_value_is_refused(value: Any) -> None:
    text = canonical.encode(value)
    for spelling in (text + b"\n", b" " + text, json.dumps(value, indent=1).encode("utf-16")):
        with pytest.raises(VerificationFailed):
            canonical.decode(spelling)


@pytest.mark.parametrize(
    "text",
    [
        b'{"b":1,"a":2}',
        b'{"a":1,"a":2}',
        b'{"a": 1}',
        b'"\\u0061"',
        b'"\\ud800"',
        b"1.0e0",
        b"01",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"[" * 100_000,
        b"",
        b"\xff",
    ],
    ids=lambda text: repr(text[:9]),
)
def test_bytes_that_are_not_canonical_are_refused(text: bytes) -> None:
    with pytest.raises(VerificationFailed):
        canonical.decode(text)


def test_what_json_has_no_word_for_is_not_written() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            canonical.encode(value)


def test_hashes_of_different_uses_and_different_parts_differ() -> None:
    parts = [("a", b"bc"), ("a", b"b", b"c"), ("a", b"", b"bc"), ("a", b"bc", b""), ("b", b"bc")]
    parts += [("a",), ("a/1", b"c"), ("a\0", b"bc")]
    assert len({canonical.tagged(tag, *rest) for tag, *rest in parts}) == len(parts)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    canonical.write_atomically(path, b"old", mode=0o600)
    assert path.read_bytes() == b"old"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TypeError):
        canonical.write_atomically(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
