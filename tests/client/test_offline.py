"""What an operator asks beforehand: the gate's own answer, the cost, the data; nothing is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli_w

from bract.client import installed, offline, settings
from bract.client.gate import Gate
from bract.client.installed import SiteState
from bract.client.permits import Permit
from bract.shared import canonical, keys, locks
from bract.shared import contract as contracts
from bract.shared.contract import Contract, SignedContract
from bract.shared.data.heart_disease import split_files
from bract.shared.errors import Refusal, UsageError, VerificationFailed
from bract.shared.preparation import Numeric, Table, Target
from bract.shared.privacy import accounting
from bract.shared.privacy.events import PoissonGaussian
from bract.shared.reports import schema
from bract.shared.reports.services import ContractCheck
from bract.shared.terms import TrainingTerms
from bract.simulations.federations.loopback import Layout, SitePlan, lay_out

Bract = Callable[..., Any]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file under a folder, byte by byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def process(layout: Layout) -> Gate:
    """Returns the gate of the site, as a process that starts opens it."""
    chosen = settings.read(layout.site("alpha"))
    return installed._gate(chosen, installed.head_file_of(chosen))


def serve(world: Any, layout: Layout, *rounds: int, signed: SignedContract | None = None) -> None:
    gate = process(layout)
    for number in rounds:
        world.serve(gate, world.order(signed or contracts.read(layout.contract), number))
    gate.ledger.close()


def proposed(layout: Layout, **changes: Any) -> Path:
    """Returns another contract of the coordinator, in a file of its own."""
    key = keys.load(layout.federation.parent / "coordinator.pem")
    agreed = contracts.read(layout.contract).contract
    fresh: dict[str, Any] = {"nonce": contracts.new_nonce()}
    # Through the model again, so that nothing is proposed that no file could hold.
    made = Contract.model_validate({**agreed.model_dump(), **fresh, **changes})
    path = layout.root / f"{made.nonce}.json"
    path.write_bytes(contracts.sign(made, key).to_bytes())
    return path


def checked(layout: Layout, contract: Path | None = None) -> ContractCheck:
    """Returns a check that left every file as it was."""
    before = contents(layout.root)
    report = offline.check(layout.site("alpha"), contract or layout.contract)
    assert contents(layout.root) == before
    return report


def gate_accepts(world: Any, layout: Layout, contract: Path) -> bool:
    """Returns what the gate itself does with the contract's first round."""
    gate = process(layout)
    try:
        return isinstance(gate.admit(world.order(contracts.read(contract))), Permit)
    except Refusal:
        return False
    finally:
        gate.ledger.close()


def test_an_acceptable_contract_is_said_to_be_and_what_it_costs(world: Any, layout: Layout) -> None:
    report = checked(layout)
    assert (report.accepted, report.reason, report.problems) == (True, None, [])
    assert report.epsilon_before == 0.0
    assert report.epsilon_after == pytest.approx(2.0, abs=0.01)
    assert gate_accepts(world, layout, layout.contract)


def test_what_is_spent_counts_before_and_the_rest_of_the_contract_after(
    world: Any, layout: Layout
) -> None:
    whole = checked(layout).epsilon_after
    serve(world, layout, 1, 2)
    report = checked(layout)
    agreed = contracts.read(layout.contract).contract
    chain = offline._chains(settings.read(layout.site("alpha")))["alpha"]
    assert chain.attempts[agreed.sha256] == 2
    assert report.epsilon_before == accounting.epsilon(chain.events, 1e-5) > 0
    assert report.epsilon_after == whole  # its first two rounds are not counted twice
    later = checked(layout, proposed(layout))
    assert later.epsilon_before == report.epsilon_before
    assert (later.epsilon_after or 0) > (whole or 0)


def by_another(layout: Layout) -> Path:
    key = keys.generate()
    agreed = contracts.read(layout.contract).contract
    path = layout.root / "other.json"
    signed = contracts.sign(agreed.model_copy(update={"coordinator": key.public}), key)
    path.write_bytes(signed.to_bytes())
    return path


def altered(layout: Layout) -> Path:
    value = json.loads(layout.contract.read_bytes())
    value["contract"]["rounds"] = 2
    path = layout.root / "altered.json"
    path.write_bytes(canonical.encode(value))
    return path


def to_another_key(layout: Layout) -> Path:
    (site,) = contracts.read(layout.contract).contract.cohort
    return proposed(layout, cohort=[{**site.model_dump(), "key": "a" * 64}])


