"""One simulated run from an experiment to its summary."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from bract.client.training import devices
from bract.shared import canonical, contract, keys, models, tracking
from bract.shared.configuration import Frozen, parse
from bract.shared.contract import Contract, SignedContract
from bract.shared.data import Splits, dataset, load
from bract.shared.data.locations import folder_of
from bract.shared.data.partitions import group_names, nominal_size, split
from bract.shared.errors import UsageError
from bract.shared.policy import DomainPolicy, check_delta
from bract.shared.preparation import Table
from bract.shared.privacy import entries
from bract.shared.privacy.budget import fixed_rule
from bract.shared.privacy.calibration import check_budget, check_target, noise_within, rate_of
from bract.shared.reports.runs import Summary
from bract.shared.terms import DataTerms, PrivacyTerms, SiteTerms
from bract.simulations import digests, summary
from bract.simulations.engines import Engine
from bract.simulations.experiment import Experiment
from bract.simulations.progress import showing
from bract.simulations.rehearsal import rehearse
from bract.simulations.sites import Plan
from bract.simulations.state import State


class Begun(Frozen):
    """What a run was begun with, so that it can be resumed by its folder alone.

    The hashes are of data of the user's own (`digests`): of the files, of the examples where code
    made them, and of which rows each site has. None where there is nothing such.
    """

    experiment: Experiment
    data: DataTerms
    data_folder: str | None
    data_sha256: str | None = None
    examples_sha256: str | None = None
    rows_sha256: str | None = None
    state: str | None


@dataclass(frozen=True, slots=True)
class Simulation:
    """A run on disk, ready to go on from wherever it is."""

    begun: Begun
    out: Path
    workers: int

    @property
    def state(self) -> State:
        """The sites' lasting state: of this run alone, or the folder that `--state` named."""
        shared = self.begun.state
        return State.of_run(self.out) if shared is None else State.under(Path(shared))

    @contextmanager
    def prepared(self) -> Iterator[tuple[Plan, SignedContract]]:
        """Holds the state's lock and yields plan and contract, made where they are new.

        The plan is written anew each time, since folders may have moved; the contract never is.
        """
        state = self.state
        state.prepare()
        with state.locked():
            rows = self._rows()
            plan = self._plan(state, self._domain(state))
            canonical.write_atomically(self.plan_path, plan.model_dump_json().encode())
            path = self.out / "contract.json"
            if not path.exists():
                signed = self._contract(plan, [nominal_size(len(part)) for part in rows])
                canonical.write_atomically(path, signed.to_bytes())
            yield plan, contract.read(path)

    def run(self, engine: Engine) -> int:
        """Returns how many processes trained; what the ServerApp leaves lies in the run folder."""
        return engine.run(
            self.plan_path,
            sites=self.begun.experiment.sites,
            workers=self.workers,
            run_config=self.run_config,
        )

    def complete(self, engine: Engine, trackers: Sequence[str] = ()) -> Summary:
        """Returns the summary of the run, which lies in its folder too, when it has ended.

        Args:
            engine: carries the messages.
            trackers: which follow the run (`tracking.TRACKERS`).
        """
        with self.prepared() as (plan, signed), tracking.following(self.out, trackers):
            agreed = signed.contract
            with showing(agreed, self.out):
                workers = self.run(engine)
            result = canonical.decode((self._checkpoint / "result.json").read_bytes())
            report = summary.summarise(
                plan=plan, agreed=agreed, out=self.out, result=result, workers=workers
            )
            summary.save(report, self.out)
        return report

    @property
    def plan_path(self) -> Path:
        """The file that nodes open their sites by."""
        return self._checkpoint / "plan.json"

    @property
    def run_config(self) -> dict[str, str | int | float]:
        """What the ServerApp is told."""
        return {
            "contract": str(self.out / "contract.json"),
            "out": str(self.out),
            "data-folder": self.begun.data_folder or "",
            "delta": self.begun.experiment.privacy.delta,
            "device": str(devices.resolve(self.begun.experiment.device)),
            "init-seed": self.begun.experiment.seed,
            "witness-key": str(self.state.key("witness")),
        }

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoint"

    def parts(self) -> list[np.ndarray]:
        """Returns the training rows that the experiment's partition gives each site."""
        return _parts(self.begun.experiment, self._splits())

    def hold(self, parts: Sequence[np.ndarray]) -> None:
        """Fixes which rows each site trains on; before the first round, or not at all."""
        cuts = np.cumsum([len(part) for part in parts])[:-1]
        held = BytesIO()
        np.savez(held, rows=np.concatenate(parts), cuts=cuts)
        canonical.write_atomically(self._rows_path, held.getvalue())

    @property
    def _rows_path(self) -> Path:
        return self._checkpoint / "rows.npz"

    def _rows(self) -> list[np.ndarray]:
        """Returns each site's rows; computed once and kept, since partitioners are slow to load."""
        if not self._rows_path.exists():
            self.hold(self.parts())
        try:
            with self._rows_path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return np.split(stored["rows"], stored["cuts"])
        except (EOFError, BadZipFile, KeyError, ValueError) as error:
            raise UsageError(f"{self._rows_path} is damaged: begin another run") from error

    def _splits(self) -> Splits:
        folder = self.begun.data_folder
        return load(self.begun.data, Path(folder) if folder else None)

    def _domain(self, state: State) -> str:
        experiment = self.begun.experiment
        facts = _domain_facts(self.begun)
        state.bind(facts)
        digest = canonical.sha256(canonical.encode(facts))
        return f"{experiment.data.name}.{digest[:12]}"

    def _plan(self, state: State, domain: str) -> Plan:
        experiment = self.begun.experiment
        device = devices.resolve(experiment.device)
        return Plan(
            data=self.begun.data,
            data_folder=self.begun.data_folder,
            rows=str(self._rows_path),
            ledgers=str(state.ledgers),
            private=str(state.private),
            domain=domain,
            sites=experiment.sites,
            site_names=_group_names(experiment, self._splits()),
            seed=experiment.seed,
            coordinator=keys.load_or_generate(state.key("coordinator")).public,
            model=experiment.model.name,
            mechanism=experiment.privacy.mechanism,
            delta=experiment.privacy.delta,
            policy=experiment.policy,
            evaluation=experiment.evaluation is not None,
            device=str(device),
            execution=experiment.execution,
            # A worker has no core beside its own where there is one for each; a GPU has one worker.
            noise_ahead=(os.cpu_count() or 1) > (self.workers if device.type == "cpu" else 1),
        )

    def _contract(self, plan: Plan, sizes: list[int]) -> SignedContract:
        experiment, state = self.begun.experiment, self.state
        names = [plan.name_of(place) for place in range(experiment.sites)]
        cohort = tuple(
            SiteTerms(
                name=name,
                key=state.site_key(name, many=plan.many).public,
                domain=plan.domain_of(name),
                nominal_size=size,
            )
            for name, size in zip(names, sizes, strict=True)
        )
        agreed = Contract(
            run=experiment.name,
            nonce=contract.new_nonce(),
            coordinator=plan.coordinator,
            witness=keys.load_or_generate(state.key("witness")).public,
            simulation=True,
            rounds=experiment.rounds,
            max_attempts=experiment.rounds + experiment.spare_attempts,
            model=models.pinned(experiment.model, self.begun.data),
            data=self.begun.data,
            training=experiment.training,
            privacy=_privacy_terms(experiment, sizes),
            evaluation=experiment.evaluation,
            cohort=cohort,
            sites_per_round=experiment.sites_per_round,
        )
        return contract.sign(agreed, keys.load(state.key("coordinator")))


