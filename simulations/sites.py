"""Simulated sites: the real gate, ledger and trainer, over one part of a data set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from flwr.app import Context

from bract.client.fingerprint import Fingerprints
from bract.client.gate import Gate
from bract.client.holdings import Holdings
from bract.client.site import Learner, Site, Trainers
from bract.client.training.execution import Execution
from bract.client.updates import UpdateStore
from bract.shared import arrays
from bract.shared.arrays import Arrays
from bract.shared.configuration import Frozen
from bract.shared.data import Examples, load
from bract.shared.errors import UsageError
from bract.shared.policy import DomainPolicy, Policy
from bract.shared.privacy.ledger import Ledger
from bract.shared.terms import DataTerms, Mechanism
from bract.simulations import state
from bract.simulations.experiment import ExecutionSettings, PolicySettings
from bract.simulations.randomness import SeededRandomness
from bract.simulations.state import State

FACTORY = "bract.simulations.sites:open_site"
PLAN_VARIABLE = "BRACT_SITE_PLAN"
_OPEN_LEDGERS = 256


class Plan(Frozen):
    """What workers need to open sites: written by the simulation, read once in each process."""

    data: DataTerms
    data_folder: str | None
    rows: str
    ledgers: str
    private: str
    domain: str
    sites: int
    site_names: tuple[str, ...] = ()
    seed: int
    coordinator: str
    model: str
    mechanism: Mechanism
    delta: float
    policy: PolicySettings
    evaluation: bool = False
    device: str
    execution: ExecutionSettings
    noise_ahead: bool = False

    @cached_property
    def state(self) -> State:
        """The sites' lasting state."""
        return State(ledgers=Path(self.ledgers), private=Path(self.private))

    def name_of(self, index: int) -> str:
        """Returns the name of a site: its group's where the data set has named it."""
        return self.site_names[index] if self.site_names else site_name(index, self.sites)

    def domain_of(self, site: str) -> str:
        """Returns the id of a site's data domain.

        Runs without privacy take a domain of their own, so that they leave the others' finite; and
        a ledger protects one unit.
        """
        suffixes = {"dp-sgd": "", "user-level": ".clients", "none": ".unprotected"}
        return f"{self.domain}.{site}{suffixes[self.mechanism]}"

    @property
    def shares_a_file(self) -> bool:
        """Whether all sites keep their chains in one ledger file: none has one of its own."""
        return self.many and all(
            self.state.shares_a_file(self.name_of(place), many=True) for place in range(self.sites)
        )

    @property
    def many(self) -> bool:
        """Whether sites share a ledger file that none has one of its own beside."""
        return self.sites >= state.SHARED_FILE_FROM or self.mechanism == "user-level"

    def policy_of(self, site: str) -> Policy:
        """Returns the policy that a simulated site enforces."""
        budget = DomainPolicy(
            epsilon=self.policy.epsilon,
            delta=self.delta,
            composition=self.policy.composition,
            person_column=self.data.person_column,
        )
        return Policy(
            site=site,
            coordinators=(self.coordinator,),
            domains={self.domain_of(site): budget},
            models=(self.model,),
            mechanisms=(self.mechanism,),
            min_noise_multiplier=self.policy.min_noise_multiplier,
            max_sampling_rate=self.policy.max_sampling_rate,
            evaluation=self.evaluation,
        )


def site_name(index: int, sites: int) -> str:
    """Returns the name of a site, zero-padded so that names sort.

    Example:
        >>> site_name(3, 12)
        'site-03'
    """
    return f"site-{index:0{len(str(sites - 1))}d}"


def open_site(context: Context) -> Site:
    """Returns the site that a node's configuration names; the ClientApp calls this.

    `plan` may stand in the environment instead, for nodes that Flower's own engine configures.
    """
    config = context.node_config
    plan = config.get("plan") or os.environ.get(PLAN_VARIABLE)
    if not plan or "partition-id" not in config:
        raise UsageError(
            "this node's configuration names no plan and partition-id: start it as the README's "
            "section on stock Flower says"
        )
    return _site(str(plan), int(config["partition-id"]))


def node_config(plan: Path, place: int) -> dict[str, str | int]:
    """Returns the configuration of the node that is a site of a plan."""
    return {"site-factory": FACTORY, "plan": str(plan), "partition-id": place}


def site_of(plan: Path, place: int) -> Site:
    """Returns a site of a plan, warm where this process has opened it of late."""
    return _site(str(plan), place)


def open_plan(path: Path) -> Plan:
    """Returns the plan that a simulation wrote."""
    return _plan(str(path))


def learner_of(plan: Path, place: int) -> tuple[Learner, Holdings]:
    """Returns what trains for a site of a plan that shares its ledger file, and its data."""
    return _learner(str(plan), place), _Part(str(plan), place)


def _learner(plan_path: str, index: int) -> Learner:
    plan = _plan(plan_path)
    name = plan.name_of(index)
    return Learner(
        name=name,
        randomness=SeededRandomness(plan.seed, name),
        trainers=_trainers(plan_path),
    )


@lru_cache(maxsize=1024)
def _site(plan_path: str, index: int) -> Site:
    plan, learner = _plan(plan_path), _learner(plan_path, index)
    name = learner.name
    shared = plan.state.shares_a_file(name, many=plan.many)
    gate = Gate(
        policy=plan.policy_of(name),
        key=plan.state.site_key(name, many=plan.many),
        ledger=_ledger(str(plan.state.ledger(name, many=plan.many))),
        updates=NotKept() if shared else UpdateStore(plan.state.updates(name)),
        holdings=_Part(plan_path, index),
        simulation=True,
        randomness=learner.randomness.kind,
    )
    return Site(
        name=name,
        gate=gate,
        randomness=learner.randomness,
        trainers=learner.trainers,
        # Of many sites the state's own facts say what data they hold.
        fingerprints=None if shared else Fingerprints(plan.state.private / "fingerprints" / name),
    )


class NotKept:
    """Updates of sites that share a ledger file: they never leave the process that made them."""

    def keep(self, values: Arrays) -> str:
        """Returns the update's hash."""
        return arrays.digest(values)

    def find(self, name: str) -> dict[str, arrays.Array] | None:
        """Returns None: the round is charged again."""
        return None


@dataclass(frozen=True, slots=True)
class _Part:
    """One site's part of the simulated data, under whichever domain counts it."""

    plan_path: str
    index: int

    def check(self, domain: str, data: DataTerms) -> None:
        """Returns: the simulation wrote contract and plan from the same experiment."""

    def open(self, domain: str, data: DataTerms) -> Examples:
        """Returns the site's examples."""
        return _examples(self.plan_path, self.index)


@lru_cache(maxsize=4)
def _plan(path: str) -> Plan:
    return Plan.model_validate_json(Path(path).read_bytes())


@lru_cache(maxsize=_OPEN_LEDGERS)
def _ledger(path: str) -> Ledger:
    return Ledger(Path(path))


@lru_cache(maxsize=4)
def _trainers(plan_path: str) -> Trainers:
    plan = _plan(plan_path)
    return Trainers(
        Execution(
            device=plan.device,
            mode=plan.execution.mode,
            physical_batch=plan.execution.physical_batch,
            precision=plan.execution.precision,
            noise_ahead=plan.noise_ahead,
        )
    )


def _examples(plan_path: str, index: int) -> Examples:
    plan = _plan(plan_path)
    folder = Path(plan.data_folder) if plan.data_folder else None
    return load(plan.data, folder).train.take(_rows(plan.rows)[index])


@lru_cache(maxsize=4)
def _rows(path: str) -> list[np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return np.split(stored["rows"], stored["cuts"])
