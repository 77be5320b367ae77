"""The audit of a mechanism: its contracts, its tests, and what they come to."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bract.client.training import admission
from bract.shared import canonical, models, versions
from bract.shared.audits import FoundRate, MechanismAudit, MechanismCheck, MechanismParameters
from bract.shared.data import load_part
from bract.shared.errors import BractError, ModelRejected, UsageError
from bract.shared.privacy import accounting
from bract.shared.privacy.events import PoissonGaussian
from bract.simulations import simulation
from bract.simulations.audits import bounds, checks, estimates, proposal, register, trial
from bract.simulations.audits.checks import Check
from bract.simulations.audits.estimates import Parameters
from bract.simulations.audits.proposal import Subject
from bract.simulations.audits.settings import CONFIDENCES, DELTA, Suite
from bract.simulations.audits.trial import Trial
from bract.simulations.experiment import Experiment

AUDIT = "audit.json"
_IN_MEMORY = Path("/dev/shm")  # noqa: S108  with a name of its own in it
_NOISE = {
    True: "that a site runs this code, with noise that no one knows: a simulation seeds it",
    False: "that a site elsewhere runs this code, or that no one knows its noise",
}
NOT_CHECKED = [
    "attacks by floating-point arithmetic and by timing, which are mitigated and not excluded",
    "momentum and other steps of a server: they are done to what was noised already",
    "the true data of any site: canaries are made of public or made-up examples",
    "epsilon itself: a lower bound says nothing of what lies above it",
]


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """What an audit found.

    Attributes:
        trials: the contracts, by the name of their setting.
        checks: every test.
        recovered: the parameters by moments.
    """

    trials: dict[str, Trial]
    checks: list[Check]
    recovered: Parameters

    @property
    def failed(self) -> list[Check]:
        """The tests that failed."""
        return checks.failed(self.checks)

    @property
    def told(self) -> bounds.Told:
        """Who was told apart in the contract `main`."""
        main = self.trials["main"]
        return bounds.told(main.setting, estimates.scored(main))

    @property
    def epsilon_ledger(self) -> float:
        """What the dearest ledger of the contract `main` says."""
        spent = {answers.events for answers in self.trials["main"].sites}
        return max(accounting.epsilon(events, DELTA) for events in spent)


def subject_of(chosen: Experiment, data_dir: Path | None, *, made_up: bool) -> Subject:
    """Returns what an experiment trains, on public data alone.

    Files of one's own may be private: their canaries are made up, in the shape of the data.

    Raises:
        UsageError: for a mechanism that the audit has no tests for.
    """
    if chosen.privacy.mechanism != "dp-sgd":
        raise UsageError(
            f"experiment {chosen.name!r} has the mechanism {chosen.privacy.mechanism!r}, and this "
            "audit tests 'dp-sgd' alone: name an experiment with it, or leave privacy.mechanism"
        )
    settings = chosen.data
    own_files = settings.file is not None or settings.dir is not None or ":" in settings.name
    where = simulation.where(chosen, data_dir)
    return Subject(
        model=chosen.model,
        data=settings.terms(where),
        folder=where.resolve() if where else None,
        made_up=made_up or own_files,
    )


def admit(subject: Subject, suite: Suite) -> None:
    """Returns where a register can stand beside the model, and the data are there.

    Raises:
        ModelRejected: with the reason.
        UsageError: where the data are not on this machine.
    """
    admission.admit(
        models.of(subject.model, subject.data), data=subject.data, name=subject.model.name
    )
    main = suite.main
    data = proposal.data_of(main, subject, seed=0)
    load_part(data, subject.folder, "0")
    terms = register.model_terms(subject.model, subject.data, rows=main.rows, strength=1.0)
    try:
        admission.admit(models.of(terms, data), data=data, name=subject.model.name)
    except BractError as error:
        raise ModelRejected(
            f"no canary register can stand beside the model {subject.model.name!r}: {error}"
        ) from error


def audit(subject: Subject, suite: Suite, *, seed: int, folder: Path | None = None) -> Findings:
    """Returns what an audit of a model's private training finds.

    Args:
        subject: the model, and public data.
        suite: the contracts.
        seed: of canaries, batches and noise.
        folder: keeps keys and ledgers; thrown away where it is None.
    """
    with tempfile.TemporaryDirectory(dir=_memory()) as thrown_away:
        kept = folder or Path(thrown_away)
        trials: dict[str, Trial] = {
            setting.name: trial.run(setting, subject, seed=seed, folder=kept)
            for setting in suite.settings
        }
    return found(trials)


def _memory() -> Path | None:
    """Returns where files lie in memory: what is thrown away need not be durable."""
    return _IN_MEMORY if _IN_MEMORY.is_dir() and os.access(_IN_MEMORY, os.W_OK) else None


def found(trials: dict[str, Trial]) -> Findings:
    """Returns what the contracts of an audit come to."""
    main = trials["main"]
    tests = checks.every(trials)
    told = bounds.told(main.setting, estimates.scored(main))
    ledgers = {answers.events for answers in main.sites}
    p = min(bounds.falsification(told, events) for events in ledgers) * len(ledgers)
    given = "scores by the claimed q, C, σ"
    tests.append(Check("the ledger's trade-off curve", "main", "all", given, min(1.0, p)))
    return Findings(trials, tests, estimates.recover(main, trials["steps"]))


def report(
    findings: Findings, subject: Subject, *, experiment: str, seed: int, started: float
) -> MechanismAudit:
    """Returns what an audit leaves behind.

    Args:
        findings: of the audit.
        subject: what was audited.
        experiment: its name.
        seed: of the audit.
        started: by the monotonic clock.
    """
    main, steps = (findings.trials[name].setting for name in ("main", "steps"))
    told, failed = findings.told, {check.key for check in findings.failed}
    by_confidence = {f"{c:.5g}": bounds.lower_bounds(told, c) for c in CONFIDENCES}
    rounds = max((len(answers.bank) for answers in findings.trials["main"].sites), default=0)
    ledger = findings.epsilon_ledger
    return MechanismAudit(
        experiment=experiment,
        model=subject.model.name,
        data=subject.data.name,
        made_up=subject.made_up,
        grid="in-process" if _is_simulated(findings) else "loopback",
        passed=not failed,
        recovered=MechanismParameters(**asdict(findings.recovered)),
        recovered_error=MechanismParameters(
            **asdict(estimates.error(findings.trials["main"], findings.trials["steps"]))
        ),
        claimed=MechanismParameters(
            noise_multiplier=main.noise_multiplier,
            clip_norm=main.clip_norm,
            sampling_rate=main.sampling_rate,
            steps=steps.local_steps,
        ),
        p_values={check.key: check.p for check in findings.checks},
        checks=[
            MechanismCheck(**asdict(check), passed=check.key not in failed)
            for check in findings.checks
        ],
        failed=sorted(failed),
        threshold=checks.threshold(findings.checks),
        epsilon_ledger=canonical.finite(ledger),
        epsilon_claimed=accounting.epsilon(findings.trials["main"].claimed(main.rounds), DELTA),
        epsilon_recovered=_epsilon_recovered(findings.recovered, rounds),
        epsilon_lower={
            method: {c: values[method] for c, values in by_confidence.items()}
            for method in next(iter(by_confidence.values()))
        },
        delta=DELTA,
        true_positive_rates=[FoundRate(**asdict(rate)) for rate in bounds.rates(told)],
        canaries=main.canaries,
        sites=main.sites,
        rounds=main.rounds,
        seed=seed,
        seconds=time.monotonic() - started,
        not_checked=[_NOISE[_is_simulated(findings)], *NOT_CHECKED],
        versions=versions.installed(),
    )


def _is_simulated(findings: Findings) -> bool:
    signed = findings.trials["main"].signed
    return signed is None or signed.contract.simulation


def save(found: MechanismAudit, findings: Findings, out: Path) -> None:
    """Writes audit.json, which a report reads, and the contract that pins the ledgers' keys."""
    canonical.write_atomically(out / AUDIT, canonical.encode(found.model_dump(mode="json")))
    signed = findings.trials["main"].signed
    if signed is not None:
        canonical.write_atomically(out / "contract.json", signed.to_bytes())


def _epsilon_recovered(recovered: Parameters, rounds: int) -> float | None:
    sigma, rate = recovered.noise_multiplier, recovered.sampling_rate
    if not sigma or rate is None or rounds == 0 or not 0 < rate <= 1 or sigma < 0.3:
        return None
    # rounded, so that as good as equal parameters are accounted once
    event = PoissonGaussian(max(1e-3, round(rate, 3)), round(sigma, 3), rounds)
    return accounting.epsilon([event], DELTA)
