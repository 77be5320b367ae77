"""What a report claims of sites that each have terms of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bract.shared.contract import Contract
from bract.shared.policy import DomainPolicy
from bract.shared.privacy import accounting, entries
from bract.shared.report import checks, evidence, folder, wording
from bract.shared.report.checks import Check
from bract.shared.report.evidence import Evidence
from bract.shared.reports.runs import GUARANTEE_PRIVATE, MetricsLine, ServerSummary, facts_of
from bract.shared.terms import SiteTerms

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

    def serve(self, name: str, agreed: Contract, limits: DomainPolicy, rounds: int) -> None:
        """Charges a site's ledger with a run's first rounds, and copies it into the folder."""
        world, (domain,) = self.worlds[name], {s.domain for s in agreed.cohort if s.name == name}
        gate = world.gate(policy=world.policy(site=name, domains={domain: limits}))
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
        after = [
            accounting.epsilon(entries.events_of(agreed, rounds=n, evaluations=0), 1e-5)
            for n in range(1, ROUNDS + 1)
        ]
        unknown = dict.fromkeys(("test_accuracy", "test_loss"))
        facts = {"refused": [], "heads": {}, "rounds": ROUNDS, "seconds": 1.0, "out": "run"}
        summary = ServerSummary(
            **{**facts_of(agreed), **facts, **unknown, "epsilon_run": after[-1], "delta": 1e-5},
            guarantee=GUARANTEE_PRIVATE,
        )
        text = json.dumps({**summary.model_dump(mode="json"), **changes})
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
