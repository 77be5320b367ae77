"""Edited data are noticed by the site, tell nobody, and refund nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bract.client.fingerprint import Fingerprints
from bract.client.site import Site, Trainers
from bract.client.training.execution import Execution
from bract.client.training.randomness import SecureRandomness
from bract.shared.data import Examples
from bract.shared.messages import TrainReply
from bract.shared.privacy import contents


def edited(examples: Examples) -> Examples:
    inputs = examples.inputs.copy()
    inputs[0, 0, 0, 0] ^= 1
    return Examples(inputs=inputs, targets=examples.targets)


def test_one_changed_pixel_or_target_is_noticed_once(world: Any, tmp_path: Path) -> None:
    examples = world.examples()
    relabelled = Examples(inputs=examples.inputs, targets=np.roll(examples.targets, 1))
    seen = [
        Fingerprints(tmp_path / "f").changed("ward", data)
        for data in (examples, examples, edited(examples), edited(examples), relabelled)
    ]
    assert seen == [False, False, True, False, True]
    assert not Fingerprints(tmp_path / "f").changed("clinic", examples)


def test_a_fingerprint_cannot_be_tried_against_guessed_data(world: Any, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        Fingerprints(tmp_path / name).changed("ward", world.examples())
        found += [file.read_bytes() for file in (tmp_path / name).glob("*.fingerprint")]
    assert len(found) == 2
    assert found[0] != found[1]


def test_edited_data_go_on_with_the_same_ledger_and_the_fingerprint_stays_home(
    world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agreed = world.sign(world.contract())
    original = world.examples
    for number, change in enumerate((original, lambda: edited(original())), start=1):
        world.examples = change
        site = Site(
            name="alpha",
            gate=world.gate(),
            randomness=SecureRandomness(),
            trainers=Trainers(Execution()),
            fingerprints=Fingerprints(tmp_path / "f"),
        )
        with caplog.at_level(logging.WARNING):
            assert isinstance(site.train(world.order(agreed, number)), TrainReply)
        assert ("nothing is refunded" in caplog.text) == (number == 2)
    held = contents.read(world.ledger_path)
    kinds = [json.loads(text)["kind"] for _, text, _ in held.rows["alpha", "ward"]]
    assert kinds == ["genesis", "charge", "release", "charge", "release"]
    prints = [file.read_bytes().hex() for file in (tmp_path / "f").glob("*.fingerprint")]
    assert not any(prints[0].encode() in text for _, text, _ in held.rows["alpha", "ward"])