def begin(
    experiment: Experiment, *, out: Path, state: Path | None, data_dir: Path | None, workers: int
) -> Simulation:
    """Returns a new run whose settings are checked and on disk; nothing is charged yet.

    Raises:
        UsageError: where `out` holds something, or a setting will not do.
    """
    taken = UsageError(f"{out} exists and isn't empty: name another --out, or --resume {out}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise taken
    folder = where(experiment, data_dir)
    data = experiment.data.terms(folder)
    parts = _checked(experiment, data, folder)
    begun = Begun(
        experiment=experiment,
        data=data,
        data_folder=str(folder.resolve()) if folder else None,
        data_sha256=digests.of_files(data, folder),
        examples_sha256=digests.of_examples(data, folder),
        rows_sha256=None if dataset(data.name).published else digests.of_rows(parts),
        state=str(state.resolve()) if state else None,
    )
    if state is not None:
        State.under(state).check(_domain_facts(begun))
    out = out.resolve()
    (out / "checkpoint").mkdir(parents=True, exist_ok=True)
    text = canonical.encode(begun.model_dump(mode="json"))
    try:
        canonical.write_new(out / "checkpoint" / "begun.json", text)
    except FileExistsError as error:  # another run began there meanwhile
        raise taken from error
    simulation = Simulation(begun=begun, out=out, workers=workers)
    simulation.hold(parts)
    return simulation


def resume(out: Path, *, workers: int) -> Simulation:
    """Returns the run in a folder.

    Raises:
        UsageError: where nothing was begun there, or on other data.
    """
    path = out / "checkpoint" / "begun.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{out} holds no run to resume: nothing was charged there; run it anew"
        ) from error
    begun = parse(Begun, canonical.decode(text), source=str(path))
    _check_data_stayed(begun, out)
    return Simulation(begun=begun, out=out.resolve(), workers=workers)


def _check_data_stayed(begun: Begun, out: Path) -> None:
    """Returns where the data are those that a run began on, as far as it was noted then.

    Raises:
        UsageError: otherwise: its sites would hold other rows than they were charged for.
    """
    folder = Path(begun.data_folder) if begun.data_folder else None
    changed = None
    if begun.data_sha256 and digests.of_files(begun.data, folder) != begun.data_sha256:
        changed = str(folder)
    elif begun.examples_sha256 and (
        digests.of_examples(begun.data, folder) != begun.examples_sha256
    ):
        changed = f"what data set {begun.data.name!r} reads" + (f" in {folder}" if folder else "")
    if changed is not None:
        raise UsageError(
            f"{changed} has changed since the run in {out} began: put it back, or begin another "
            "run; nothing was charged"
        )


