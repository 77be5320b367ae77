"""TensorBoard and MLflow, fed from what a run leaves: lines of metrics.jsonl, and summary.json.

Nothing else is read, so that no tracker ever says what the run folder does not; and nothing leaves
this machine: event files and MLflow's database lie under RUN/tracking.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from bract.shared import contract
from bract.shared.errors import UnknownName, UsageError

FOLDER = "tracking"


class Tracker(Protocol):
    """Takes a run's figures; `written` is the last round that it holds already."""

    written: int

    def write(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Adds the figures of a round."""

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Adds the summary, None where the run did not come to its end, and lets go of files."""


def check(kinds: Iterable[str]) -> None:
    """Returns where these trackers are installed.

    Raises:
        UnknownName: for another tracker than there is.
        UsageError: where its library is not installed, naming the extra.
    """
    for kind in kinds:
        if kind not in TRACKERS:
            raise UnknownName("tracker", kind, TRACKERS)
        try:
            _LIBRARIES[kind]()
        except ImportError as error:
            raise UsageError(
                f"--track {kind} needs a library that is not installed: pip install "
                "'bract[tracking]'"
            ) from error


@contextmanager
def following(run: Path, kinds: Iterable[str]) -> Iterator[None]:
    """Writes each round once the server says that it is done, and the summary when a block ends.

    What the run folder held before comes first, so that a run that goes on is whole. A tracker that
    fails during the run is reported by the log and does not stop the run.
    """
    kinds = list(dict.fromkeys(kinds))
    check(kinds)
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(_followed(run, TRACKERS[kind](run)))
        yield


@contextmanager
def _followed(run: Path, tracker: Tracker) -> Iterator[None]:
    handler = _RoundHandler(lambda: _catch_up(run, tracker))
    logger = logging.getLogger("bract.server")
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    logger.addHandler(handler)
    summary = None
    try:
        yield
        _catch_up(run, tracker)
        summary = _summary(run)
    finally:
        logger.removeHandler(handler)
        tracker.end(summary)


class _RoundHandler(logging.Handler):
    """Calls a function after each completed round."""

    def __init__(self, completed: Callable[[], None]) -> None:
        super().__init__()
        self._completed = completed

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", None) == "round" and getattr(record, "completed", False):
            try:
                self._completed()
            except Exception:
                self.handleError(record)


def _catch_up(run: Path, tracker: Tracker) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in map(json.loads, lines):
        number = line.pop("round")
        if number > tracker.written:
            tracker.write(number, figures_of(line))


def _summary(run: Path) -> Mapping[str, Any] | None:
    path = run / "summary.json"
    if not path.exists():
        return None
    read: Mapping[str, Any] = json.loads(path.read_bytes())
    return read


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a report by name, those of a site or a group as "name/site".

    Example:
        >>> figures_of({"replied": 3, "loss": None, "by_site": {"a": 0.5}, "run": "mine"})
        {'replied': 3.0, 'by_site/a': 0.5}
    """
    found = {}
    for name, value in report.items():
        inner = value if isinstance(value, Mapping) else {None: value}
        for key, figure in inner.items():
            if isinstance(figure, int | float) and not isinstance(figure, bool):
                found[name if key is None else f"{name}/{key}"] = float(figure)
    return {name: value for name, value in found.items() if math.isfinite(value)}


class TensorBoard:
    """One event file, written anew: it holds all rounds of the run and then the summary.

    Written record by record in this thread: TensorFlow is not needed, and sites' processes may be
    forked meanwhile.
    """

    def __init__(self, run: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run / FOLDER / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.written = 0
        self._event = Event
        self._file = (folder / "events.out.tfevents.bract").open("wb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")

    def write(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Adds a scalar for each figure."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=v) for name, v in figures.items()]
        self._add(step=round_number, summary=Summary(value=scalars))
        self.written = round_number

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Adds the summary's numbers under "summary/", and all of it as text."""
        if summary is not None:
            figures = figures_of(summary)
            self.write(summary["rounds"], {f"summary/{name}": v for name, v in figures.items()})
            self._add(step=summary["rounds"], summary=_text("summary.json", summary))
        self._records.close()

    def _add(self, **facts: Any) -> None:
        event = self._event(wall_time=time.time(), **facts)
        self._records.write(event.SerializeToString())
        self._records.flush()


def _text(tag: str, value: Mapping[str, Any]) -> Any:
    """Returns a summary for TensorBoard's text page: JSON, shown as it is."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    shown = json.dumps(value, indent=2, ensure_ascii=False)
    quoted = "\n".join(f"    {line}" for line in shown.splitlines())
    metadata = create_summary_metadata(display_name=tag, description="")
    tensor = make_tensor_proto(quoted.encode())
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


class MLflow:
    """A run in an MLflow database of its own; one that goes on is found by its contract."""

    def __init__(self, run: Path) -> None:
        client = _mlflow()
        folder = (run / FOLDER / "mlflow").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        agreed = contract.read(run / "contract.json").contract
        self._run, self._client = run, client(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        experiment = self._client.get_experiment_by_name("bract")
        place = (
            experiment.experiment_id
            if experiment is not None
            else self._client.create_experiment("bract", (folder / "artifacts").as_uri())
        )
        named = f"tags.`bract.contract` = '{agreed.sha256}'"
        found = self._client.search_runs([place], filter_string=named)
        if found:
            self._id, self.written = found[0].info.run_id, self._last(found[0].info.run_id)
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id, self.written = self._begin(place, agreed), 0

    def write(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Adds the figures at a step of the round's number."""
        self._log(round_number, figures)
        self.written = round_number

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Adds the summary's numbers as "summary/…", what it claims as tags, and its files."""
        if summary is None:
            self._client.set_terminated(self._id, status="FAILED")
            return
        figures = figures_of(summary)
        self._log(summary["rounds"], {f"summary/{name}": v for name, v in figures.items()})
        for name in ("guarantee", "adjacency", "unit"):
            self._client.set_tag(self._id, f"bract.{name}", summary[name])
        for name in ("summary.json", "contract.json"):
            self._client.log_artifact(self._id, str(self._run / name))
        self._client.set_terminated(self._id)

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), value, now, step) for name, value in figures.items()]
        for start in range(0, len(metrics), 1000):  # the most that a batch may hold
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def _last(self, identity: str) -> int:
        return max(
            (m.step for m in self._client.get_metric_history(identity, "replied")), default=0
        )

    def _begin(self, place: str, agreed: contract.Contract) -> str:
        tags = {"bract.contract": agreed.sha256, "bract.simulation": str(agreed.simulation)}
        begun = self._client.create_run(place, tags=tags, run_name=agreed.run)
        identity: str = begun.info.run_id
        terms = {"rounds": agreed.rounds, "sites": len(agreed.cohort), "model": agreed.model.name}
        parts = {"training": agreed.training, "privacy": agreed.privacy, "data": agreed.data}
        settled = {
            f"{part}.{name}": value
            for part, held in parts.items()
            for name, value in held.model_dump(mode="json").items()
            if isinstance(value, bool | int | float | str)
        }
        for name, value in {**terms, **settled}.items():
            self._client.log_param(identity, name, value)
        return identity


def _allowed(name: str) -> str:
    """Returns a name that MLflow takes: a site's may hold more than its letters."""
    return "".join(one if one.isalnum() or one in "_-. :/" else "_" for one in name)


def _mlflow() -> Any:
    # Neither of them is asked for: a run's figures stay here, and stderr is for the run.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    import sqlalchemy  # noqa: F401  MLflow names a missing one only when it opens the database
    from mlflow import MlflowClient

    return MlflowClient


def _tensorboard() -> Any:
    from tensorboard.summary.writer import record_writer

    return record_writer


TRACKERS: dict[str, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
_LIBRARIES: dict[str, Callable[[], Any]] = {"tensorboard": _tensorboard, "mlflow": _mlflow}
