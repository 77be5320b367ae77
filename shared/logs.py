"""Logs of long-running processes: one line an event, as text or as JSON."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from typing import Literal

Format = Literal["text", "json"]
# What a line may carry beside its words: public names alone, so that no value slips in.
GREATEST_LINE = 2000
FIELDS = ("event", "site", "reason", "round", "replied", "refused", "port", "completed")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message and the known fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; an exception is named by its type, never quoted."""
        message = printable(record.getMessage())
        return json.dumps({**_facts(record), "message": message}, ensure_ascii=False)


class TextLines(logging.Formatter):
    """One readable line an event."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, its known fields last."""
        facts = _facts(record)
        head = [str(facts.pop(name)) for name in ("time", "level", "logger")]
        fields = " ".join(f"{name}={value}" for name, value in facts.items())
        return printable(" ".join([*head, record.getMessage(), fields])).rstrip()


def begin(form: Format) -> None:
    """Sends the log of this process to stderr in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.getLogger("bract").setLevel(min(logging.INFO, _level("bract")))
    # Flower's own lines repeat requests, public keys among them.
    for name in ("flwr", "uvicorn", "httpx", "httpcore", "alembic"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
        logger.setLevel(logging.ERROR)


def end(message: str) -> None:
    """Writes why a command ends to stderr: in the form of its log, where that is JSON."""
    if any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        logging.getLogger("bract").error(message, extra={"event": "ended"})
    else:
        print(f"bract: {message}", file=sys.stderr)


def printable(text: str) -> str:
    r"""Returns one bounded line of printable text; what else was there is escaped.

    A library may quote what a stranger sent, and a line's end in it would begin a forged line.

    Example:
        >>> printable("ends here\nnot a line")
        'ends here\\nnot a line'
    """
    cut = text if len(text) <= GREATEST_LINE else text[:GREATEST_LINE] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def _level(name: str) -> int:
    level = logging.getLogger(name).level
    return level or logging.INFO


def _facts(record: logging.LogRecord) -> dict[str, object]:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    facts: dict[str, object] = {
        "time": f"{moment}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
    }
    for name in FIELDS:
        value = getattr(record, name, None)
        finite = not isinstance(value, float) or math.isfinite(value)  # JSON has no other
        if isinstance(value, str | int | float | bool) and finite:
            facts[name] = printable(value) if isinstance(value, str) else value
    return facts
