"""`bract contract`: a signed proposal, its price, and never another's file."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bract.shared import canonical, keys
from bract.shared import contract as contracts
from bract.shared.preparation import Categorical, Images, Numeric, Table, Target, Text
from bract.shared.privacy import accounting, entries, events
from bract.shared.reports import schema
from bract.shared.terms import DataTerms, EvaluationTerms
from bract.simulations.federations.loopback import Layout

Bract = Callable[..., Any]
FileLimit = Callable[[int], AbstractContextManager[None]]


FAINT = EvaluationTerms(every=1, noise_multiplier=1e-6)


def strict(text: str) -> Any:
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=lambda word: pytest.fail(word))


def make(layout: Layout, bract: Bract, output: str, *more: str) -> Any:
    return bract("contract", "make", str(layout.federation), "-o", output, *more)


def test_what_is_made_is_signed_and_shown_alike(layout: Layout, bract: Bract) -> None:
    done = make(layout, bract, "new.json", "--json")
    assert done.returncode == 0, done.stderr
    value = strict(done.stdout)
    jsonschema.validate(value, schema("contract"))
    signed = contracts.read(Path("new.json"))
    key = keys.load(layout.federation.parent / "coordinator.pem").public
    agreed = signed.verify(key)
    assert value["contract_sha256"] == agreed.sha256
    assert value["contract"] == agreed.model_dump(mode="json")
    shown = strict(bract("contract", "show", "new.json", "--json").stdout)
    assert shown == value


def test_the_price_is_every_attempt_and_the_rounds_alone(layout: Layout, bract: Bract) -> None:
    agreed = contracts.read(layout.contract).contract
    event = events.decode(entries.event_for(agreed))
    for delta in (1e-5, 1e-6):
        done = bract("contract", "show", str(layout.contract), "--delta", str(delta), "--json")
        value = strict(done.stdout)
        assert value["epsilon"] == accounting.epsilon([event] * agreed.max_attempts, delta)
        assert value["epsilon_rounds"] == accounting.epsilon([event] * agreed.rounds, delta)
        assert value["delta"] == delta
    text = bract("contract", "show", str(layout.contract)).stdout
    assert agreed.sha256 in text
    assert agreed.coordinator in text
    assert "domain alpha, nominal size 100" in text
    assert f"ε {accounting.epsilon([event] * agreed.max_attempts, 1e-5):.3f} at δ 1e-05" in text


def test_a_simulation_without_noise_has_no_price(world: Any, tmp_path: Path, bract: Bract) -> None:
    agreed = world.contract(simulation=True, privacy={"mechanism": "none"})
    (tmp_path / "plain.json").write_bytes(world.sign(agreed).to_bytes())
    value = strict(bract("contract", "show", "plain.json", "--json").stdout)
    jsonschema.validate(value, schema("contract"))
    assert (value["epsilon"], value["epsilon_rounds"]) == (None, None)
    assert "has no privacy" in bract("contract", "show", "plain.json").stdout


@pytest.mark.parametrize("part", ["privacy", "evaluation"])
def test_of_absurdly_little_noise_no_epsilon_is_computed_and_why_is_told(
    world: Any, tmp_path: Path, bract: Bract, part: str
) -> None:
    terms = {"noise_multiplier": 1e-6} if part == "privacy" else FAINT
    agreed = world.contract(**{part: terms})
    (tmp_path / "faint.json").write_bytes(world.sign(agreed).to_bytes())
    done = bract("contract", "show", "faint.json", "--json")
    value = strict(done.stdout)
    jsonschema.validate(value, schema("contract"))
    assert (value["epsilon"], value["epsilon_rounds"]) == (None, None)
    text = bract("contract", "show", "faint.json").stdout
    assert "ε not computed: at σ 1e-06, under 0.1, it is in the thousands" in text


def test_who_is_asked_and_whose_price_it_is_are_told(
    world: Any, tmp_path: Path, bract: Bract
) -> None:
    whole = world.contract()
    of_clients = {"mechanism": "user-level", "unit": "client", "randomness": "seeded"}
    some = world.contract(simulation=True, sites_per_round=1, privacy=of_clients)
    for agreed, asked, unit in (
        (whole, "all sites, in each round", "per example"),
        (some, "1 of 1 sites, in each round", "per client"),
    ):
        (tmp_path / "x.json").write_bytes(world.sign(agreed).to_bytes())
        text = bract("contract", "show", "x.json").stdout
        assert asked in text
        assert f"add-or-remove-one, {unit}) to each site" in text


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to nowhere"])
def test_nothing_is_ever_overwritten(
    layout: Layout, bract: Bract, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "there"
    if kind == "file":
        output.write_text("mine")
    elif kind == "folder":
        output.mkdir()
    else:
        (tmp_path / "target").write_text("mine") if kind == "link" else None
        output.symlink_to(tmp_path / "target")
    before = sorted(tmp_path.iterdir())
    done = make(layout, bract, str(output))
    assert done.returncode == 2
    assert "nothing is overwritten" in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    for file in (output, tmp_path / "target"):
        assert not file.is_file() or file.read_text() == "mine"


def test_a_full_disk_leaves_no_part_of_a_contract_and_it_can_be_made_once_there_is_room(
    layout: Layout, bract: Bract, file_limit: FileLimit
) -> None:
    with file_limit(512):
        done = make(layout, bract, "new.json")
    assert (done.returncode, done.stderr) == (2, "bract: cannot write new.json: File too large\n")
    assert not Path("new.json").exists()
    assert make(layout, bract, "new.json").returncode == 0


def altered(layout: Layout, change: Callable[[dict[str, Any]], Any]) -> bytes:
    value = json.loads(layout.contract.read_bytes())
    change(value)
    return canonical.encode(value)


BAD: dict[str, tuple[Callable[[Layout], bytes], int, str]] = {
    "altered": (lambda f: altered(f, lambda v: v["contract"].update(rounds=2)), 1, "signature"),
    "another key": (
        lambda f: altered(f, lambda v: v["contract"].update(coordinator="a" * 64)),
        1,
        "signature does not verify",
    ),
    "absurdly much noise": (
        lambda f: altered(f, lambda v: v["contract"]["privacy"].update(noise_multiplier=1e300)),
        2,
        "privacy.noise_multiplier: Input should be less than or equal to 100000 (got 1e+300)",
    ),
    "no signature": (lambda f: altered(f, lambda v: v.pop("signature")), 2, "signature: "),
    "a further key": (lambda f: altered(f, lambda v: v.update(signatur="x")), 2, "did you mean"),
    "another spelling": (
        lambda f: json.dumps(json.loads(f.contract.read_bytes())).encode(),
        1,
        "bad.json is not canonical JSON",
    ),
    "no JSON": (lambda f: b"\xff\x00", 1, "bad.json is not canonical JSON"),
    "nothing": (lambda f: b"", 1, "bad.json is not canonical JSON"),
    "a list": (lambda f: b"[]", 2, "bad.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_signed_contract_is_one_line(
    layout: Layout, bract: Bract, tmp_path: Path, case: str
) -> None:
    made, code, said = BAD[case]
    (tmp_path / "bad.json").write_bytes(made(layout))
    done = bract("contract", "show", "bad.json", "--json")
    assert done.returncode == code
    assert said in strict(done.stdout)["error"]["message"]
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("delta", ["0", "1", "-1", "2", "nan", "inf"])
def test_a_delta_out_of_range_is_bad_usage(layout: Layout, bract: Bract, delta: str) -> None:
    done = bract("contract", "show", str(layout.contract), "--delta", delta, "--json")
    assert done.returncode == 2
    assert "must be 1e-09 or more, and below 1" in strict(done.stdout)["error"]["message"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("make", "nowhere.toml", "-o", "new.json"), "cannot read nowhere.toml"),
        (("make", "nowhere.toml"), "Missing option '-o'"),
        (("show", "nowhere.json"), "cannot read the contract nowhere.json"),
        (("show", "."), "cannot read the contract ."),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line(bract: Bract, words: tuple[str, ...], said: str) -> None:
    done = bract("contract", *words, "--json")
    assert done.returncode == 2
    assert said in strict(done.stdout)["error"]["message"]
    assert done.stderr.count("\n") == 1
    assert not Path("new.json").exists()


def test_an_output_in_a_folder_that_is_not_there_is_bad_usage(layout: Layout, bract: Bract) -> None:
    done = make(layout, bract, "nowhere/new.json")
    assert done.returncode == 2
    assert "no folder nowhere to write new.json into: make it first" in done.stderr


@pytest.mark.parametrize(
    ("preparation", "said"),
    [
        (
            Table(
                columns=(
                    Numeric(name="age", low=20, high=80),
                    Categorical(name="ward", categories=("a", "b")),
                ),
                target=Target(name="ill", classes=("no", "yes")),
                group="patient",
                rows_per_group=3,
            ),
            [
                "prepared     age: a number from 20 to 80",
                "prepared     ward: one of a, b",
                "prepared     ill: learned, one of no, yes",
                "prepared     patient: tells persons apart",
                "a person     3 rows at the most: ε ",
                "a row        ε per row holds where its person has no more than 3 rows; of a "
                "person with more, another row takes its place, and by replace-one ε is ",
            ],
        ),
        (
            Text(length=32, labels=tuple(f"label{n}" for n in range(9))),
            ["prepared     32 tokens, bytes; one of label0, label1, label2, label3, label4, label5"
             " and 3 more"],
        ),
        (
            Images(labels=("cat", "dog"), height=24),
            ["prepared     24 × 32 pixels, colour; one of cat, dog"],
        ),
    ],
    ids=["table", "text", "images"],
)  # fmt: skip
def test_how_files_become_inputs_is_shown(
    world: Any, tmp_path: Path, bract: Bract, preparation: Any, said: list[str]
) -> None:
    data = DataTerms(name="own", shape=(4,), classes=2, preparation=preparation)
    path = tmp_path / "contract.json"
    path.write_bytes(world.sign(world.contract(data=data)).to_bytes())
    shown = bract("contract", "show", str(path)).stdout
    for line in said:
        assert line in shown
    value = strict(bract("contract", "show", str(path), "--json").stdout)
    rows = data.rows_per_person
    assert value["rows_per_person"] == rows
    assert (value["epsilon_person"] is None) == (rows is None)
    assert (value["epsilon_replaced"] is None) == (rows is None)
    if rows is not None:
        assert value["epsilon_person"] > value["epsilon_replaced"] > value["epsilon"]
        assert f"by replace-one ε is {value['epsilon_replaced']:.3f}" in shown
