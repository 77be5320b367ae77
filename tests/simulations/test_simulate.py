"""`bract simulate` as a user runs it: in a process of its own, on real data."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from safetensors.numpy import load_file

Bract = Callable[..., Any]
QUICK = ("--rounds", "3", "--sites", "3", "--model", "linear", "--workers", "1")


def schema(name: str) -> Any:
    text = (resources.files("bract.shared.schemas") / f"{name}.schema.json").read_text()
    return json.loads(text)


def strict(text: str) -> Any:
    """One line, one object, no NaN."""
    assert text.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, parse_constant=refuse)


def weights_equal(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def ledgers(run: Path) -> list[str]:
    return [str(path) for path in sorted((run / "ledgers").glob("*.sqlite"))]


def test_a_run_leaves_everything_an_auditor_needs(bract: Bract, tmp_path: Path) -> None:
    done = bract("simulate", "digits", *QUICK, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    summary, run = strict(done.stdout), tmp_path / "run"
    jsonschema.validate(summary, schema("summary"))
    assert json.loads((run / "summary.json").read_text()) == summary
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    for line in lines:
        jsonschema.validate(line, schema("metrics"))
        assert line["weights_bytes"] == line["update_bytes"] == 4 * (64 * 10 + 10)
    assert summary["update_bytes"] == 2600
    assert 0.9 < summary["auc"] < 1
    assert summary["guarantee"] == "none: simulation"
    assert summary["epsilon"] == summary["epsilon_run"] <= 4.0
    assert 0 <= summary["epsilon_prv"] - summary["epsilon"] <= 0.02
    assert sum(map(sum, summary["confusion"])) == 360
    assert set(summary["heads"]) == set(summary["per_site"])
    assert (run / "model.safetensors").exists()
    verified = bract("audit", "verify", *ledgers(run), "--json")
    assert verified.returncode == 0, verified.stderr
    jsonschema.validate(strict(verified.stdout), schema("audit-verify"))
    assert all(chain["anchored"] for chain in strict(verified.stdout)["chains"])
    budget = bract("audit", "budget", *ledgers(run), "--json")
    jsonschema.validate(strict(budget.stdout), schema("audit-budget"))
    for domain in strict(budget.stdout)["domains"]:
        assert abs(domain["epsilon_prv"] - domain["epsilon"]) <= 0.02
        assert domain["epsilon"] <= domain["epsilon_filter"] <= domain["limit"]
        assert domain["seeded"]
        assert domain["more_rounds"] > 0


def test_a_cut_or_altered_ledger_is_refused_naming_it(bract: Bract, tmp_path: Path) -> None:
    bract("simulate", "digits", *QUICK, "--out", "run")
    for fault, statement in {
        "cut short": "DELETE FROM entries WHERE sequence = (SELECT max(sequence) FROM entries)",
        "entry 3": "UPDATE entries SET body = replace(body, '\"round\":2', '\"round\":1') "
        "WHERE sequence = 3",
    }.items():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        path = tmp_path / "copy/ledgers/site-1.sqlite"
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()
        done = bract("audit", "verify", *ledgers(tmp_path / "copy"), "--json")
        assert done.returncode == 1
        error = strict(done.stdout)
        jsonschema.validate(error, schema("error"))
        assert "site-1" in error["error"]["message"]
        assert fault in error["error"]["message"]
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("model", ["cnn", "linear"])
def test_any_number_of_workers_gives_the_same_weights(
    bract_process: Bract, tmp_path: Path, model: str
) -> None:
    common = ("simulate", "digits", "--rounds", "2", "--model", model, "--seed", "11")
    for workers in ("1", "2", "3"):
        done = bract_process(*common, "--workers", workers, "--out", workers)
        assert done.returncode == 0, done.stderr
    assert weights_equal(tmp_path / "1", tmp_path / "2")
    assert weights_equal(tmp_path / "1", tmp_path / "3")


def test_another_seed_gives_other_weights(bract: Bract, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        bract("simulate", "digits", *QUICK, "--seed", seed, "--out", seed)
    assert not weights_equal(tmp_path / "1", tmp_path / "2")


def test_runs_over_one_state_compose_until_every_site_refuses(bract: Bract, tmp_path: Path) -> None:
    common = ("simulate", "digits", *QUICK, "--state", "state", "--json")
    change = ("policy.epsilon=6.0", "policy.composition.rule=filter", "policy.composition.order=4")
    ceiling = [word for setting in change for word in ("--set", setting)]
    first = strict(bract(*common, *ceiling, "--out", "a").stdout)
    second = strict(bract(*common, *ceiling, "--out", "b").stdout)
    assert second["epsilon"] > second["epsilon_run"] == first["epsilon"]
    before = [Path(path).read_bytes() for path in ledgers(tmp_path / "state")]
    third = bract(*common, *ceiling, "--out", "c")
    assert third.returncode == 1
    assert "budget-exhausted" in strict(third.stdout)["error"]["message"]
    assert [Path(path).read_bytes() for path in ledgers(tmp_path / "state")] == before
    assert json.loads((tmp_path / "c/summary.json").read_text())["rounds"] == 0
    for run in ("a", "b", "c"):
        assert bract("audit", "verify", *ledgers(tmp_path / run)).returncode == 0


def test_a_run_that_every_site_refuses_from_the_start_says_why(
    bract: Bract, tmp_path: Path
) -> None:
    done = bract(
        "simulate", "digits", *QUICK, "--set", "privacy.noise_multiplier=0.2",
        "--out", "run", "--json",
    )  # fmt: skip
    assert done.returncode == 1
    message = strict(done.stdout)["error"]["message"]
    assert message.startswith("no round was completed: ")
    assert "policy-noise" in message


def test_a_killed_run_goes_on_after_another_used_its_state(bract: Bract, tmp_path: Path) -> None:
    """Its server remembers older heads than the sites can show links from."""
    from bract.server.rounds import RoundLoop

    common = ("simulate", "digits", *QUICK, "--state", "state", "--set", "policy.epsilon=60")
    inner, done = RoundLoop._round, []

    def killed(loop: RoundLoop, grid: Any, state: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return inner(loop, grid, state)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RoundLoop, "_round", killed)
        assert bract(*common, "--out", "a").returncode == 130
    assert bract(*common, "--out", "b").returncode == 0
    resumed = bract("simulate", "--resume", "a", "--json")
    assert resumed.returncode == 0, resumed.stderr
    summary = strict(resumed.stdout)
    assert summary["refused"] == []


def test_another_partition_over_one_state_is_another_domain(bract: Bract, tmp_path: Path) -> None:
    common = ("simulate", "digits", *QUICK, "--state", "state")
    assert bract(*common, "--out", "a").returncode == 0
    for change in (("--seed", "9"), ("--sites", "4"), ("--set", "data.partition.kind=sizes")):
        done = bract(*common, *change, "--out", "b")
        assert done.returncode == 2
        assert "another partition is another domain" in done.stderr
        assert not (tmp_path / "b").exists()


def test_sites_that_the_data_do_not_suffice_for_are_refused_before_anything_is_written(
    bract: Bract, tmp_path: Path
) -> None:
    common = ("simulate", "digits", *QUICK, "--state", "state", "--out", "a")
    refused = bract(*common, "--sites", "1000")
    assert (refused.returncode, "1000 sites cannot share" in refused.stderr) == (2, True)
    assert [path.name for path in (tmp_path / "a", tmp_path / "state") if path.exists()] == []
    corrected = bract(*common)
    assert corrected.returncode == 0, corrected.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("training.views=2", "training.augmentation=shift", "execution.mode=opacus-ghost"),
            "opacus-ghost takes no Linear whose parameter is used twice: use the mode opacus-hooks",
        ),
        (
            ("execution.precision=bfloat16", "execution.mode=opacus-hooks"),
            "precision bfloat16 needs the mode book-keeping, not opacus-hooks",
        ),
    ],
)
def test_a_way_to_compute_that_a_site_would_refuse_is_refused_before_anything_is_written(
    bract: Bract, tmp_path: Path, settings: tuple[str, ...], words: str
) -> None:
    """Its sites refused every round, and the run told to look into ledgers that held nothing."""
    more = [word for setting in settings for word in ("--set", setting)]
    refused = bract("simulate", "digits", *QUICK, *more, "--state", "state", "--out", "a")
    assert refused.returncode != 0
    assert words in refused.stderr
    assert [path.name for path in (tmp_path / "a", tmp_path / "state") if path.exists()] == []


def test_views_of_what_is_no_image_are_refused_before_anything_is_written(
    bract: Bract, tmp_path: Path
) -> None:
    views = ("--set", "training.augmentation=shift")
    refused = bract("simulate", "heart-disease", *QUICK, "--sites", "4", *views, "--out", "a")
    assert refused.returncode == 2
    assert "augmentation 'shift' is for images, and an example has the shape" in refused.stderr
    assert not (tmp_path / "a").exists()


def test_a_run_without_privacy_says_so_everywhere_and_keeps_to_a_throwaway_domain(
    bract: Bract, tmp_path: Path
) -> None:
    plain = ("--set", "privacy.mechanism=none")
    common = ("simulate", "digits", *QUICK, "--state", "state", "--json")
    summary = strict(bract(*common, *plain, "--out", "plain").stdout)
    assert summary["guarantee"] == "none: unprotected"
    assert summary["epsilon"] is None
    assert summary["epsilon_run"] is None
    assert summary["unbounded"] is True
    assert json.loads((tmp_path / "plain/contract.json").read_text())["contract"]["training"][
        "learning_rate"
    ] == pytest.approx(0.5)
    private = strict(bract(*common, "--out", "private").stdout)
    assert private["unbounded"] is False
    assert private["epsilon"] == private["epsilon_run"]
    assert bract("audit", "verify", *ledgers(tmp_path / "private")).returncode == 0


@pytest.mark.parametrize("kind", ["dirichlet", "label", "sizes"])
def test_uneven_sites_train_under_their_public_sizes(
    bract: Bract, tmp_path: Path, kind: str
) -> None:
    change = ("data.partition.labels_per_site=8", f"data.partition.kind={kind}", "privacy.batch=30")
    settings = [word for setting in change for word in ("--set", setting)]
    done = bract("simulate", "digits", *QUICK, *settings, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    contract = json.loads((tmp_path / "run/contract.json").read_text())["contract"]
    sizes = [site["nominal_size"] for site in contract["cohort"]]
    assert all(size == int(str(size)[:2].ljust(len(str(size)), "0")) for size in sizes)
    assert kind == "label" or len(set(sizes)) > 1


def test_ghost_clipping_gives_what_hooks_give(bract: Bract, tmp_path: Path) -> None:
    common = ("simulate", "digits", "--rounds", "2", "--workers", "1")
    bract(*common, "--out", "hooks")
    done = bract(*common, "--set", "execution.mode=opacus-ghost", "--out", "ghost")
    assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("hooks", "ghost"))
    for name in one:
        assert abs(one[name] - other[name]).max() < 1e-4


def test_a_killed_run_goes_on_with_equal_weights_and_every_charge_kept(
    bract: Bract, tmp_path: Path
) -> None:
    common = ("simulate", "digits", "--rounds", "8", "--sites", "3", "--seed", "3")
    whole = strict(bract(*common, "--json", "--out", "whole").stdout)
    program = str(Path(sys.executable).with_name("bract"))
    command, acknowledged = [program, *common, "--out", "run"], 0
    run = tmp_path / "run"
    for target in (1, 3, 5):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while charges(run) < 3 * (target - 1) + 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert charges(run) >= acknowledged
        acknowledged = charges(run)
        command = [program, "simulate", "--resume", "run", "--workers", "2"]
    done = bract("simulate", "--resume", "run", "--json")
    assert done.returncode == 0, done.stderr
    resumed = strict(done.stdout)
    assert weights_equal(tmp_path / "whole", run)
    assert resumed["test_accuracy"] == whole["test_accuracy"]
    assert resumed["epsilon"] >= whole["epsilon"]
    assert charges(run) >= acknowledged
    assert (run / "metrics.jsonl").read_text().count("\n") == 8
    verified = bract("audit", "verify", *ledgers(run))
    assert verified.returncode == 0, verified.stderr


def charges(run: Path) -> int:
    total = 0
    for path in (run / "ledgers").glob("*.sqlite"):
        try:
            connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
            query = (
                'SELECT count(*) FROM entries WHERE CAST(body AS TEXT) LIKE \'%"kind":"charge"%\''
            )
            total += connection.execute(query).fetchone()[0]
            connection.close()
        except sqlite3.Error:
            pass
    return total


def test_two_runs_on_one_state_do_not_mix(
    bract: Bract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bract.simulations.state import State

    common = ("simulate", "digits", *QUICK, "--state", "state")
    assert bract(*common, "--out", "a").returncode == 0
    before = [Path(path).read_bytes() for path in ledgers(tmp_path / "state")]
    monkeypatch.setattr("bract.shared.locks.LOCK_SECONDS", 0.2)
    with State.under(tmp_path / "state").locked():
        done = bract(*common, "--out", "b", "--json")
    assert done.returncode == 1
    assert "another process uses" in strict(done.stdout)["error"]["message"]
    assert [Path(path).read_bytes() for path in ledgers(tmp_path / "state")] == before


def test_over_a_hundred_sites_share_one_ledger_file(bract: Bract, tmp_path: Path) -> None:
    done = bract(
        "simulate", "digits", "--model", "linear", "--sites", "101", "--rounds", "1",
        "--set", "privacy.batch=6", "--workers", "1", "--out", "run", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [Path(path).name for path in ledgers(tmp_path / "run")] == ["all.sqlite"]
    assert len(strict(done.stdout)["heads"]) == 101
    verified = strict(bract("audit", "verify", *ledgers(tmp_path / "run"), "--json").stdout)
    assert len(verified["chains"]) == 101


def test_a_model_with_batch_statistics_is_refused_with_opacus_reason(
    bract: Bract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def model(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    done = bract("simulate", "digits", "--model", "mine:model", "--out", "run")
    assert done.returncode == 1
    assert "BatchNorm cannot support training with differential privacy" in done.stderr
    assert done.stderr.count("\n") == 1


def test_fashion_mnist_trains_from_a_named_folder(
    bract: Bract, data_root: Path, tmp_path: Path
) -> None:
    done = bract(
        "simulate", "fashion-mnist", "--model", "linear", "--rounds", "3", "--workers", "1",
        "--set", f"data.dir={data_root / 'fashion-mnist'}", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = strict(done.stdout)
    assert summary["test_accuracy"] > 0.5
    assert sum(map(sum, summary["confusion"])) == 8000
    assert Path(summary["out"]).parent == tmp_path / "runs"
