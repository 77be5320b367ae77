"""The same audit over TLS: the host of `bract server` here, a real `bract client` for each site.

Gate, ledger, trainer and noise are in processes of their own, and the noise is secret. The auditor
stands where the round loop stands, since a server averages before it tells.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bract.server.flower.grid import FleetGrid
from bract.server.flower.host import Host, Listener
from bract.shared import federation, keys
from bract.shared.contract import SignedContract
from bract.shared.errors import BractError
from bract.shared.federation import Federation
from bract.shared.terms import SiteTerms
from bract.simulations.audits import mechanism, proposal, register, trial
from bract.simulations.audits.mechanism import Findings
from bract.simulations.audits.proposal import Subject
from bract.simulations.audits.settings import DELTA, Setting, Suite
from bract.simulations.audits.trial import BLANK, Answers, Trial
from bract.simulations.federations.loopback import (
    LOOPBACK,
    Layout,
    Processes,
    SitePlan,
    free_port,
    lay_out,
)

_START_SECONDS, _REPLY_SECONDS = 120.0, 300.0
_GREATEST_REPLY = 2**28


def audit(subject: Subject, suite: Suite, *, seed: int, folder: Path) -> Findings:
    """Returns what an audit of real sites on this machine finds.

    Args:
        subject: the model, and public data.
        suite: the contracts.
        seed: decides which canaries are in; the sites' noise has no seed.
        folder: keeps the federation's files, ledgers included; must be new.

    Raises:
        BractError: where a site does not come.
    """
    settings = [proposal.settled(setting, subject) for setting in suite.settings]
    layout = _lay_out(folder / "federation", settings[0], subject)
    chosen = federation.read(layout.federation)
    runs: list[tuple[Setting, SignedContract, list[Answers]]] = []
    with _grid(layout, chosen) as grid, Processes(layout) as processes:
        for name in layout.sites:
            processes.start_client(name)
        nodes = _gathered(grid, processes, len(layout.sites))
        for setting in settings:
            signed = _proposed(setting, subject, chosen, layout, seed=seed)
            runs.append((setting, signed, trial.collect(grid, nodes, signed, setting)))
    trials: dict[str, Trial] = {}
    for setting, signed, answers in runs:  # the sites have let go of their ledgers
        for answer, terms in zip(answers, signed.contract.cohort, strict=True):
            answer.events = trial.charged(layout.ledger(terms.name), terms, signed.contract)
        trials[setting.name] = trial.completed(setting, subject, signed, answers, seed=seed)
    return mechanism.found(trials)


def _lay_out(root: Path, main: Setting, subject: Subject) -> Layout:
    names = [*(f"canary-{site}" for site in range(main.sites)), BLANK]
    data = proposal.data_of(main, subject, seed=0)
    plans = [
        SitePlan(
            name,
            main.canaries,
            register.DATA,
            part=str(place),
            data_folder=str(subject.folder) if subject.folder else None,
            epsilon=trial.CEILING,
            delta=DELTA,
        )
        for place, name in enumerate(names)
    ]
    assert main.strength is not None  # noqa: S101  it was settled
    model = register.model_terms(
        subject.model, subject.data, rows=main.rows, strength=main.strength
    )
    terms = {
        "run": "audit",
        "rounds": main.rounds,
        "minimum_cohort": len(names),
        "model": {"name": model.name, "options": model.options},
        "data": {"name": data.name, "options": data.options},
        "training": {"local_steps": 1, "learning_rate": proposal.LEARNING_RATE},
        "privacy": {
            "epsilon": trial.CEILING,
            "delta": DELTA,
            "clip_norm": main.clip_norm,
            "batch": main.normaliser,
            "noise_multiplier": main.noise_multiplier,
        },
    }
    folder = str(subject.folder) if subject.folder else None
    return lay_out(root, sites=plans, port=free_port(), terms=terms, public_data=folder)


def _proposed(
    setting: Setting, subject: Subject, chosen: Federation, layout: Layout, *, seed: int
) -> SignedContract:
    """Returns the contract of a setting with the sites that it asks, in their order."""
    count = setting.sites
    asked = [*chosen.sites[:count], *(chosen.sites[-1:] if setting.blank_rounds else [])]
    cohort = [
        SiteTerms(name=site.name, key=site.key, domain=site.domain, nominal_size=setting.canaries)
        for site in asked
    ]
    key = keys.load(layout.federation.parent / "coordinator.pem")
    return proposal.propose(setting, subject, seed=seed, cohort=cohort, key=key, simulation=False)


@contextmanager
def _grid(layout: Layout, chosen: Federation) -> Iterator[FleetGrid]:
    server = chosen.server
    host = Host(
        database=layout.federation.parent / "superlink.sqlite",
        sites={site.name: site.node_key for site in chosen.sites},
        listener=Listener(LOOPBACK, layout.port, Path(server.certificate), Path(server.key)),
        greatest_reply=_GREATEST_REPLY,
    )
    host.start()
    try:
        yield FleetGrid(host, reply_seconds=_REPLY_SECONDS)
    finally:
        host.close()


def _gathered(grid: FleetGrid, processes: Processes, count: int) -> dict[int, str]:
    """Returns the site of each node, once all are there.

    Raises:
        BractError: where one ends, or stays away, with the last line of its log.
    """
    deadline = time.monotonic() + _START_SECONDS
    while len(found := set(grid.get_node_ids())) < count:
        ended = [name for name, p in processes.running.items() if p.poll() is not None]
        if ended or time.monotonic() > deadline:
            name = (ended or list(processes.running))[0]
            last = " ".join(processes.log(name).strip().splitlines()[-1:])
            raise BractError(f"{len(found)} of {count} sites came; {name} said: {last}")
        time.sleep(0.1)
    return {node: grid.site_names[node] for node in found}
