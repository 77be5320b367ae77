"""Bad input gets one line that names the value and the remedy, and the right exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CASES = {
    ("simulate", "digit"): (2, "did you mean 'digits'?"),
    ("simulate", "missing.toml"): (2, "cannot read missing.toml"),
    ("simulate", "digits", "--model", "cn"): (2, "did you mean 'cnn'?"),
    ("simulate", "digits", "--model", "torch.nn:Nothing"): (2, "cannot be imported"),
    ("simulate", "digits", "--set", "privacy.epsilonn=3"): (2, "did you mean 'privacy.epsilon'?"),
    ("simulate", "digits", "--set", "rounds"): (2, "must be key=value"),
    ("simulate", "digits", "--set", "privacy.epsilon=0"): (2, "greater than 0 (got 0)"),
    ("simulate", "digits", "--set", "privacy.epsilon=-1"): (2, "greater than 0 (got -1)"),
    ("simulate", "digits", "--set", "privacy.epsilon=nan"): (2, "finite number (got nan)"),
    ("simulate", "digits", "--set", "privacy.epsilon=20"): (2, "is over policy.epsilon 14.0"),
    ("simulate", "digits", "--set", "privacy.delta=0.004"): (2, "one over the nominal size"),
    ("simulate", "digits", "--set", "privacy.batch=261"): (2, "over the mean nominal size 260"),
    ("simulate", "digits", "--set", "model.options.width=x"): (2, "whole number (got 'x')"),
    ("simulate", "digits", "--set", "model.options.widht=3"): (2, "did you mean 'width'?"),
    ("simulate", "digits", "--set", "data.partition.kind=natural"): (2, "no groups of its own"),
    ("simulate", "digits", "--sites", "0"): (2, "greater than or equal to 1"),
    ("simulate", "digits", "--rounds", "0"): (2, "greater than or equal to 1"),
    ("simulate", "digits", "--rounds", "99999999"): (2, "less than or equal to 1000000"),
    ("simulate", "digits", "--set", "privacy.epsilon=5000", "--set", "policy.epsilon=9000"): (
        2,
        "1000 or less",
    ),
    (
        "simulate",
        "digits",
        "--engine",
        "ray",
        "--set",
        "privacy.mechanism=user-level",
    ): (2, "carries no user-level noise: use --engine local"),
    ("simulate", "digits", "--workers", "0"): (2, "--workers 0 must be at least 1"),
    ("simulate", "digits", "--device", "tpu"): (2, "unknown device 'tpu'"),
    ("simulate", "digits", "--device", "cuda:99"): (2, "no device 'cuda:99'"),
    ("simulate", "fashion-mnist", "--set", "data.dir=nowhere"): (2, "no data folder nowhere"),
    ("simulate", "fashion-mnist", "--data-dir", "nowhere"): (2, "no data folder nowhere"),
    ("simulate", "--resume", "nowhere"): (2, "holds no run to resume"),
    ("simulate", "--resume", "nowhere", "--seed", "1"): (2, "takes only"),
    ("simulate", "digits", "--out", "full"): (2, "exists and isn't empty"),
    ("simulate", "--nonsense"): (2, "No such option"),
    ("audit", "verify", "nowhere.sqlite"): (1, "no ledger at nowhere.sqlite"),
    ("audit", "verify", "full/file"): (1, "key not pinned"),
    ("audit", "verify", "full/file", "--site-key", "ab"): (2, "64 hexadecimal digits"),
    ("audit", "budget", "nowhere.sqlite"): (1, "no ledger at nowhere.sqlite"),
}
_CALIBRATE = {"examples": "600", "batch": "32", "rounds": "95", "steps": "10", "epsilon": "3",
              "delta": "1e-5"}  # fmt: skip
for option, value, remedy in [
    ("epsilon", "nan", "epsilon nan must be"),
    ("epsilon", "inf", "epsilon inf must be"),
    ("epsilon", "0", "epsilon 0.0 must be"),
    ("delta", "0.01", "below 1/600"),
    ("delta", "0", "delta 0.0 must be"),
    ("batch", "601", "--batch 601 must be"),
    ("rounds", "0", "--rounds 0 must be"),
    ("epsilon", "1e-12", "no noise multiplier"),
]:
    words = [w for k, v in {**_CALIBRATE, option: value}.items() for w in (f"--{k}", v)]
    CASES["calibrate", *words] = (2, remedy)


@pytest.mark.parametrize("arguments", CASES, ids=" ".join)
def test_bad_input_is_one_clear_line(
    arguments: tuple[str, ...], tmp_path: Path, bract: Callable[..., Any]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    done = bract(*arguments, "--json")
    code, remedy = CASES[arguments]
    assert done.returncode == code
    assert remedy in json.loads(done.stdout)["error"]["message"]
    assert done.stdout.count("\n") == 1
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_calibrate_gives_the_private_side(bract: Callable[..., Any]) -> None:
    words = [word for name, value in _CALIBRATE.items() for word in (f"--{name}", value)]
    done = bract("calibrate", *words, "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["epsilon"] <= 3
    assert 0 <= report["epsilon_prv"] - report["epsilon"] <= 0.02
    assert report["steps"] <= report["max_steps"]
