"""Lines of a log: one an event, whatever an event quotes."""

from __future__ import annotations

import json
import logging

import pytest

from bract.shared.logs import GREATEST_LINE, JsonLines, TextLines, printable


def record(message: str, **fields: str) -> logging.LogRecord:
    made = logging.LogRecord("flwr", logging.ERROR, "x.py", 1, message, None, None)
    made.__dict__.update(fields)
    return made


@pytest.mark.parametrize("form", [TextLines(), JsonLines()])
def test_what_a_stranger_sent_begins_no_line_and_moves_no_cursor(form: logging.Formatter) -> None:
    quoted = "x\nforged\r\u2028line\x1b[2J"
    line = form.format(record(quoted, site=quoted))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert "forged" in line


def test_a_line_has_a_bound() -> None:
    assert len(TextLines().format(record("x" * 10**6))) <= GREATEST_LINE + 1
    assert len(JsonLines().format(record("x" * 10**6))) <= GREATEST_LINE + 200


def test_words_are_left_as_they_are() -> None:
    assert printable("ε of this run at most 1.5, δ 1e-05") == "ε of this run at most 1.5, δ 1e-05"
    assert json.loads(JsonLines().format(record("ε")))["message"] == "ε"