def where(experiment: Experiment, root: Path | None) -> Path | None:
    """Returns the folder or the file that holds the data, None where they are found by name."""
    settings = experiment.data
    if settings.file is None:
        folder = Path(settings.dir) if settings.dir else None
        if settings.name == "images" and folder is not None and not folder.is_dir():
            raise UsageError(f"no folder of images {folder}: correct --image-dir")
        return folder_of(settings.name, folder=folder, root=root)
    if not Path(settings.file).is_file():
        raise UsageError(f"no data file {settings.file}: correct --data-file")
    return Path(settings.file)


def _checked(experiment: Experiment, data: DataTerms, folder: Path | None) -> list[np.ndarray]:
    """Returns the training rows of each site; fails before anything is written, or not later."""
    privacy = experiment.privacy
    check_budget(privacy.epsilon, privacy.delta)
    if privacy.noise_multiplier is None and privacy.mechanism != "none":
        check_target(privacy.epsilon)
    devices.resolve(experiment.device)
    splits = load(data, folder)
    parts = _parts(experiment, splits)
    sizes = [nominal_size(len(part)) for part in parts]
    check_delta(privacy.delta, _protected(experiment, sizes))
    rate_of(privacy.batch, sizes)
    rehearse(experiment, data)
    return parts


def _parts(experiment: Experiment, splits: Splits) -> list[np.ndarray]:
    """Returns the training rows of each site."""
    return split(
        splits.train.targets,
        sites=experiment.sites,
        partition=experiment.data.partition,
        seed=experiment.seed,
        groups=splits.train.groups,
        persons=splits.train.persons,
    )


def _group_names(experiment: Experiment, splits: Splits) -> tuple[str, ...]:
    """Returns the sites' own names, or none where they are numbered."""
    partition = experiment.data.partition
    if partition.kind != "natural":
        return ()
    return group_names(splits.train.groups, sites=experiment.sites, partition=partition)


def _domain_facts(begun: Begun) -> dict[str, Any]:
    """Returns what makes a site's examples what they are: another value is another domain."""
    experiment, preparation = begun.experiment, begun.data.preparation
    partition = experiment.data.partition.model_dump(mode="json")
    if not partition["drop_small"]:
        del partition[
            "drop_small"
        ]  # domains that were counted before there was one keep their name
    facts = {
        "data": experiment.data.name,
        "partition": partition,
        "seed": experiment.seed,
        "sites": experiment.sites,
    }
    # Where rows of a person stay together, and which of them count, decides which a site holds.
    persons = preparation if isinstance(preparation, Table) else None
    chosen = {
        "data_sha256": begun.data_sha256,
        "examples_sha256": begun.examples_sha256,
        "rows_sha256": begun.rows_sha256,
        "group": persons and persons.group,
        "rows_per_group": persons and persons.rows_per_group,
    }
    return facts | {name: value for name, value in chosen.items() if value is not None}


def _privacy_terms(experiment: Experiment, sizes: list[int]) -> PrivacyTerms:
    privacy = experiment.privacy
    check_delta(privacy.delta, _protected(experiment, sizes))
    rate = rate_of(privacy.batch, sizes)
    if privacy.mechanism == "none":
        sigma = 0.0
    elif privacy.noise_multiplier is not None:
        sigma = privacy.noise_multiplier
    else:
        sigma = _calibrated(experiment, rate)
    return PrivacyTerms(
        mechanism=privacy.mechanism,
        randomness="seeded",
        unit="client" if privacy.mechanism == "user-level" else "example",
        sampling_rate=rate,
        noise_multiplier=sigma,
        clip_norm=privacy.clip_norm,
    )


def _protected(experiment: Experiment, sizes: list[int]) -> int:
    """Returns how many units one mechanism protects at the most: δ must be below one over it."""
    return experiment.sites if experiment.privacy.mechanism == "user-level" else max(sizes)


def _calibrated(experiment: Experiment, rate: float) -> float:
    """Returns σ for the target by PLD, and for the ceiling under the sites' filter."""
    privacy, ceiling = experiment.privacy, experiment.policy
    attempts = experiment.rounds + experiment.spare_attempts
    steps = attempts * experiment.training.local_steps
    if privacy.mechanism == "user-level":
        rate, steps = 1.0, attempts
    beside = entries.events_of_evaluations(
        experiment.evaluation, attempts=attempts, completed=experiment.rounds
    )
    domain = DomainPolicy(
        epsilon=ceiling.epsilon, delta=privacy.delta, composition=ceiling.composition
    )
    order = fixed_rule(domain).get("order")
    return noise_within(
        epsilon_target=privacy.epsilon,
        ceiling=None if order is None else (ceiling.epsilon, order),
        delta=privacy.delta,
        sampling_rate=rate,
        steps=steps,
        beside=beside,
    )
