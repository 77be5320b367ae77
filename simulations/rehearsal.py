"""Can a site train as an experiment asks? Tried on zeros, before a run is on disk."""

from __future__ import annotations

from bract.client.training.execution import Execution
from bract.client.training.trainer import Trainer
from bract.shared import contract
from bract.shared.configuration import parse
from bract.shared.contract import Contract
from bract.shared.terms import DataTerms, PrivacyTerms, SiteTerms
from bract.simulations.experiment import Experiment

_NO_KEY = "0" * 64


def rehearse(experiment: Experiment, data: DataTerms) -> None:
    """Returns where a site's trainer takes model, data, views and execution mode together.

    On the CPU, whatever the device: workers are forked, which no process is that began on a GPU.

    Raises:
        ModelRejected: where the model cannot be trained so with per-example privacy.
        UsageError: where the experiment asks for what does not go together.
    """
    execution = experiment.execution
    Trainer(
        _agreed(experiment, data),
        Execution(
            mode=execution.mode,
            physical_batch=execution.physical_batch,
            precision=execution.precision,
            noise_ahead=False,
        ),
    )


def _agreed(experiment: Experiment, data: DataTerms) -> Contract:
    """Returns a contract of one made-up site, that nobody signs: rate and noise are not tried."""
    mechanism = experiment.privacy.mechanism
    privacy = PrivacyTerms(
        mechanism=mechanism,
        randomness="seeded",
        unit="client" if mechanism == "user-level" else "example",
        sampling_rate=1.0,
        noise_multiplier=0.0 if mechanism == "none" else 1.0,
        clip_norm=experiment.privacy.clip_norm,
    )
    terms = {
        "run": experiment.name,
        "nonce": contract.new_nonce(),
        "coordinator": _NO_KEY,
        "simulation": True,
        "rounds": experiment.rounds,
        "max_attempts": experiment.rounds,
        "model": experiment.model,
        "data": data,
        "training": experiment.training,
        "privacy": privacy,
        "evaluation": experiment.evaluation,
        "cohort": (SiteTerms(name="site", key=_NO_KEY, domain="rehearsal", nominal_size=1),),
    }
    return parse(Contract, terms, source=f"experiment {experiment.name!r}")
