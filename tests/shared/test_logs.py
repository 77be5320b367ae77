"""A line of the log: strict JSON or readable text, known fields alone, and nothing quoted."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bract.shared import logs
from bract.shared.logs import FIELDS, GREATEST_LINE, JsonLines, TextLines, printable

FORMS = {"json": JsonLines(), "text": TextLines()}


def record(message: str = "said", *arguments: Any, error: bool = False, **more: Any) -> Any:
    made = logging.LogRecord(
        "bract.client", logging.WARNING, "x.py", 1, message, arguments, None, "f"
    )
    if error:
        try:
            raise ValueError("secret 42")
        except ValueError:
            made.exc_info = sys.exc_info()
    for name, value in more.items():
        setattr(made, name, value)
    return made


def strict(line: str) -> dict[str, Any]:
    assert "\n" not in line
    value: dict[str, Any] = json.loads(line, parse_constant=lambda word: pytest.fail(word))
    return value


def test_a_json_line_has_its_time_its_words_and_the_known_fields() -> None:
    line = FORMS["json"].format(record("round %d", 3, event="round", round=3, completed=True))
    value = strict(line)
    assert value.pop("time").endswith("Z")
    assert value == {
        "level": "warning",
        "logger": "bract.client",
        "event": "round",
        "round": 3,
        "completed": True,
        "message": "round 3",
    }


def test_a_text_line_says_the_same() -> None:
    line = FORMS["text"].format(record("round %d", 3, event="round", round=3))
    assert line.endswith("Z warning bract.client round 3 event=round round=3")


@pytest.mark.parametrize("form", FORMS)
def test_a_field_that_is_not_known_is_never_printed(form: str) -> None:
    line = FORMS[form].format(record(patient="secret 42", line={"x": "secret 42"}, site="alpha"))
    assert "secret" not in line
    assert "alpha" in line


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FIELDS)
def test_a_known_field_that_is_no_scalar_is_never_printed(form: str, name: str) -> None:
    for value in ({"x": "secret"}, ["secret"], b"secret", object(), None):
        assert "secret" not in FORMS[form].format(record(**{name: value}))
        assert name not in FORMS[form].format(record(**{name: value}))


@pytest.mark.parametrize("form", FORMS)
def test_the_text_of_an_exception_is_never_quoted(form: str) -> None:
    line = FORMS[form].format(record("site failed: %s", "ValueError", error=True))
    assert "ValueError" in line
    assert "secret" not in line
    assert "Traceback" not in line


@example(message="a\x85b", site="c\u2028d\x1b[2J", form="json")
@given(
    message=st.text(),
    site=st.text() | st.integers() | st.floats(),
    form=st.sampled_from(sorted(FORMS)),
)
def test_whatever_is_said_is_one_line_and_strict(message: str, site: Any, form: str) -> None:
    line = FORMS[form].format(record("%s", message, site=site))
    assert len(line.splitlines()) == 1
    if form == "json":
        assert set(strict(line)) <= {"time", "level", "logger", "message", "site"}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_stranger_sent_begins_no_line_and_moves_no_cursor(form: str) -> None:
    quoted = "x\nforged\r\u2028line\x1b[2J"
    line = FORMS[form].format(record(quoted, site=quoted))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert "forged" in line


def test_a_line_has_a_bound_and_words_are_left_as_they_are() -> None:
    assert len(FORMS["text"].format(record("x" * 10**6))) <= GREATEST_LINE + 1
    assert len(FORMS["json"].format(record("x" * 10**6))) <= GREATEST_LINE + 200
    assert printable("ε of this run at most 1.5") == "ε of this run at most 1.5"


@pytest.fixture
def untouched() -> Iterator[None]:
    """Puts back what `begin` changes for the whole process."""
    names = ("", "bract", "flwr", "uvicorn", "httpx", "httpcore", "alembic")
    loggers = [logging.getLogger(name) for name in names]
    before = [(one, one.handlers[:], one.level, one.propagate) for one in loggers]
    yield
    for one, handlers, level, propagate in before:
        one.handlers[:] = handlers
        one.setLevel(level)
        one.propagate = propagate


@pytest.mark.usefixtures("untouched")
def test_libraries_are_heard_only_in_their_errors_and_only_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.begin("json")
    logging.getLogger("flwr").info("a request, a public key")
    logging.getLogger("httpx").warning("a request, a public key")
    logging.getLogger("bract.server").info("serving", extra={"event": "serving", "port": 1})
    logging.getLogger("uvicorn").error("gone")
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [strict(line) for line in shown.err.splitlines()]
    assert [line["message"] for line in lines] == ["serving", "gone"]
    assert (lines[0]["event"], lines[0]["port"]) == ("serving", 1)
