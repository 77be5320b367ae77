"""`bract audit` as an auditor types it: verify, budget and export, with files from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bract.shared import keys
from bract.shared.commands import budget
from bract.shared.errors import Refusal
from bract.shared.policy import DomainPolicy
from bract.shared.privacy import (
    accounting,
    anchors,
    entries,
    forecast,
    receipts,
    verification,
    witness,
)
from bract.shared.privacy.events import PoissonGaussian
from bract.shared.privacy.receipts import Received
from bract.shared.reports import schema
from bract.shared.terms import EvaluationTerms, ModelTerms, TrainingTerms

Bract = Callable[..., Any]
STEP = PoissonGaussian(0.1, 1.5, 1)


@pytest.fixture
def site(world: Any) -> Any:
    """Two runs of a site: three rounds of one, and one, evaluated, of another."""
    world.server = keys.generate()
    world.first = world.contract(witness=world.server.public)
    world.second = world.contract(
        run="later",
        witness=world.server.public,
        evaluation=EvaluationTerms(every=1, noise_multiplier=4.0),
        rounds=2,
        max_attempts=2,
        privacy={"noise_multiplier": 2.0},
    )
    wide = world.policy(evaluation=True, domain={"epsilon": 30.0})
    gate = world.gate(policy=wide)
    replies = [
        world.serve(gate, world.order(world.sign(agreed), number))
        for agreed, number in ((world.first, 1), (world.first, 2), (world.second, 1))
    ]
    gate.ledger.close()
    world.taken = world.folder / "receipts.jsonl"
    world.taken.write_bytes(
        receipts.to_lines(
            Received(r.receipt, r.signature, r.ledger, number, True)
            for number, r in enumerate(replies, start=1)
        )
    )
    world.seen = world.folder / "witnesses.json"
    head = replies[-1].receipt.head
    world.seen.write_bytes(anchors.to_bytes([witness.sign("alpha", "ward", head, world.server)]))
    world.pinned = world.folder / "contract.json"
    world.pinned.write_bytes(world.sign(world.first).to_bytes())
    return world


def printed(done: Any, name: str) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    jsonschema.validate(value, schema(name))
    return value


def exported(bract: Bract, site: Any) -> Path:
    path = Path("x.jsonl")
    report = printed(
        bract("audit", "export", str(site.ledger_path), "-o", str(path), "--json"), "audit-export"
    )
    assert (report["chains"], report["entries"]) == (1, 8)
    assert (report["contracts"], report["policies"], report["witnesses"]) == (2, 1, 0)
    return path


def test_an_export_is_verified_with_files_from_elsewhere_alone(bract: Bract, site: Any) -> None:
    path = exported(bract, site)
    bare = bract("audit", "verify", str(path))
    assert (bare.returncode, "give --site-key or --contract" in bare.stderr) == (1, True)
    held = ("--contract", site.pinned, "--head", site.seen, "--received", site.taken)
    (chain,) = printed(
        bract("audit", "verify", str(path), *map(str, held), "--json"), "audit-verify"
    )["chains"]
    assert (chain["anchored"], chain["witnessed"], chain["received"]) == (True, 7, 3)
    said = bract("audit", "verify", str(path), *map(str, held)).stdout
    assert "8 entries, anchored up to entry 7, later ones cannot be excluded, witnessed" in said
    # Heads that stand beside witnesses in one file are held against the ledger too.
    both = json.loads(site.seen.read_bytes())
    both["heads"] = {"alpha": {"domain": "ward", "sequence": 9, "hash": "0" * 64}}
    Path("both.json").write_text(json.dumps(both))
    cut = bract("audit", "verify", str(path), *map(str, held[:2]), "--head", "both.json")
    assert (cut.returncode, "the anchor names entry 9" in cut.stderr) == (1, True)
    # What the server took and the ledger lacks is shown.
    lines = site.taken.read_bytes().splitlines()
    fault = json.loads(lines[0])
    fault["receipt"]["update"] = "0" * 64
    receipt = receipts.Receipt(**fault["receipt"])
    fault["signature"] = site.key.sign(receipt.digest()).hex()
    text = json.dumps(fault, sort_keys=True, separators=(",", ":"))
    site.taken.write_text(f"{text}\n")
    refused = bract("audit", "verify", str(path), *map(str, held))
    assert (refused.returncode, "round 1 stands behind no charge" in refused.stderr) == (1, True)


def test_a_contract_of_another_hand_does_not_pin(bract: Bract, site: Any) -> None:
    path = exported(bract, site)
    value = json.loads(site.pinned.read_bytes())
    value["contract"]["cohort"][0]["key"] = keys.generate().public
    site.pinned.write_text(json.dumps(value, sort_keys=True, separators=(",", ":")))
    refused = bract("audit", "verify", str(path), "--contract", str(site.pinned))
    assert (refused.returncode, "signature" in refused.stderr) == (1, True)


def test_an_export_does_not_replace_a_file_and_is_not_made_of_nothing(
    bract: Bract, site: Any, tmp_path: Path
) -> None:
    path = exported(bract, site)
    again = bract("audit", "export", str(site.ledger_path), "-o", str(path))
    assert (again.returncode, "nothing is overwritten" in again.stderr) == (2, True)
    Path("dangling").symlink_to("x")
    link = bract("audit", "export", str(path), "-o", "dangling")
    assert (link.returncode, "nothing is overwritten" in link.stderr) == (2, True)
    assert Path("dangling").is_symlink()
    missing = bract("audit", "export", "none.sqlite", "-o", "y.jsonl")
    assert (missing.returncode, "no ledger at" in missing.stderr) == (1, True)
    header = path.read_bytes().splitlines(keepends=True)[0]
    Path("empty.jsonl").write_bytes(header)
    empty = bract("audit", "export", "empty.jsonl", "-o", "y.jsonl")
    assert (empty.returncode, "the ledger is empty" in empty.stderr) == (1, True)
    nowhere = bract("audit", "export", str(path), "-o", "none/y.jsonl")
    assert (nowhere.returncode, "no folder none" in nowhere.stderr) == (2, True)
    assert sorted(p.name for p in Path().glob("*.jsonl")) == [
        "empty.jsonl",
        "receipts.jsonl",
        "x.jsonl",
    ]


# What was spent


def test_a_fine_grid_tells_what_each_run_cost_and_leaves_what_a_gate_would_give(
    bract: Bract, world: Any
) -> None:
    agreed = world.contract(
        privacy={"sampling_rate": 1e-3, "noise_multiplier": 2.0},
        training=TrainingTerms(local_steps=20_000, learning_rate=0.5),
    )
    fixed = {"epsilon": 2.0, "composition": {"rule": "filter", "order": 25}}
    gate = world.gate(policy=world.policy(domain=fixed))
    for number in range(1, 6):
        world.serve(gate, world.order(world.sign(agreed), number))
    gate.ledger.close()
    asked = ("audit", "budget", str(world.ledger_path), "--site-key", world.key.public, "--json")
    (quick,) = printed(bract(*asked), "audit-budget")["domains"]
    (fine,) = printed(bract(*asked, "--thorough"), "audit-budget")["domains"]
    assert fine["epsilon"] < quick["epsilon_filter"] < quick["epsilon"]
    for found in (quick, fine):
        assert [run["epsilon"] for run in found["runs"]] == [found["epsilon"]]
        assert found["left"] == pytest.approx(2.0 - quick["epsilon"])


def domain(bract: Bract, site: Any, *options: str) -> dict[str, Any]:
    path = Path("x.jsonl") if Path("x.jsonl").exists() else exported(bract, site)
    done = bract("audit", "budget", str(path), "--contract", str(site.pinned), *options, "--json")
    (found,) = printed(done, "audit-budget")["domains"]
    return dict(found)


def test_each_run_is_listed_with_what_it_cost_alone(bract: Bract, site: Any) -> None:
    found = domain(bract, site)
    first, second = found["runs"]
    assert (first["contract_sha256"], second["contract_sha256"]) == (
        site.first.sha256,
        site.second.sha256,
    )
    assert [(r["run"], r["rounds"], r["charges"], r["evaluations"]) for r in found["runs"]] == [
        ("trial", 2, 2, 0),
        ("later", 1, 1, 1),
    ]
    two = entries.events_of(site.first, rounds=2, evaluations=0)
    one = entries.events_of(site.second, rounds=1, evaluations=1)
    assert first["epsilon"] == accounting.epsilon(two, 1e-5)
    assert second["epsilon"] == accounting.epsilon(one, 1e-5)
    assert found["epsilon"] == accounting.epsilon([*two, *one], 1e-5)
    assert found["epsilon"] < first["epsilon"] + second["epsilon"]
    assert found["left"] == pytest.approx(30.0 - found["epsilon_filter"])
    text = bract("audit", "budget", "x.jsonl", "--contract", str(site.pinned)).stdout
    assert "later" in text
    assert site.second.sha256[:12] in text


def test_other_neighbours_and_groups_are_given_where_asked(bract: Bract, site: Any) -> None:
    plain = domain(bract, site)
    names = ("epsilon_replace_one", "group", "epsilon_group", "epsilon_group_replace_one")
    assert [plain[name] for name in names] == [None] * 4
    both = domain(bract, site, "--replace-one", "--group", "3")
    assert both["group"] == 3
    assert both["epsilon"] == plain["epsilon"]
    assert plain["epsilon"] < both["epsilon_replace_one"] < both["epsilon_group"]
    assert both["epsilon_group"] < both["epsilon_group_replace_one"]
    wrong = bract("audit", "budget", "x.jsonl", "--group", "1")
    assert wrong.returncode == 2
    text = bract(
        "audit",
        "budget",
        "x.jsonl",
        "--contract",
        str(site.pinned),
        "--replace-one",
        "--group",
        "3",
    ).stdout
    assert f"ε {both['epsilon_group']:.4f} of 3 examples together, at the most" in text


def test_rounds_of_another_contract_are_forecast(bract: Bract, site: Any) -> None:
    last = domain(bract, site)
    assert last["forecast_contract"] == site.second.sha256
    path = Path("next.json")
    dearer = site.contract(run="next", privacy={"noise_multiplier": 0.8, "sampling_rate": 0.5})
    path.write_bytes(site.sign(dearer).to_bytes())
    other = domain(bract, site, "--forecast", str(path))
    assert other["forecast_contract"] == dearer.sha256
    assert 0 < other["more_rounds"] < last["more_rounds"]
    fits = [
        accounting.fits(
            [
                *entries.events_of(site.first, rounds=2, evaluations=0),
                *entries.events_of(site.second, rounds=1, evaluations=1),
                *entries.events_of(dearer, rounds=rounds, evaluations=0),
            ],
            limit=30.0,
            delta=1e-5,
            order=other["filter_order"],
        )
        for rounds in (other["more_rounds"], other["more_rounds"] + 1)
    ]
    assert fits == [True, False]


# Each is forecast by a site that allows σ from 1.0, q up to 0.2 and no evaluation.
FORBIDDEN: dict[str, tuple[dict[str, Any], str]] = {
    "noise": ({"privacy": {"noise_multiplier": 0.6}}, "policy-noise"),
    "sampling": ({"privacy": {"sampling_rate": 0.5}}, "policy-sampling"),
    "model": ({"model": ModelTerms(name="resnet")}, "policy-model"),
    "evaluation": (
        {"evaluation": EvaluationTerms(every=1, noise_multiplier=4.0)},
        "policy-evaluation",
    ),
    "mechanism": (
        {"simulation": True, "privacy": {
            "mechanism": "user-level", "unit": "client", "randomness": "seeded"}},
        "policy-mechanism",
    ),
    "site": ({"site": {"name": "beta"}}, "not-in-contract"),
    "key": ({"site": {"key": "a" * 64}}, "lists another key"),
    "unknown domain": ({"site": {"domain": "elsewhere"}}, "policy-domain"),
    "other domain": ({"site": {"domain": "apart"}}, "uses the domain 'apart'"),
    "coordinator": ({"coordinator": keys.generate().public}, "contract-untrusted"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_no_rounds_are_left_of_a_contract_that_the_gate_refuses_whatever_is_left(
    world: Any, changes: dict[str, Any], reason: str
) -> None:
    limits = DomainPolicy(epsilon=8.0, delta=1e-5)
    terms = {"min_noise_multiplier": 1.0, "max_sampling_rate": 0.2}
    policy = world.policy(domains={"ward": limits, "apart": limits}, **terms)
    gate, agreed = world.gate(policy=policy), world.contract()
    world.serve(gate, world.order(world.sign(agreed)))
    gate.ledger.close()
    (found,) = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    (site,) = agreed.cohort
    changed = dict(changes)
    cohort = (site.model_copy(update=changed.pop("site", {})),)
    asked = world.contract(cohort=cohort, **changed)
    left = partial(forecast.rounds_left, "ward", found.policy, {"ward": found.chain})
    assert (left(agreed).number or 0) > 0
    assert (left(asked).number, left(asked).contract) == (0, asked.sha256)
    assert reason in (left(asked).bound or "")


def test_a_ledger_of_another_unit_has_no_rounds_left(world: Any) -> None:
    gate, agreed = world.gate(), world.contract()
    world.serve(gate, world.order(world.sign(agreed)))
    gate.ledger.close()
    (found,) = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    terms = {"mechanism": "user-level", "unit": "client", "randomness": "seeded"}
    asked = world.contract(simulation=True, privacy=terms)
    allowing = world.policy(mechanisms=("dp-sgd", "user-level"))
    left = forecast.rounds_left("ward", allowing, {"ward": found.chain}, asked)
    assert (left.number, "simulation-only" in (left.bound or "")) == (0, True)


def test_the_reason_for_which_no_rounds_are_left_is_in_the_note(bract: Bract, site: Any) -> None:
    path = Path("next.json")
    asked = site.contract(run="next", model=ModelTerms(name="resnet"))
    path.write_bytes(site.sign(asked).to_bytes())
    found = domain(bract, site, "--forecast", str(path))
    assert (found["more_rounds"], found["forecast_contract"]) == (0, asked.sha256)
    assert "no rounds are left of the contract: refused: policy-model" in found["note"]


def test_rounds_left_are_those_that_every_domain_holds_that_a_round_is_charged_to(
    bract: Bract, world: Any
) -> None:
    """The gate takes exactly so many more, though the domain's own ε would hold hundreds."""
    domains = {
        "ward": DomainPolicy(epsilon=30.0, delta=1e-5, overlaps=("clinic",)),
        "clinic": DomainPolicy(epsilon=1.5, delta=1e-5),
        "apart": DomainPolicy(epsilon=1.5, delta=1e-5),
    }
    gate = world.gate(policy=world.policy(domains=domains))
    once = {"rounds": 1, "max_attempts": 1, "privacy": {"noise_multiplier": 2.0}}

    def serve() -> None:
        world.serve(gate, world.order(world.sign(world.contract(**once))))

    def left() -> dict[str, Any]:
        key = ("--site-key", world.key.public)
        done = bract("audit", "budget", str(world.ledger_path), *key, "--json")
        return {found["domain"]: found for found in printed(done, "audit-budget")["domains"]}

    serve()
    before = left()
    rounds = before["ward"]["more_rounds"]
    assert 0 < rounds == before["clinic"]["more_rounds"] < 50
    assert before["ward"]["left"] > 15
    note = before["ward"]["note"]
    assert "what uses 'ward' is charged to 'clinic' too" in note
    assert "rounds left are those that fit the domain 'clinic'" in note
    assert "rounds left" not in before["clinic"]["note"]
    for _ in range(rounds):
        serve()
    assert [found["more_rounds"] for found in left().values()] == [0, 0]
    with pytest.raises(Refusal, match="budget-exhausted"):
        serve()
    gate.ledger.close()


