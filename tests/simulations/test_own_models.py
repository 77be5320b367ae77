"""Models of one's own whose numbers are of a seldom form, from the first charge to a prediction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bract.shared.data.digits import load_digits

Bract = Callable[..., Any]
FACTORIES = """
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.inner(x) * self.scale

class Halved(nn.Module):
    def __init__(self, classes, half):
        super().__init__()
        self.inner, self.half = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), half

    def forward(self, x):
        return self.inner(x).to(getattr(torch, self.half))

def scaled(shape, classes):
    return Scaled(classes)

def halved(shape, classes, half):
    return Halved(classes, half)
"""


@pytest.fixture(autouse=True)
def _installed(install: Callable[[str, str], None]) -> None:
    install("seldom_models", FACTORIES)


def simulated(bract: Bract, out: Path, model: str, *more: str) -> dict[str, Any]:
    words = ("--rounds", "2", "--sites", "2", "--model", f"seldom_models:{model}", *more)
    done = bract("simulate", "digits", *words, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    assert (summary["rounds"], summary["refused"]) == (2, [])
    return summary


@pytest.mark.parametrize("mechanism", ["dp-sgd", "user-level", "none"])
def test_a_weight_without_axes_is_trained(bract: Bract, tmp_path: Path, mechanism: str) -> None:
    """Its update had one axis, and was refused behind the charge."""
    more = () if mechanism == "dp-sgd" else ("--set", f"privacy.mechanism={mechanism}")
    simulated(bract, tmp_path / "run", "scaled", *more)
    scale = load_file(tmp_path / "run" / "model.safetensors")["scale"]
    assert scale.shape == ()
    assert scale != 1.0


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_answers_of_16_bits_are_trained_on_scored_and_given(
    bract: Bract, tmp_path: Path, half: str
) -> None:
    """No score could be formed of them, behind the charge."""
    out = tmp_path / "run"
    options = ("--set", f"model.options.half={half}")
    assert 0 <= simulated(bract, out, "halved", *options)["test_accuracy"] <= 1
    np.savez(tmp_path / "some.npz", inputs=load_digits().test.inputs[:3])
    given, answers = tmp_path / "some.npz", tmp_path / "answers.npz"
    done = bract("model", "predict", str(out), str(given), "-o", str(answers))
    assert done.returncode == 0, done.stderr
    assert np.load(answers)["probabilities"].shape == (3, 10)
