"""The hash by which a contract declares its public examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bract.shared.data import Examples, describe, public
from bract.shared.errors import UsageError

ONE = Examples(inputs=np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2), targets=np.array([0, 1]))


def hashed(monkeypatch: pytest.MonkeyPatch, validation: Examples, test: Examples) -> str:
    monkeypatch.setattr(public, "load_public", lambda name, folder: (validation, test))
    return public.sha256(describe("digits"), None)


def test_the_hash_of_what_ships_is_the_same_wherever_it_is_taken(tmp_path: Path) -> None:
    assert public.sha256(describe("digits"), None) == public.sha256(describe("digits"), tmp_path)
    assert len(public.sha256(describe("digits"), None)) == 64


def test_any_other_examples_have_another_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(inputs: object = ONE.inputs, targets: object = ONE.targets) -> Examples:
        return Examples(inputs=inputs, targets=targets)  # type: ignore[arg-type]

    pixel = ONE.inputs.copy()
    pixel[1, 0, 1, 1] ^= 1
    others = [
        (ONE, ONE),
        (changed(pixel), ONE),
        (ONE, changed(pixel)),
        (ONE, changed(targets=np.array([1, 1]))),
        (ONE, changed(targets=ONE.targets.astype(np.int32))),
        (ONE, changed(ONE.inputs.reshape(2, 1, 1, 4))),
        (ONE, changed(ONE.inputs.astype(np.float32))),
        (ONE, ONE.take(np.array([1, 0]))),
        (ONE, ONE.take(np.array([0]))),
        (ONE.take(np.array([0])), ONE.take(np.array([0, 1, 1]))),
    ]
    found = [hashed(monkeypatch, *pair) for pair in others]
    assert len(set(found)) == len(others)


def test_the_layout_in_memory_is_not_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.repeat(ONE.inputs, 2, axis=3)[..., ::2]
    assert not wide.flags.c_contiguous
    strided = Examples(inputs=wide, targets=ONE.targets)
    assert hashed(monkeypatch, ONE, ONE) == hashed(monkeypatch, strided, ONE)


def test_examples_that_are_not_there_have_no_hash(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        public.sha256(describe("heart-disease"), tmp_path)
