from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from bract.shared import arrays
from bract.shared.errors import VerificationFailed

SHAPES = arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
VALUES = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5).filter(
        lambda name: name != "__metadata__"
    ),
    arrays_of.arrays(np.float32, SHAPES),
    max_size=3,
)


@given(VALUES)
def test_arrays_rest_to_the_last_bit_and_in_their_shape(values: dict[str, Any]) -> None:
    again = arrays.from_bytes(arrays.to_bytes(values))
    assert {name: value.shape for name, value in again.items()} == {
        name: value.shape for name, value in values.items()
    }
    assert all(again[name].tobytes() == value.tobytes() for name, value in values.items())
    assert arrays.digest(again) == arrays.digest(values)


def test_the_digest_tells_names_shapes_and_values_apart() -> None:
    value = np.arange(6, dtype=np.float32)
    others = [
        {"a": value},
        {"b": value},
        {"a": value.reshape(2, 3)},
        {"a": value.reshape(3, 2)},
        {"a": -value},
        {"a": value[:1]},
        {"a": value[0].reshape(())},
        {"a": value, "b": value},
        {},
    ]
    assert len({arrays.digest(other) for other in others}) == len(others)


def test_the_digest_is_of_values_not_of_their_layout_in_memory() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert arrays.digest({"a": np.asfortranarray(value)}) == arrays.digest({"a": value})
    assert arrays.digest({"a": value, "b": value}) == arrays.digest({"b": value, "a": value})


@pytest.mark.parametrize("data", [b"", b"{}", b"\x80\x04N.", b"\xff" * 64])
def test_bytes_that_are_no_arrays_are_refused(data: bytes) -> None:
    with pytest.raises(VerificationFailed):
        arrays.from_bytes(data)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"w": np.zeros((2, 3), np.float32)}, None),
        ({}, "missing"),
        ({"w": np.zeros((2, 3), np.float32), "v": np.zeros(1, np.float32)}, "extra"),
        ({"w": np.zeros((3, 2), np.float32)}, "shape"),
        ({"w": np.zeros((2, 3))}, "dtype"),
        ({"w": np.full((2, 3), np.nan, np.float32)}, "finite"),
        ({"w": np.full((2, 3), -np.inf, np.float32)}, "finite"),
    ],
)
def test_only_exactly_the_expected_arrays_are_without_fault(
    values: dict[str, Any], said: str | None
) -> None:
    found = arrays.fault(values, {"w": (2, 3)})
    assert found is None if said is None else said in str(found)


def test_a_norm_is_of_all_values_in_float64_and_leaves_them() -> None:
    values = {"a": np.full((100, 300), 3e19, np.float32), "b": np.float32([[4.0]]).T}
    before = {name: value.copy() for name, value in values.items()}
    wide = np.concatenate([value.astype(np.float64).reshape(-1) for value in values.values()])
    assert arrays.norm(values) == pytest.approx(float(np.linalg.norm(wide)), rel=1e-12)
    assert all(np.array_equal(values[name], before[name]) for name in values)
    assert arrays.norm({}) == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_norm_of_what_is_not_finite_is_not_finite(value: float) -> None:
    assert not np.isfinite(arrays.norm({"a": np.float32([1.0, value])}))
