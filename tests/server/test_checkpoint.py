"""A checkpoint is one whole round or the one before it, never a mixture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bract.server import checkpoint
from bract.server.checkpoint import RoundState
from bract.shared import arrays
from bract.shared.errors import VerificationFailed

STATE = RoundState(
    contract="c" * 64,
    weights={"w": np.arange(6, dtype=np.float32).reshape(2, 3)},
    velocity={"w": np.ones((2, 3), dtype=np.float32)},
    round=4,
    attempts=5,
    seconds=1.5,
    heads={"alpha": {"domain": "ward", "sequence": 8, "hash": "0" * 64}},
    refused=({"site": "beta", "round": 2, "reason": "budget-exhausted"},),
    metrics=({"round": 1},),
)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(STATE, tmp_path)
    loaded = checkpoint.load(tmp_path, STATE.contract)
    assert loaded is not None
    assert arrays.digest(loaded.weights) == arrays.digest(STATE.weights)
    assert arrays.digest(loaded.velocity) == arrays.digest(STATE.velocity)
    for name in ("round", "attempts", "seconds", "heads", "refused", "metrics"):
        assert getattr(loaded, name) == getattr(STATE, name)


def test_a_kill_between_arrays_and_state_leaves_the_round_before(tmp_path: Path) -> None:
    checkpoint.save(STATE, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3
    checkpoint.save(replace(STATE, round=5, weights={"w": np.zeros(1, np.float32)}), tmp_path)
    # as if the kill came after the new arrays and before the state that names them
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    loaded = checkpoint.load(tmp_path, STATE.contract)
    assert loaded is not None
    assert loaded.round == 4


def test_only_the_latest_arrays_are_kept(tmp_path: Path) -> None:
    for number in range(3):
        checkpoint.save(replace(STATE, round=number), tmp_path)
    kept = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert kept == ["velocity-000002-000005.safetensors", "weights-000002-000005.safetensors"]


def test_no_state_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, STATE.contract) is None


def test_another_contract_or_damaged_arrays_are_refused(tmp_path: Path) -> None:
    checkpoint.save(STATE, tmp_path)
    with pytest.raises(VerificationFailed, match="another contract"):
        checkpoint.load(tmp_path, "d" * 64)
    for path in tmp_path.glob("*.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"\x01")
        with pytest.raises(VerificationFailed, match=f"{path.name} is damaged"):
            checkpoint.load(tmp_path, STATE.contract)
        path.write_bytes(whole)
    assert checkpoint.load(tmp_path, STATE.contract) is not None


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("state.json", "cut"),
        ("weights", "cut"),
        ("weights", "gone"),
        ("velocity", "cut"),
        ("velocity", "gone"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, name: str, how: str) -> None:
    checkpoint.save(STATE, tmp_path)
    (path,) = tmp_path.glob(f"{name}*")
    path.write_bytes(path.read_bytes()[:-9]) if how == "cut" else path.unlink()
    with pytest.raises(VerificationFailed, match=rf"{path.name} is .*damaged: put it back"):
        checkpoint.load(tmp_path, STATE.contract)
