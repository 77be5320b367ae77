"""What a report claims of sites that each have terms of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bract.shared.contract import Contract
from bract.shared.policy import DomainPolicy, Filter, Menu, MenuClass
from bract.shared.preparation import Numeric, Table, Target
from bract.shared.privacy import accounting, entries
from bract.shared.privacy.events import Event, PoissonGaussian
from bract.shared.report import checks, evidence, folder, wording
from bract.shared.report.checks import Check
from bract.shared.report.evidence import Evidence
from bract.shared.reports.runs import GUARANTEE_PRIVATE, MetricsLine, ServerSummary, facts_of
from bract.shared.terms import DataTerms, SiteTerms, TrainingTerms, counted
from bract.simulations import summary

Bract = Callable[..., Any]
ROUNDS = 3
OWN = {"north": 1e-5, "south": 1.5e-3}


class Sites:
    """Two real sites, a server's words of their run, and the folder that a report is made of."""

    def __init__(self, new_world: Any, root: Path) -> None:
        self.root, self.worlds = root, {}
        (root / "ledgers").mkdir(parents=True)
        for name in OWN:
            (root / name).mkdir()
            self.worlds[name] = new_world(folder=root / name)
        self.north, self.south = self.worlds.values()
        self.south.coordinator = self.north.coordinator

    def contract(self, **changes: Any) -> Contract:
        cohort = tuple(
            SiteTerms(name=name, key=world.key.public, domain="ward", nominal_size=100)
            for name, world in self.worlds.items()
        )
        rounds = {"rounds": ROUNDS, "max_attempts": ROUNDS}
        agreed: Contract = self.north.contract(**{"cohort": cohort, **rounds, **changes})
        return agreed

    def serve(
        self,
        name: str,
        agreed: Contract,
        limits: DomainPolicy,
        rounds: int,
        **shared: DomainPolicy,
    ) -> None:
        """Charges a site's ledger with a run's first rounds, and copies it into the folder.

        Its domain names the column by which the contract tells persons apart.
        """
        limits = limits.model_copy(update={"person_column": agreed.data.person_column})
        world, (domain,) = self.worlds[name], {s.domain for s in agreed.cohort if s.name == name}
        gate = world.gate(policy=world.policy(site=name, domains={domain: limits, **shared}))
        for number in range(1, rounds + 1):
            world.serve(gate, world.order(world.sign(agreed), number))
        gate.ledger.close()
        shutil.copy(world.ledger_path, self.root / "ledgers" / f"{name}.sqlite")

    def run(self, agreed: Contract, *, deltas: dict[str, float]) -> None:
        """Leaves what a run of all sites leaves; each site's policy has its own δ."""
        (self.root / "contract.json").write_bytes(self.north.sign(agreed).to_bytes())
        for name, delta in deltas.items():
            self.serve(name, agreed, DomainPolicy(epsilon=20.0, delta=delta), ROUNDS)

    def told(self, agreed: Contract, **changes: Any) -> None:
        """Writes the server's summary and metrics, at δ 1e-5."""
        events = [entries.events_of(agreed, rounds=n, evaluations=0) for n in range(1, ROUNDS + 1)]
        after = [accounting.epsilon(charged, 1e-5) for charged in events]
        rows = agreed.data.rows_per_person
        unknown = dict.fromkeys(("test_accuracy", "test_loss"))
        facts = {"refused": [], "heads": {}, "rounds": ROUNDS, "seconds": 1.0, "out": "run"}
        own = ServerSummary(
            **{**facts_of(agreed), **facts, **unknown, "epsilon_run": after[-1], "delta": 1e-5},
            epsilon_person=rows and accounting.epsilon_of_person(events[-1], 1e-5, rows),
            rows_kept=rows,
            epsilon_replaced=rows and accounting.epsilon_replace_one(events[-1], 1e-5),
            guarantee=GUARANTEE_PRIVATE,
        )
        text = json.dumps({**own.model_dump(mode="json"), **changes})
        (self.root / "summary.json").write_text(text)
        lines = [
            MetricsLine(
                round=number,
                validation_accuracy=None,
                validation_loss=None,
                epsilon_run=epsilon,
                replied=2,
                refused=0,
            ).model_dump_json()
            for number, epsilon in enumerate(after, start=1)
        ]
        (self.root / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def proven(self, agreed: Contract, **changes: Any) -> None:
        """Writes the summary of one who has all ledgers, at δ 1e-5."""
        result = {"refused": [], "rounds": ROUNDS, "seconds": 1.0, "test_accuracy": None}
        whole = summary.proven(
            agreed=agreed,
            ledgers=sorted((self.root / "ledgers").iterdir()),
            anchors={},
            result={**result, "test_loss": None},
            **{"delta": 1e-5, "device": "cpu", "workers": 1, "out": "run"},
        )
        text = json.dumps({**whole.model_dump(mode="json"), **changes})
        (self.root / "summary.json").write_text(text)

    def gather(self) -> Evidence:
        return evidence.gather(
            folder.find(self.root, mechanism=None, membership=None, agreement=None)
        )


@pytest.fixture
def sites(new_world: Any, tmp_path: Path) -> Sites:
    return Sites(new_world, tmp_path / "sites")


def result(found: Evidence, name: str) -> Check:
    (check,) = (check for check in checks.checks(found) if check.name.startswith(name))
    return check


def claim(found: Evidence) -> str:
    return wording.claim(found, checks.checks(found))


# Each site's δ


def test_each_site_is_claimed_at_its_own_delta(sites: Sites, bract: Bract) -> None:
    agreed = sites.contract()
    sites.run(agreed, deltas=OWN)
    found = sites.gather()
    own = {spent.site: spent for spent in found.spent}
    assert own["south"].epsilon < own["north"].epsilon
    said = claim(found)
    for name, spent in own.items():
        assert (
            f"times as likely (ε\u00a0=\u00a0{spent.epsilon:.4f}), plus a probability of at most "
            f"{OWN[name]:g} (δ), at {name}"
        ) in said
    assert "δ is each site’s own" in wording.about(found, checks.checks(found))
    files = sorted(map(str, (sites.root / "ledgers").iterdir()))
    pinned = ("--contract", str(sites.root / "contract.json"))
    text = bract("audit", "budget", *files, *pinned).stdout
    for name, delta in OWN.items():
        (line,) = (line for line in text.splitlines() if name in line and " 20 " in line)
        assert f" {delta:g} " in line


def test_one_delta_is_said_once_with_the_greatest_epsilon(sites: Sites) -> None:
    agreed = sites.contract()
    sites.run(agreed, deltas=dict.fromkeys(OWN, 1e-5))
    other = sites.contract(run="other")
    sites.serve("south", other, DomainPolicy(epsilon=20.0, delta=1e-5), 1)
    found = sites.gather()
    most = max(spent.epsilon or 0.0 for spent in found.spent)
    said = claim(found)
    assert said.endswith(f"(ε\u00a0=\u00a0{most:.4f}), plus a probability of at most 1e-05 (δ).")
    assert said.count("(δ)") == 1


@pytest.mark.parametrize("delta", [1e-6, 1.5e-3])
def test_a_servers_words_are_held_against_ledgers_at_their_own_delta(
    sites: Sites, delta: float
) -> None:
    agreed = sites.contract()
    sites.run(agreed, deltas={"north": 1e-5, "south": delta})
    sites.told(agreed)
    found = sites.gather()
    assert checks.failed(checks.checks(found)) == []
    assert result(found, "The metrics’ ε").result == "passed"
    least = min(spent.epsilon_run or 0.0 for spent in found.spent)
    sites.told(agreed, epsilon_run=least - 1e-3)
    check = result(sites.gather(), "The summary agrees")
    assert (check.result, "at δ 1e-05" in check.detail) == ("failed", True)


@pytest.mark.parametrize("delta", [0.0, 1e-12, 1.0, 2.0])
def test_a_summary_at_no_delta_is_a_failed_check(sites: Sites, delta: float) -> None:
    agreed = sites.contract()
    sites.run(agreed, deltas=OWN)
    sites.told(agreed, delta=delta, epsilon_run=0.0)
    found = sites.gather()
    assert result(found, "The summary agrees").result == "failed"
    assert result(found, "The metrics’ ε").result == "not done"


# Two ways of counting


@pytest.mark.parametrize(("rate", "steps", "order"), [(1e-3, 33_000, 25), (1e-4, 330_000, 64)])
def test_many_steps_of_small_loss_are_counted_finely_before_a_check_fails(
    sites: Sites, rate: float, steps: int, order: int
) -> None:
    agreed = sites.contract(
        privacy={"sampling_rate": rate, "noise_multiplier": 2.0},
        training=TrainingTerms(local_steps=steps, learning_rate=0.5),
    )
    fixed = DomainPolicy(epsilon=1.0, delta=1e-5, composition=Filter(order=order))
    (sites.root / "contract.json").write_bytes(sites.north.sign(agreed).to_bytes())
    sites.serve("north", agreed, fixed, ROUNDS)
    found = sites.gather()
    (spent,) = found.spent
    by_loss, by_renyi = spent.epsilon or 0.0, spent.epsilon_filter or 0.0
    assert by_loss > by_renyi
    check = result(found, "A second way of counting")
    assert check.result == "passed", check.detail
    assert f"by Rényi divergence ε is at most {by_renyi:.4f}, as it must not be" in check.detail
    # An ε that is under every grid's is still found.
    (record,) = found.ledgers
    lower = replace(record, spent=(replace(spent, epsilon_filter=by_renyi * 0.7),))
    assert result(replace(found, ledgers=(lower,)), "A second way").result == "failed"


# A person with several records

PERSONS = DataTerms(
    name="own",
    shape=(1,),
    classes=2,
    preparation=Table(
        columns=(Numeric(name="age", low=20, high=80),),
        target=Target(name="ill", classes=("no", "yes")),
        group="patient",
        rows_per_group=2,
    ),
)


SINGLE = DataTerms.model_validate(
    {
        **PERSONS.model_dump(),
        "preparation": {**PERSONS.model_dump()["preparation"], "rows_per_group": 1},
    }
)


HOUSEHOLDS = DataTerms.model_validate(
    {
        **PERSONS.model_dump(),
        "preparation": {**PERSONS.model_dump()["preparation"], "group": "household"},
    }
)


def about(found: Evidence) -> str:
    return wording.about(found, checks.checks(found))


def of_persons(
    sites: Sites, words: Callable[..., None]
) -> tuple[Contract, Evidence, tuple[Event, ...]]:
    """Returns a run of persons with two records that agrees with itself, and what a site spent."""
    agreed = sites.contract(data=PERSONS)
    sites.run(agreed, deltas=dict.fromkeys(OWN, 1e-5))
    words(sites, agreed)
    found = sites.gather()
    assert checks.failed(checks.checks(found)) == []
    return agreed, found, found.spent[0].events


@pytest.mark.parametrize("words", [Sites.told, Sites.proven])
def test_a_persons_epsilon_is_the_ledgers_whatever_a_summary_says(
    sites: Sites, words: Callable[..., None], bract: Bract
) -> None:
    agreed, found, events = of_persons(sites, words)
    bound = accounting.epsilon_of_person(events, 1e-5, 2)
    assert bound > accounting.epsilon(events, 1e-5)
    said = f"A person with up to 2 records: ε at most {bound:.4f} at δ\u00a0=\u00a01e-05"
    assert said in about(found)
    files = sorted(map(str, (sites.root / "ledgers").iterdir()))
    pinned = ("--contract", str(sites.root / "contract.json"))
    text = bract("audit", "budget", *files, *pinned).stdout
    assert f"north, ward: ε {bound:.4f} of a person with 2 examples, at the most" in text
    for wrong in ({"epsilon_person": bound - 1e-3}, {"rows_per_person": 1}):
        words(sites, agreed, **wrong)
        found = sites.gather()
        assert result(found, "The summary agrees").result == "failed"
        assert about(found) == ""
    (sites.root / "summary.json").unlink()
    assert said in about(sites.gather())


@pytest.mark.parametrize("words", [Sites.told, Sites.proven])
def test_a_record_is_claimed_for_persons_of_no_more_than_are_kept_and_replaced_for_others(
    sites: Sites, words: Callable[..., None], bract: Bract
) -> None:
    """One row less of a person with more lets another in: two records differ, not one."""
    agreed, found, events = of_persons(sites, words)
    bound = accounting.epsilon_replace_one(events, 1e-5)
    assert bound > accounting.epsilon(events, 1e-5)
    whose = (
        "any one record of the site’s data, of a person with no more than 2 records there, makes"
    )
    assert whose in claim(found)
    assert (
        "ε per record holds where its person has no more than 2 records; of a person with more, "
        "another record takes its place, and by replace-one ε is at most "
        f"{bound:.4f} at δ\u00a0=\u00a01e-05."
    ) in about(found)
    files = sorted(map(str, (sites.root / "ledgers").iterdir()))
    pinned = ("--contract", str(sites.root / "contract.json"))
    text = bract("audit", "budget", *files, *pinned).stdout
    assert f"north, ward: ε {bound:.4f} of one example replaced" in text
    assert "no more than 2 examples; of a person with more, another example" in text
    for wrong in ({"epsilon_replaced": bound - 1e-3}, {"rows_kept": 3}):
        words(sites, agreed, **wrong)
        assert result(sites.gather(), "The summary agrees").result == "failed"
    words(sites, agreed, rows_kept=None, epsilon_replaced=None)  # of an earlier version
    assert checks.failed(checks.checks(sites.gather())) == []


def test_a_record_is_claimed_by_the_fewest_that_any_contract_of_a_ledger_kept(
    sites: Sites,
) -> None:
    """Whether or not this run's own contract leaves records out."""
    agreed, limits = sites.contract(), DomainPolicy(epsilon=20.0, delta=1e-5)
    sites.run(agreed, deltas=dict.fromkeys(OWN, 1e-5))
    assert "of a person with no more" not in claim(sites.gather())
    for kept, data in ((2, PERSONS), (1, SINGLE)):
        sites.serve("north", sites.contract(data=data), limits, 1)
        found = sites.gather()
        assert f"with no more than {counted(kept, 'record')} there, makes" in claim(found)
        assert "another record takes its place" in about(found)
    sites.proven(agreed)
    (events,) = (spent.events for spent in found.spent if spent.site == "north")
    told = json.loads((sites.root / "summary.json").read_text())
    replaced = accounting.epsilon_replace_one(events, 1e-5)
    assert (told["rows_kept"], told["epsilon_replaced"]) == (1, replaced)


def test_a_ledger_that_went_on_after_a_summary_does_not_belie_it(sites: Sites) -> None:
    agreed = sites.contract(data=PERSONS)
    sites.run(agreed, deltas=OWN)
    sites.proven(agreed)
    before = sites.gather()
    sites.serve("north", sites.contract(data=PERSONS), DomainPolicy(epsilon=20.0, delta=1e-5), 1)
    found = sites.gather()
    assert checks.failed(checks.checks(found)) == []
    north, south = (spent.epsilon_person for spent in found.spent)
    assert (north or 0.0) > (before.spent[0].epsilon_person or 0.0)
    bounds = f"{north:.4f} at δ\u00a0=\u00a01e-05, {south:.4f} at δ\u00a0=\u00a00.0015"
    assert f"ε at most {bounds}, by the ledgers" in about(found)


def test_a_persons_epsilon_is_of_the_most_rows_that_any_contract_of_a_ledger_used(
    sites: Sites,
) -> None:
    agreed, limits = sites.contract(data=SINGLE), DomainPolicy(epsilon=20.0, delta=1e-5)
    sites.run(agreed, deltas=dict.fromkeys(OWN, 1e-5))
    assert "A person with up to 1 record: ε at most " in about(sites.gather())
    sites.serve("north", sites.contract(data=PERSONS), limits, 1)
    sites.proven(agreed)
    found = sites.gather()
    assert checks.failed(checks.checks(found)) == []
    (events,) = (spent.events for spent in found.spent if spent.site == "north")
    bounds = [accounting.epsilon_of_person(events, 1e-5, rows) for rows in (1, 2)]
    told = json.loads((sites.root / "summary.json").read_text())
    assert (told["rows_per_person"], told["epsilon_person"]) == (2, bounds[1])
    assert f"A person with up to 2 records: ε at most {bounds[1]:.4f} at" in about(found)
    for wrong in ({"epsilon_person": bounds[0]}, {"rows_per_person": 1}):
        sites.proven(agreed, **wrong)
        check = result(sites.gather(), "The summary agrees")
        assert (check.result, check.detail.startswith("north: ")) == ("failed", True)
    sites.told(agreed)  # a server knows of its own run alone
    assert checks.failed(checks.checks(sites.gather())) == []


@pytest.mark.parametrize("other", [{}, {"data": HOUSEHOLDS}], ids=["no rows", "other persons"])
def test_nothing_bounds_a_persons_epsilon_where_another_contract_bounds_no_such_rows(
    sites: Sites, other: dict[str, Any]
) -> None:
    agreed, limits = sites.contract(data=SINGLE), DomainPolicy(epsilon=20.0, delta=1e-5)
    sites.run(agreed, deltas=dict.fromkeys(OWN, 1e-5))
    sites.serve("north", sites.contract(**other), limits, 1)
    sites.proven(agreed)
    found = sites.gather()
    assert checks.failed(checks.checks(found)) == []
    told = json.loads((sites.root / "summary.json").read_text())
    assert (told["rows_per_person"], told["epsilon_person"]) == (None, None)
    assert "A person with several records: nothing bounds ε" in about(found)
    sites.proven(agreed, rows_per_person=1, epsilon_person=19.0)
    check = result(sites.gather(), "The summary agrees")
    assert (check.result, "any number of records" in check.detail) == ("failed", True)


def test_no_persons_epsilon_is_told_where_one_contract_bounds_no_rows(
    sites: Sites, bract: Bract
) -> None:
    agreed = sites.contract(data=PERSONS)
    sites.run(agreed, deltas=OWN)
    sites.serve("north", sites.contract(), DomainPolicy(epsilon=20.0, delta=1e-5), 1)
    files = sorted(map(str, (sites.root / "ledgers").iterdir()))
    pinned = ("--contract", str(sites.root / "contract.json"))
    done = bract("audit", "budget", *files, *pinned, "--json")
    north, south = json.loads(done.stdout)["domains"]
    assert (north["rows_per_person"], north["epsilon_person"]) == (None, None)
    assert (south["rows_per_person"], south["epsilon_person"] > south["epsilon"]) == (2, True)


# Whose ledger is here


def test_a_ledger_of_another_domain_is_not_the_sites(sites: Sites) -> None:
    agreed = sites.contract()
    sites.run(agreed, deltas={"north": 1e-5})
    away = sites.contract(
        cohort=(
            SiteTerms(name="south", key=sites.south.key.public, domain="away", nominal_size=100),
        )
    )
    sites.serve("south", away, DomainPolicy(epsilon=20.0, delta=1e-5), 1)
    found = sites.gather()
    check = result(found, "Every site’s ledger")
    assert (check.result, "south (domain ward) of 2 sites" in check.detail) == ("not done", True)
    (verdict,) = wording.verdicts(found, checks.checks(found))
    assert verdict.title == "Not every site is covered"
    assert claim(found).startswith("For the one site whose ledger is here: ")


def test_a_ledger_that_holds_nothing_of_the_contract_is_said_to(sites: Sites) -> None:
    agreed = sites.contract()
    sites.run(agreed, deltas={"north": 1e-5})
    limits = DomainPolicy(epsilon=20.0, delta=1e-5)
    sites.serve("south", sites.contract(run="other"), limits, 1)
    found = sites.gather()
    check = result(found, "Every site’s ledger")
    assert check.result == "passed"
    assert check.detail == "of all 2 sites; that of south holds nothing of this contract"
    assert any("Whether south took part" in one for one in wording.unchecked(found))
    sites.serve("south", agreed, limits, 1)
    found = sites.gather()
    assert result(found, "Every site’s ledger").detail == "of all 2 sites"
    assert not any("took part" in one for one in wording.unchecked(found))


def test_a_domain_that_shares_examples_names_whose_budget_bounds_it_too(
    sites: Sites, bract: Bract
) -> None:
    agreed = sites.contract()
    sites.run(agreed, deltas={"north": 1e-5})
    clinic = DomainPolicy(epsilon=10.0, delta=1e-5, overlaps=("ward",))
    sites.serve("south", agreed, DomainPolicy(epsilon=20.0, delta=1e-5), ROUNDS, clinic=clinic)
    shared = {(spent.site, spent.domain): spent.shared for spent in sites.gather().spent}
    assert shared == {
        ("north", "ward"): (),
        ("south", "ward"): ("clinic",),
        ("south", "clinic"): ("ward",),
    }
    page = page_of(sites, bract)
    assert page.count("each use must fit what is left of clinic too") == 1
    assert page.count("each use must fit what is left of ward too") == 1


# A menu


def test_under_a_menu_the_whole_of_it_bounds_contracts_chosen_after_looking(
    sites: Sites, bract: Bract
) -> None:
    agreed = sites.contract()
    sites.run(agreed, deltas={"north": 1e-5})
    listed = MenuClass(sampling_rate=0.1, noise_multiplier=1.5, max_steps=400)
    menu = DomainPolicy(epsilon=20.0, delta=1e-5, composition=Menu(classes=(listed,)))
    sites.serve("south", agreed, menu, ROUNDS)
    found = sites.gather()
    assert checks.failed(checks.checks(found)) == []
    (south,) = (spent for spent in found.spent if spent.site == "south")
    whole = accounting.epsilon([PoissonGaussian(0.1, 1.5, 400)], 1e-5)
    assert (south.epsilon or 0.0) < whole
    assert (south.epsilon_adaptive, south.epsilon_filter, south.left) == (whole, None, None)
    said = f"chosen after looking at earlier releases: ε at most {whole:.4f} at"
    assert said in about(found)
    (sites.root / "ledgers/north.sqlite").unlink()
    assert any("Whether contracts were chosen" in one for one in wording.unchecked(sites.gather()))
    path, pinned = sites.root / "ledgers/south.sqlite", sites.root / "contract.json"
    asked = ("audit", "budget", str(path), "--contract", str(pinned))
    (domain,) = json.loads(bract(*asked, "--json").stdout)["domains"]
    assert (domain["epsilon_menu"], domain["left"]) == (whole, None)
    assert [entry["left"] for entry in domain["menu"]] == [400 - 2 * ROUNDS]
    assert "epsilon_menu also if they were not" in domain["note"]
    text = bract(*asked).stdout
    assert f"ε {whole:.4f} of its whole menu; left are 394 of 400 steps at q 0.1, σ 1.5" in text
    page = page_of(sites, bract)
    assert "of its menu are left 394 of 400 steps at q 0.1, σ 1.5" in page
    assert f'<td class="number">{whole:.4f}</td><td class="number">–</td>' in page


def page_of(sites: Sites, bract: Bract) -> str:
    done = bract("audit", "report", str(sites.root), "-o", "report.html")
    assert done.returncode == 0, done.stderr
    return Path("report.html").read_text()