def changed_site(**changes: Any) -> Callable[[Layout], Path]:
    def change(layout: Layout) -> Path:
        (site,) = contracts.read(layout.contract).contract.cohort
        return proposed(layout, cohort=[{**site.model_dump(), **changes}])

    return change


def changed(**changes: Any) -> Callable[[Layout], Path]:
    return lambda layout: proposed(layout, **changes)


def changed_terms(table: str, **changes: Any) -> Callable[[Layout], Path]:
    def change(layout: Layout) -> Path:
        terms = getattr(contracts.read(layout.contract).contract, table).model_dump()
        return proposed(layout, **{table: {**terms, **changes}})

    return change


PERSONS = Table(
    columns=(Numeric(name="age", low=20, high=80),),
    target=Target(name="ill", classes=("no", "yes")),
    group="patient",
)

REFUSED: dict[str, tuple[Callable[[Layout], Path], str]] = {
    "another coordinator": (by_another, "coordinator's key is not in the policy"),
    "altered": (altered, "signature does not verify"),
    "another ledger key": (to_another_key, "another ledger key"),
    "another site": (changed_site(name="beta"), "not-in-contract"),
    "another domain": (changed_site(domain="beta"), "policy-domain"),
    "another model": (changed_terms("model", name="cnn"), "policy-model"),
    "another data set": (changed_terms("data", name="fashion-mnist"), "policy-domain"),
    "another shape": (changed_terms("data", shape=(8, 8)), "policy-domain"),
    "a column of persons": (
        changed_terms("data", preparation=PERSONS),
        "policy-domain: the contract keeps only the first rows of equal cells in the column "
        "'patient': person_column = \"patient\" in domains.alpha allows it",
    ),
    "less noise": (changed_terms("privacy", noise_multiplier=0.2), "policy-noise"),
    "seeded": (
        lambda layout: proposed(
            layout,
            simulation=True,
            privacy={
                **contracts.read(layout.contract).contract.privacy.model_dump(),
                "randomness": "seeded",
            },
        ),
        "simulation-only",
    ),
    "too many rounds": (changed(rounds=5000, max_attempts=5000), "budget-exhausted"),
    "too many attempts": (changed(max_attempts=5000), "budget-exhausted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_gate_would_refuse_is_said_with_its_reason_and_reads_no_data(
    world: Any, layout: Layout, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    made, reason = REFUSED[case]
    path = made(layout)
    monkeypatch.setattr(offline.Roots, "problems", None)  # reading would fail
    report = checked(layout, path)
    assert not report.accepted
    assert reason in (report.reason or "")
    assert report.problems == []
    assert not gate_accepts(world, layout, path)


def test_of_which_rows_the_cost_is_told_where_a_contract_keeps_some_of_a_person(
    tmp_path: Path, bract: Bract
) -> None:
    table = tmp_path / "schema.toml"
    table.write_text(tomli_w.dumps(PERSONS.model_dump(mode="json", exclude_none=True)))
    (tmp_path / "rows").mkdir()
    rows = [f"{n},{20 + n % 60},{'yes' if n % 2 else 'no'}" for n in range(100)]
    for part in ("train", "validation", "test"):
        (tmp_path / f"rows/{part}.csv").write_text("\n".join(["patient,age,ill", *rows]))
    layout = lay_out(
        tmp_path / "federation",
        sites=[SitePlan("alpha", 100, "table", "1/1", data_folder=str(tmp_path / "rows"))],
        port=1,
        public_data=str(tmp_path / "rows"),
        terms={
            "run": "trial",
            "rounds": 3,
            "model": {"name": "linear"},
            "data": {"name": "table", "schema_file": str(table)},
            "training": {"local_steps": 1, "learning_rate": 0.5},
            "privacy": {"epsilon": 2.0, "delta": 1e-5, "clip_norm": 1.0, "batch": 10.0},
        },
    )
    assert 'person_column = "patient" in domains.alpha' in (checked(layout).reason or "")
    replaced(layout, "epsilon = 8.0", 'epsilon = 8.0\nperson_column = "patient"')
    report = checked(layout)
    assert (report.accepted, report.problems, report.rows_kept) == (True, [], 1)
    assert (report.epsilon_replaced_after or 0.0) > (report.epsilon_after or 0.0)
    text = bract("client", str(layout.site("alpha")), "--check", str(layout.contract)).stdout
    said = "no more than 1 row; of a person with more, another row takes its place, and by"
    assert f"{said} replace-one ε is {report.epsilon_replaced_after:.3f}\n" in text


def test_a_contract_whose_attempts_are_used_up_is_refused(world: Any, layout: Layout) -> None:
    gate, signed = process(layout), contracts.read(layout.contract)
    for _ in range(signed.contract.max_attempts):
        gate.admit(world.order(signed, 1))
    gate.ledger.close()
    report = checked(layout)
    assert "attempts-exhausted" in (report.reason or "")
    assert report.epsilon_after == report.epsilon_before


def add(layout: Layout, text: str) -> None:
    path = layout.site("alpha")
    path.write_text(f"{path.read_text()}\n{text}\n")


def replaced(layout: Layout, old: str, new: str) -> None:
    path = layout.site("alpha")
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def test_a_shared_domain_without_room_is_said_as_the_gate_would_say_it(
    world: Any, layout: Layout
) -> None:
    add(layout, '[domains.small]\nepsilon = 0.5\ndelta = 1e-5\noverlaps = ["alpha"]\n'
                'data = {name = "digits", part = "1/10"}')  # fmt: skip
    report = checked(layout)
    assert "budget-exhausted" in (report.reason or "")
    assert "'small'" in (report.reason or "")
    assert not gate_accepts(world, layout, layout.contract)


def test_the_status_of_a_domain_names_those_that_must_hold_each_use_too(
    layout: Layout, bract: Bract
) -> None:
    add(layout, '[domains.small]\nepsilon = 0.5\ndelta = 1e-5\noverlaps = ["alpha"]\n'
                'data = {name = "digits", part = "1/10"}')  # fmt: skip
    found = offline.status(layout.site("alpha")).domains
    assert (found["alpha"].shared, found["small"].shared) == (("small",), ("alpha",))
    text = bract("client", str(layout.site("alpha")), "--status").stdout
    assert "left 8.000, 0 charges; each use is charged to 'small' too" in text
    assert "left 0.500, 0 charges; each use is charged to 'alpha' too" in text


def test_what_a_domain_that_is_declared_late_will_count_is_said_beforehand(
    world: Any, layout: Layout
) -> None:
    serve(world, layout, 1, 2)
    before = offline.status(layout.site("alpha")).domains["alpha"]
    add(layout, '[domains.late]\nepsilon = 8.0\ndelta = 1e-5\noverlaps = ["alpha"]\n'
                'data = {name = "digits", part = "1/10"}')  # fmt: skip
    found = offline.status(layout.site("alpha")).domains
    assert found["late"].epsilon == found["alpha"].epsilon == before.epsilon
    replaced(layout, "[domains.late]\nepsilon = 8.0", f"[domains.late]\nepsilon = {before.epsilon}")
    report = checked(layout, proposed(layout))
    assert "'late'" in (report.reason or "")
    assert not gate_accepts(world, layout, layout.contract)


def test_domains_that_the_file_parts_again_are_said_beforehand(world: Any, layout: Layout) -> None:
    add(layout, '[domains.small]\nepsilon = 8.0\ndelta = 1e-5\noverlaps = ["alpha"]\n'
                'data = {name = "digits", part = "2/10"}')  # fmt: skip
    serve(world, layout, 1)
    replaced(layout, 'overlaps = ["alpha"]\n', "")
    fault = "'alpha' shared its examples with 'small'"
    assert fault in (checked(layout).reason or "")
    assert not gate_accepts(world, layout, proposed(layout))
    with pytest.raises(VerificationFailed, match=fault):
        offline.status(layout.site("alpha"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("delta = 1e-05", "delta = 1e-06"),
        ("epsilon = 8.0", 'epsilon = 8.0\ncomposition = {rule = "filter", order = 3}'),
    ],
    ids=["delta", "order"],
)
def test_what_genesis_fixed_and_the_file_changed_is_said_beforehand(
    world: Any, layout: Layout, old: str, new: str
) -> None:
    serve(world, layout, 1)
    replaced(layout, old, new)
    report = checked(layout)
    assert "the ledger fixed" in (report.reason or "")
    assert not gate_accepts(world, layout, layout.contract)
    with pytest.raises(VerificationFailed, match="the ledger fixed"):
        offline.status(layout.site("alpha"))


def test_data_that_another_domain_counted_are_said_beforehand(world: Any, layout: Layout) -> None:
    serve(world, layout, 1)
    replaced(layout, "[domains.alpha]", "[domains.fresh]")
    replaced(layout, "[domains.alpha.data]", "[domains.fresh.data]")
    before = contents(layout.root)
    with pytest.raises(UsageError, match="count the same data"):
        offline.check(layout.site("alpha"), layout.contract)
    with pytest.raises(UsageError, match="count the same data"):
        offline.status(layout.site("alpha"))
    assert contents(layout.root) == before


@pytest.mark.parametrize("lost", ["tail", "entries", "file"])
def test_a_ledger_that_was_put_back_is_never_said_to_be_unspent(
    world: Any, layout: Layout, bract: Bract, lost: str
) -> None:
    path = layout.ledger("alpha")
    empty = {"tail": (1,), "entries": (), "file": ()}[lost]
    serve(world, layout, *empty)
    older = path.read_bytes()
    serve(world, layout, 2)
    if lost == "file":
        path.unlink()
    else:
        path.write_bytes(older)
    report = checked(layout)
    assert not report.accepted
    assert report.epsilon_before is None
    before = contents(layout.root)
    with pytest.raises(VerificationFailed):
        offline.status(layout.site("alpha"))
    done = bract("client", str(layout.site("alpha")), "--status")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert contents(layout.root) == before


def test_a_site_that_was_started_and_has_not_trained_has_spent_nothing(
    world: Any, layout: Layout
) -> None:
    process(layout).ledger.close()  # a ledger without entries
    assert layout.ledger("alpha").exists()
    report = offline.status(layout.site("alpha"))
    assert report.domains["alpha"].epsilon == 0.0
    assert report.domains["alpha"].charges == 0
    assert checked(layout).accepted


# The true data


def test_problems_name_file_row_and_column_and_never_a_value(
    hospitals: Path, tmp_path: Path, bract: Bract, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_files(hospitals, tmp_path / "sites", tmp_path / "public")
    train = tmp_path / "sites/va/train.va.data"
    rows = train.read_text().splitlines()
    cells = rows[4].split(",")
    cells[0], cells[1] = "zzsecretzz", "77123"
    rows[4] = ",".join(cells)
    rows[6] = rows[6].replace(rows[6].split(",")[1], "88321", 1)
    train.write_text("\n".join(rows) + "\n")
    found = lay_out(
        tmp_path / "federation",
        sites=[SitePlan("va", len(rows) + 1, "heart-disease", "va", str(train.parent),
                        delta=1e-4)],
        port=1,
        public_data=str(tmp_path / "public"),
        terms={
            "run": "hearts",
            "rounds": 2,
            "model": {"name": "linear"},
            "data": {"name": "heart-disease"},
            "training": {"local_steps": 1, "learning_rate": 0.5},
            "privacy": {"epsilon": 2.0, "delta": 1e-4, "clip_norm": 1.0, "batch": 10.0},
        },
    )  # fmt: skip
    report = offline.check(found.site("va"), found.contract)
    assert report.accepted
    assert any("train.va.data, row 5, column age: not a number" in p for p in report.problems)
    assert any("fewer rows than the nominal size" in p for p in report.problems)
    told = json.dumps(report.model_dump())
    for value in ("secret", "77123", "88321"):
        assert value not in told
    done = bract("client", str(found.site("va")), "--check", str(found.contract), "--json")
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert json.loads(done.stdout) == report.model_dump(mode="json")
    assert f"{len(report.problems)} problems in the data; nothing was charged" in done.stderr
    assert not found.ledger("va").exists()


# The commands


def test_the_check_is_one_strict_json_object_whatever_it_finds(
    layout: Layout, bract: Bract
) -> None:
    site = str(layout.site("alpha"))
    many = proposed(layout, rounds=5000, max_attempts=5000)
    for path, code in ((layout.contract, 0), (many, 1)):
        before = contents(layout.root)
        done = bract("client", site, "--check", str(path), "--json")
        assert done.returncode == code
        assert done.stdout.count("\n") == 1
        value = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(word))
        jsonschema.validate(value, schema("client-check"))
        assert value["accepted"] == (code == 0)
        assert contents(layout.root) == before
        text = bract("client", site, "--check", str(path))
        assert text.returncode == code
        assert ("the gate would accept it; the data fit" in text.stdout) == (code == 0)
        assert ("bract: the gate would refuse: refused: budget" in text.stderr) == (code == 1)


def test_a_fault_of_many_rows_is_told_by_the_first(layout: Layout) -> None:
    many = [f"train.csv, row {n}, column age: not a number" for n in range(2, 400)]
    others = ["train.csv: fewer rows than the nominal size", "train.csv, row 7: not UTF-8"]
    report = checked(layout).model_copy(update={"problems": [*many, *others]})
    told = [line for line in offline.lines(report) if line.startswith("data: ")]
    assert told == [
        *(f"data: {problem}" for problem in (*many[:3], *others)),
        "data: train.csv, in more rows, which --json lists: column age: not a number",
    ]


def test_the_status_of_a_site_that_was_never_started_is_that(layout: Layout, bract: Bract) -> None:
    before = contents(layout.root)
    done = bract("client", str(layout.site("alpha")), "--status", "--json")
    assert done.returncode == 0
    value = json.loads(done.stdout)
    jsonschema.validate(value, schema("client-status"))
    assert (value["running"], value["doing"], value["since"]) == (False, "not running", None)
    assert value["domains"]["alpha"] == {
        "epsilon": 0.0, "epsilon_filter": 0.0, "limit": 8.0, "left": 8.0, "delta": 1e-5,
        "charges": 0, "epsilon_menu": None, "menu": None, "shared": [],
    }  # fmt: skip
    assert contents(layout.root) == before
    text = bract("client", str(layout.site("alpha")), "--status")
    assert (
        "alpha: ε 0.000 (0.000 by the filter) of 8 at δ 1e-05, left 8.000, 0 charges" in text.stdout
    )


def test_what_is_left_of_a_menu_are_steps_and_then_nothing(
    world: Any, layout: Layout, bract: Bract
) -> None:
    signed = contracts.read(proposed(layout, max_attempts=3))
    privacy = signed.contract.privacy
    steps = (
        f"{{ sampling_rate = {privacy.sampling_rate!r}, "
        f"noise_multiplier = {privacy.noise_multiplier!r}, max_steps = 3 }}"
    )
    path = layout.site("alpha")
    text = path.read_text()
    assert text.count("epsilon = 8.0\n") == 1
    menu = f'epsilon = 8.0\ncomposition = {{ rule = "menu", classes = [{steps}] }}\n'
    path.write_text(text.replace("epsilon = 8.0\n", menu))
    whole = [PoissonGaussian(privacy.sampling_rate, privacy.noise_multiplier, 3)]
    for numbers, left, steps_left in (((), None, 3), ((1, 2), None, 1), ((3,), 0.0, 0)):
        serve(world, layout, *numbers, signed=signed)
        status = offline.status(path).domains["alpha"]
        assert (status.left, status.epsilon_filter) == (left, None)
        assert status.epsilon_menu == accounting.epsilon(whole, 1e-5) < status.limit
        assert [entry.left for entry in status.menu or ()] == [steps_left]
        said = bract("client", str(path), "--status").stdout
        assert ("left 0.000" if left == 0 else f"left {steps_left} of 3 steps at q") in said
    assert not gate_accepts(world, layout, proposed(layout))
    path.write_text(path.read_text().replace("epsilon = 8.0\n", "epsilon = 0.1\n"))
    assert offline.status(path).domains["alpha"].left == 0.0


def test_the_status_of_a_running_site_is_what_it_last_said(world: Any, layout: Layout) -> None:
    serve(world, layout, 1)
    state = SiteState(layout.site("alpha").parent / "state")
    said = {"site": "alpha", "pid": 1, "doing": "training", "round": "2", "since": "now"}
    state.status.write_bytes(canonical.encode(said))
    assert offline.status(layout.site("alpha")).doing == "not running"
    with locks.held(state.lock, "one process serves a site"):
        report = offline.status(layout.site("alpha"))
    assert (report.running, report.doing, report.round) == (True, "training", "2")
    assert report.domains["alpha"].charges == 1
    assert not offline.status(layout.site("alpha")).running


def test_a_check_of_what_another_process_charges_holds_to_what_is_committed(
    world: Any, layout: Layout
) -> None:
    serve(world, layout, 1)
    gate = process(layout)
    gate.admit(world.order(contracts.read(layout.contract), 2))
    status = offline.status(layout.site("alpha")).domains["alpha"]
    assert status.charges == 2
    # What is left is what the gate would charge: its filter counts more than PLD.
    assert status.epsilon_filter is not None
    assert status.epsilon is not None
    assert status.epsilon < status.epsilon_filter
    assert status.left == status.limit - status.epsilon_filter
    report = checked(layout)
    assert report.epsilon_filter_before == status.epsilon_filter
    assert (report.epsilon_filter_after or 0) > (report.epsilon_after or 0)
    gate.ledger.close()


def test_the_training_terms_cost_nothing(layout: Layout) -> None:
    terms = TrainingTerms(local_steps=1, learning_rate=5.0, server_momentum=0.5)
    other = proposed(layout, training=terms.model_dump())
    assert replace_hash(checked(layout, other)) == replace_hash(checked(layout))


def replace_hash(report: ContractCheck) -> ContractCheck:
    return report.model_copy(update={"contract_sha256": ""})
