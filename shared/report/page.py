"""The page: evidence, checks and figures through a template, all of it escaped."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from importlib import resources
from typing import Final

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from bract.shared import versions
from bract.shared.report import checks as checking
from bract.shared.report import figures, wording
from bract.shared.report.checks import Check
from bract.shared.report.evidence import Evidence
from bract.shared.reports.runs import SCORES, Summary
from bract.shared.terms import PrivacyTerms, counted

_RANDOMNESS: Final = {
    "csprng": "of a cryptographic source, keyed by the operating system",
    "seeded": "from a seed: repeatable, and so without protection",
}
PACKAGE: Final = "bract.shared.report"
SITES = 200  # that a table lists
P_VALUES = 12
_SCORES: Final = SCORES | {
    "plain_accuracy": "accuracy without privacy, simulated",
    "plain_accuracy_mean_of_groups": "the same, mean of the groups",
}


def page(found: Evidence, made: list[Check]) -> str:
    """Returns the report as one HTML document, which loads nothing and runs nothing.

    Args:
        found: the evidence.
        made: `checks.checks` of it.
    """
    return (
        _environment()
        .get_template("page.html")
        .render(
            style=Markup(_text("page.css")),  # noqa: S704  our own file, not data
            written=datetime.now(UTC),
            version=versions.installed()["bract"],
            found=found,
            agreed=found.contract,
            checks=made,
            failed=checking.failed(made),
            verdicts=wording.verdicts(found, made),
            claim=wording.claim(found, made),
            about=wording.about(found, made),
            unchecked=wording.unchecked(found),
            facts=_facts(found),
            scores=_scores(found),
            sites=figures.by_site(found, SITES),
            more_sites=max(0, len(found.spent) - SITES),
            privacy=figures.privacy(found),
            accuracy=figures.accuracy(found.metrics),
            recovered=figures.recovered(found.mechanism) if found.mechanism else None,
            bounds=figures.bounds(found.mechanism) if found.mechanism else None,
            p_values=_p_values(found),
            attacks=figures.attacks(found.membership),
            agreement=figures.agreement(found.agreement),
            prints=_prints(found),
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    made = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["eps"] = figures.shown
    return made


def _text(name: str) -> str:
    return (resources.files(PACKAGE) / name).read_text(encoding="utf-8")


def _facts(found: Evidence) -> list[tuple[str, str]]:
    """Returns who, what data and on what terms, by the signed contract."""
    agreed, privacy = found.contract, found.contract.privacy
    names = [site.name for site in agreed.cohort]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    steps, persons = agreed.training.local_steps, agreed.data.rows_per_person
    kind = "a simulation" if agreed.simulation else "a real federation"
    facts = {
        "Run": f"{agreed.run}, {kind}",
        "Coordinator": f"key {agreed.coordinator}",
        "Sites": f"{len(names)}: {', '.join(names[:12])}{more}",
        "Data": f"{agreed.data.name}; domains and public sizes stand in the table by site",
        "Model": agreed.model.name,
        "Length": f"{agreed.rounds} rounds of {counted(steps, 'step')}; at most "
        f"{agreed.max_attempts} attempts are charged",
        "Mechanism": _mechanism(privacy),
        "Randomness": _RANDOMNESS[privacy.randomness],
        "Protected unit": f"one {privacy.unit}, {privacy.adjacency.replace('-', ' ')}",
        "Persons": None if persons is None else f"at most {counted(persons, 'record')} of each",
        "Contract": f"SHA-256 {agreed.sha256}",
    }
    return [(name, value) for name, value in facts.items() if value is not None]


def _mechanism(privacy: PrivacyTerms) -> str:
    if privacy.mechanism == "none":
        return "none: nothing is clipped, and no noise is added"
    return (
        f"{privacy.mechanism}: noise multiplier σ {privacy.noise_multiplier:g}, sampling rate q "
        f"{privacy.sampling_rate:.4g}, clip norm C {privacy.clip_norm:g}"
    )


def _scores(found: Evidence) -> list[tuple[str, str]]:
    if found.summary is None:
        return []
    values = [(words, getattr(found.summary, name, None)) for name, words in _SCORES.items()]
    scores = [(words, f"{value:.4f}") for words, value in values if value is not None]
    for group, value in (found.summary.test_accuracy_by_group or {}).items():
        scores.append((f"accuracy, {group}", f"{value:.4f}"))
    if isinstance(found.summary, Summary) and found.summary.epsilon_prv is not None:
        scores.append(
            ("ε by the PRV accountant, the run’s own word", f"{found.summary.epsilon_prv:.4f}")
        )
    return scores


def _p_values(found: Evidence) -> list[tuple[str, str]]:
    """Returns the tests of the mechanism, the least likely first."""
    if found.mechanism is None:
        return []
    known = [(p, name) for name, p in found.mechanism.p_values.items()]
    return [(name, f"{p:.3g}") for p, name in sorted(known)[:P_VALUES]]


def _prints(found: Evidence) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns hashes and keys, by what they are of."""
    agreed, folder = found.contract, found.folder
    files = [(record.name, record.sha256 or "unreadable") for record in found.ledgers[:SITES]]
    if folder.model is not None and found.model_sha256 is not None:
        files.append((folder.model.name, found.model_sha256))
    spent = found.spent[:SITES]
    keys = [("coordinator", agreed.coordinator)]
    keys += [("witness", agreed.witness)] if agreed.witness else []
    keys += [(site.name, site.key) for site in agreed.cohort[:SITES]]
    return [
        ("Contract, SHA-256", [("contract.json", agreed.sha256)]),
        ("Public keys, Ed25519", keys),
        (
            "Last entry of each domain",
            [(f"{s.site}, entry {s.entries - 1}", s.head) for s in spent],
        ),
        ("Policy in force, SHA-256", [(s.site, s.policy) for s in spent]),
        ("Files, SHA-256", files),
    ]
