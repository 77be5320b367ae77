"""Trackers say what metrics.jsonl and summary.json say: read back by their own libraries."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bract.shared import tracking
from bract.shared.errors import UnknownName

Bract = Callable[..., Any]
QUICK = ("--rounds", "2", "--sites", "2", "--model", "linear", "--workers", "1")
EVALUATION = ("--set", "evaluation.every=2", "--set", "evaluation.noise_multiplier=8")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def expected(run: Path, name: str) -> dict[int, float]:
    """Returns a figure's values by round, of the rounds that have it."""
    return {line["round"]: line[name] for line in lines(run) if line[name] is not None}


def board(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tracking/tensorboard"))
    read.Reload()
    return read


def scalars(run: Path, name: str) -> dict[int, float]:
    return {event.step: event.value for event in board(run).Scalars(name)}


def flow(run: Path) -> tuple[Any, list[Any]]:
    """Returns MLflow's client of a run folder, and the runs that it knows."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'tracking/mlflow/mlflow.db'}")
    experiment = client.get_experiment_by_name("bract")
    assert experiment is not None
    return client, client.search_runs([experiment.experiment_id])


def test_both_trackers_hold_every_round_and_the_summary(bract: Bract, tmp_path: Path) -> None:
    both = ("--track", "tensorboard", "--track", "mlflow")
    done = bract("simulate", "digits", *QUICK, *EVALUATION, *both, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    run, summary = tmp_path / "run", json.loads(done.stdout)
    for name in ("validation_accuracy", "epsilon_run", "update_bytes", "local_accuracy_worst"):
        assert scalars(run, name) == pytest.approx(expected(run, name), rel=1e-6)
    by_site = summary["local_accuracy_by_site"]["site-1"]
    assert scalars(run, "local_accuracy_by_site/site-1") == pytest.approx({2: by_site}, rel=1e-6)
    assert scalars(run, "summary/epsilon") == pytest.approx({2: summary["epsilon"]}, rel=1e-6)
    (text,) = board(run).Tensors("summary.json")
    shown = "".join(line[4:] for line in text.tensor_proto.string_val[0].decode().splitlines())
    assert json.loads(shown) == summary

    client, (kept,) = flow(run)
    assert kept.info.status == "FINISHED"
    assert kept.data.params["privacy.noise_multiplier"] == str(summary["noise_multiplier"])
    assert kept.data.tags["bract.guarantee"] == "none: simulation"
    for name in ("validation_accuracy", "epsilon_run", "update_bytes", "local_accuracy_worst"):
        history = {m.step: m.value for m in client.get_metric_history(kept.info.run_id, name)}
        assert history == expected(run, name)
    assert kept.data.metrics["summary/test_accuracy"] == summary["test_accuracy"]
    artifacts = Path(kept.info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "summary.json").read_bytes() == (run / "summary.json").read_bytes()

    # After the fact and again: nothing is there twice.
    with tracking.following(run, ["mlflow", "tensorboard"]):
        pass
    client, (kept,) = flow(run)
    assert len(client.get_metric_history(kept.info.run_id, "replied")) == 2
    assert len(board(run).Scalars("replied")) == 2


@pytest.fixture
def begun(world: Any, tmp_path: Path) -> Path:
    """A run folder whose server has just begun."""
    run = tmp_path / "run"
    run.mkdir()
    signed = world.sign(world.contract())
    (run / "contract.json").write_bytes(signed.to_bytes())
    return run


def completed(run: Path, number: int) -> None:
    """Plays the server's word of a round, after its line."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"round": number, "replied": 3, "validation_loss": 1 / number}) + "\n"
        )
    log = logging.getLogger("bract.server")
    log.info("round %d completed", number, extra={"event": "round", "completed": True})


def test_a_round_is_on_disk_as_soon_as_the_server_says_so(begun: Path) -> None:
    with tracking.following(begun, ["tensorboard"]):
        for number in (1, 2):
            completed(begun, number)
            assert list(scalars(begun, "replied")) == list(range(1, number + 1))
        logging.getLogger("bract.server").info("other", extra={"event": "round"})
        assert len(scalars(begun, "replied")) == 2


def interrupted(run: Path, kind: str) -> None:
    with tracking.following(run, [kind]):
        completed(run, 1)
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_a_run_that_goes_on_has_each_round_once(begun: Path, kind: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(begun, kind)
    if kind == "mlflow":
        assert [run.info.status for run in flow(begun)[1]] == ["FAILED"]
    with tracking.following(begun, [kind]):
        completed(begun, 2)
    if kind == "tensorboard":
        assert list(scalars(begun, "replied")) == [1, 2]
    else:
        client, (kept,) = flow(begun)
        history = client.get_metric_history(kept.info.run_id, "replied")
        assert [metric.step for metric in history] == [1, 2]


def test_a_tracker_that_fails_does_not_stop_the_run(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking.following(begun, ["tensorboard"]):
        with monkeypatch.context() as patch:
            patch.setattr(tracking.TensorBoard, "write", _full)
            completed(begun, 1)
        completed(begun, 2)
    assert "No space left" in capsys.readouterr().err
    assert list(scalars(begun, "replied")) == [1, 2]


def _full(*_: Any) -> None:
    raise OSError("No space left")


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow")])
def test_a_missing_extra_is_named_before_anything_is_charged(
    bract: Bract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    done = bract("simulate", "digits", *QUICK, "--track", kind, "--out", "run")
    assert done.returncode == 2
    assert "pip install 'bract[tracking]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_site_name_becomes_one_that_mlflow_takes() -> None:
    assert tracking._allowed("local_accuracy_by_site/ward@a+b=1") == (
        "local_accuracy_by_site/ward_a_b_1"
    )


def test_an_unknown_tracker_is_bad_usage() -> None:
    with pytest.raises(UnknownName, match="did you mean 'tensorboard'"):
        tracking.check(["tensorbord"])


def test_the_command_offers_every_tracker() -> None:
    from bract.shared import cli

    option = cli.TRACK(lambda: None).__click_params__[0]  # type: ignore[attr-defined]
    assert set(option.type.choices) == set(tracking.TRACKERS)