def test_a_domain_that_no_charge_began_bounds_what_shares_with_it(world: Any) -> None:
    agreed = world.contract()
    gate = world.gate()
    world.serve(gate, world.order(world.sign(agreed)))
    gate.ledger.close()
    (found,) = verification.verify(
        world.ledger_path, site_keys={"alpha": world.key.public}, anchors={}
    )
    later = world.policy(
        domains={
            "ward": DomainPolicy(epsilon=8.0, delta=1e-5, overlaps=("clinic",)),
            "clinic": DomainPolicy(epsilon=0.01, delta=1e-5),
        }
    )
    chains = {"ward": found.chain}
    assert (forecast.rounds_left("ward", found.policy, chains, agreed).number or 0) > 0
    assert forecast.rounds_left("ward", later, chains, agreed).number == 0


def test_the_second_accountant_is_left_out_where_it_is_slow_unless_asked_for(
    bract: Bract, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "PRV_KINDS", 2)  # here are three
    quick = domain(bract, site)
    assert quick["epsilon_prv"] is None
    assert "takes --thorough" in quick["note"]
    thorough = domain(bract, site, "--thorough")
    assert abs(thorough["epsilon_prv"] - thorough["epsilon"]) <= 0.02
    assert thorough["epsilon"] <= quick["epsilon"]
    assert "--thorough" not in thorough["note"]


def test_a_budget_says_up_to_where_its_ledger_is_known(bract: Bract, site: Any) -> None:
    path = exported(bract, site)
    held = ("audit", "budget", str(path), "--contract", str(site.pinned))
    assert "alpha, ward: whole up to entry 7, later ones cannot be excluded" in bract(*held).stdout
    seen = (*held, "--head", str(site.seen))
    assert "alpha, ward: anchored up to entry 7, later ones" in bract(*seen).stdout
    (domain,) = printed(bract(*seen, "--json"), "audit-budget")["domains"]
    assert (domain["entries"], domain["anchor"], domain["unit"]) == (8, 7, "example")


def test_two_histories_of_one_domain_are_not_verified_together(bract: Bract, site: Any) -> None:
    first = exported(bract, site)
    site.ledger_path.unlink()
    gate = site.gate(policy=site.policy(evaluation=True, domain={"epsilon": 30.0}))
    site.serve(gate, site.order(site.sign(site.first), 1))
    gate.ledger.close()
    both = (str(first), str(site.ledger_path), "--contract", str(site.pinned))
    for command in ("verify", "budget"):
        done = bract("audit", command, *both)
        assert done.returncode == 1
        assert "two histories of 'alpha', domain 'ward', which part at entry 0" in done.stderr
