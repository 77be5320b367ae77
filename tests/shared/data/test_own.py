"""A data set of the user's own: adapted to what server, site and simulation ask of any."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bract.client.holdings import Roots
from bract.client.settings import DataRoot
from bract.shared import data
from bract.shared.data import Examples
from bract.shared.errors import Refusal, UsageError
from bract.shared.terms import DataTerms

RINGS = "bract.simulations.examples.rings:data"
MODEL = "bract.simulations.examples.rings:model"


def test_the_example_learns_its_rings_through_the_real_command(
    bract: Callable[..., Any], tmp_path: Path
) -> None:
    done = bract(
        *("simulate", "--data", RINGS, "--model", MODEL, "--set", "data.options.noise=0.1"),
        *("--rounds", "60", "--workers", "1", "--out", "run", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test_accuracy"] > 0.85
    agreed = json.loads((tmp_path / "run/contract.json").read_text())["contract"]
    # nothing of the experiment's own data is left, and the options are signed
    assert agreed["data"]["name"] == RINGS
    assert (agreed["data"]["offset"], agreed["data"]["scale"]) == (0.0, 2.0)
    assert agreed["data"]["options"] == {"noise": 0.1}


def test_a_site_runs_the_code_that_its_own_file_names_and_no_other() -> None:
    roots = Roots(
        {"ward": DataRoot(name=RINGS, part="2/5"), "other": DataRoot(name="digits", part="1/1")}
    )
    terms = data.describe(RINGS)
    roots.check("ward", terms)
    assert len(roots.open("ward", terms)) == 800
    assert roots.problems("ward", terms, 800) == []
    with pytest.raises(Refusal, match="holds no"):
        roots.check("other", terms)
    with pytest.raises(Refusal, match="another shape"):
        roots.check("ward", terms.model_copy(update={"options": {"nois": 0.1}}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:data", "cannot be imported: No module named 'no_such_module'"),
        ("bract.simulations.examples.rings:no", "cannot be imported: module"),
        ("bract.simulations.examples.rings:__doc__", "is not a function"),
        (f"{__name__.split('.')[-1]}:broken", "cannot be imported"),
        ("collections:OrderedDict", "lacks train, public, part"),
    ],
)
def test_code_that_will_not_do_is_one_line(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        data.describe(name)
    assert "\n" not in str(raised.value)


def test_unknown_options_and_a_schema_are_refused() -> None:
    with pytest.raises(UsageError, match=r"its factory fails with TypeError: .*'nois'"):
        data.describe(RINGS, {"nois": 0.1})
    from bract.shared.preparation import Images

    with pytest.raises(UsageError, match="takes no schema"):
        data.describe(RINGS, {}, Images(labels=("a", "b")))


CELL = "7x31"


@dataclass
class Made:
    """Data that fail, or that have a check, as a test says."""

    found: Any = None
    terms = DataTerms(name="made", shape=(2,), classes=2)

    def train(self, folder: Path | None) -> Examples:
        raise ValueError(CELL)

    def public(self, folder: Path | None) -> tuple[Examples, Examples]:
        return self.found, self.found

    def part(self, folder: Path | None, part: str) -> Examples:
        return Examples(np.array([[1, 2], [np.nan, 0], [0, 0]]), np.array([0, 1, 5]))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("bract.simulations.examples.rings.data", Made)
    return RINGS


def test_an_error_of_the_users_code_tells_its_type_and_no_value(made: str) -> None:
    with pytest.raises(UsageError, match="its train fails with ValueError") as raised:
        data.dataset(made).load(data.describe(made), None)
    assert CELL not in str(raised.value)


def test_examples_of_another_shape_are_an_error(made: str) -> None:
    with pytest.raises(UsageError, match=r"inputs of \(examples, 2\), as its terms say"):
        data.load_public(data.describe(made), None)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            Examples(np.zeros((2, 2)), np.zeros((2, 1))),
            r"targets of another shape than \(examples\)",
        ),
        (Examples(np.zeros((2, 2)), np.array([{}, {}])), "or no numbers"),
        (Examples(np.full((2, 2), "x"), np.zeros(2)), r"inputs of \(examples, 2\)"),
        (Examples([[1, 2]], [0]), r"inputs of \(examples, 2\)"),
        (Examples(np.zeros((0, 2)), np.zeros(0)), "no public examples"),
    ],
)
def test_examples_that_training_cannot_take_are_an_error(
    made: str, monkeypatch: pytest.MonkeyPatch, found: Examples, words: str
) -> None:
    monkeypatch.setattr(Made, "public", lambda self, folder: (found, found))
    with pytest.raises(UsageError, match=words):
        data.load_public(data.describe(made), None)


def test_numbers_come_in_this_machines_order(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    big = Examples(np.ones((2, 2), ">f4"), np.array([0, 1], ">i8"))
    monkeypatch.setattr(Made, "public", lambda self, folder: (big, big))
    found, _ = data.load_public(data.describe(made), None)
    assert found.inputs.dtype.isnative
    assert found.targets.tolist() == [0, 1]


def test_what_gives_its_rows_as_arrays_is_not_read_beforehand(
    made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rows:
        shape, dtype, ndim = (2, 2), np.dtype("u1"), 2

    lazy = Examples(Rows(), np.zeros(2, int))  # type: ignore[arg-type]
    monkeypatch.setattr(Made, "public", lambda self, folder: (lazy, lazy))
    found, _ = data.load_public(data.describe(made), None)
    assert isinstance(found.inputs, Rows)


def test_without_a_check_of_its_own_rows_without_effect_are_named(
    made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = data.describe(made)
    assert data.check_part(terms, None, "x", 3) == [
        f"{made} x, example 2: value not finite",
        f"{made} x, example 3: unknown label",
    ]
    monkeypatch.setattr(Made, "check", lambda self, folder, part: [f"{part}: bad"], raising=False)
    assert data.check_part(terms, None, "x", 3) == ["x: bad"]
