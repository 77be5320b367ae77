"""The contracts of an audit: an experiment's model beside its register, on public canaries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from bract.shared import contract, models
from bract.shared.contract import Contract, SignedContract
from bract.shared.keys import SigningKey
from bract.shared.terms import DataTerms, ModelTerms, PrivacyTerms, SiteTerms, TrainingTerms
from bract.simulations.audits import gradients, register
from bract.simulations.audits.settings import Setting

LEARNING_RATE = 1.0
_LOOKED_AT = 64  # examples whose gradients are measured beforehand


@dataclass(frozen=True, slots=True)
class Subject:
    """What is audited: a model and the public data that canaries are made of.

    `made_up` says that canaries are random numbers in the shape of the data.
    """

    model: ModelTerms
    data: DataTerms
    folder: Path | None = None
    made_up: bool = False


def settled(setting: Setting, subject: Subject) -> Setting:
    """Returns a setting whose register has a strength: the model's own where none was given."""
    if setting.strength is not None:
        return setting
    model = subject.model.model_dump_json()
    own = _typical_norm(model, subject.data, subject.folder, subject.made_up)
    return replace(setting, strength=own)


def data_of(setting: Setting, subject: Subject, *, seed: int) -> DataTerms:
    """Returns the terms of a setting's canaries.

    Args:
        setting: how many there are.
        subject: what they are made of.
        seed: decides which of them are in.
    """
    return register.data_terms(
        subject.data,
        canaries=setting.canaries,
        void=setting.void,
        sites=setting.sites,
        seed=seed,
        made_up=subject.made_up,
    )


def propose(
    setting: Setting,
    subject: Subject,
    *,
    seed: int,
    cohort: Iterable[SiteTerms],
    key: SigningKey,
    simulation: bool,
) -> SignedContract:
    """Returns the contract of a setting, signed.

    Args:
        setting: a settled one.
        subject: what is audited.
        seed: decides which canaries are in.
        cohort: the sites, all of one nominal size.
        key: the coordinator's.
        simulation: whether the sites seed their noise.
    """
    if setting.strength is None:
        raise ValueError("a setting is settled before it is proposed")
    model = register.model_terms(
        subject.model, subject.data, rows=setting.rows, strength=setting.strength
    )
    data = data_of(setting, subject, seed=seed)
    agreed = Contract(
        run=f"audit-{setting.name}",
        nonce=contract.new_nonce(),
        coordinator=key.public,
        simulation=simulation,
        rounds=setting.rounds,
        max_attempts=setting.rounds,
        model=models.pinned(model, data),
        data=data,
        training=TrainingTerms(local_steps=setting.local_steps, learning_rate=LEARNING_RATE),
        privacy=PrivacyTerms(
            randomness="seeded" if simulation else "csprng",
            sampling_rate=setting.sampling_rate,
            noise_multiplier=setting.noise_multiplier,
            clip_norm=setting.clip_norm,
        ),
        cohort=tuple(cohort),
    )
    return contract.sign(agreed, key)


@lru_cache(maxsize=4)
def _typical_norm(model: str, data: DataTerms, folder: Path | None, made_up: bool) -> float:
    canaries = register.data(
        base=data.model_dump_json(), canaries=_LOOKED_AT, sites=1, made_up=made_up
    )
    terms = ModelTerms.model_validate_json(model)
    return gradients.typical_norm(terms, data, canaries.examples(folder, 0))
