"""Progress on stderr, from the server's log records."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bract.server import checkpoint
from bract.shared.contract import Contract


class _RoundHandler(logging.Handler):
    def __init__(self, progress: Progress, total: int, done: int) -> None:
        super().__init__()
        self._progress = progress
        self._task = progress.add_task("rounds", total=total, completed=done, accuracy="", spent="")

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "event", None) != "round" or not getattr(record, "completed", False):
            return
        line = getattr(record, "line", {})
        spent, accuracy = line.get("epsilon_run"), line.get("validation_accuracy")
        what, value = (
            ("accuracy", accuracy)
            if accuracy is not None
            else ("loss", line.get("validation_loss"))
        )
        self._progress.update(
            self._task,
            completed=line.get("round", 0),
            accuracy="" if value is None else f"validation {what} {value:.3f}",
            spent="ε unbounded" if spent is None else f"ε {spent:.2f}",
        )
        self._progress.refresh()


@contextmanager
def showing(agreed: Contract, out: Path) -> Iterator[None]:
    """Shows round, accuracy, ε and the time left while a block runs."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    logger = logging.getLogger("bract.server")
    logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    state = checkpoint.load(out / "checkpoint", agreed.sha256)
    progress = Progress(
        TextColumn("round {task.completed}/{task.total}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[accuracy]}  {task.fields[spent]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        # No refreshing thread: workers are forked while this is shown.
        auto_refresh=False,
    )
    handler = _RoundHandler(progress, agreed.rounds, state.round if state else 0)
    logger.addHandler(handler)
    try:
        with progress:
            yield
    finally:
        logger.removeHandler(handler)
