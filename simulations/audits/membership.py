"""Membership inference on what an experiment releases: on public data, with privacy and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bract.shared.data.examples import Examples
from bract.shared.errors import UsageError
from bract.shared.evaluation import Evaluator
from bract.shared.reports.audits import AttackCurve, Figure, Membership, MembershipAttack
from bract.shared.trained import Trained
from bract.simulations import experiment as experiments
from bract.simulations.audits import references, roc
from bract.simulations.audits.likelihood import ratios
from bract.simulations.audits.roc import Curve, Floats, Interval
from bract.simulations.experiment import Experiment

# Published by others, and held against a hash where they are read.
PUBLIC: Final = ("digits", "fashion-mnist", "heart-disease", "shakespeare", "sst2")
CHEAP_MODELS: Final = ("linear",)
MODELS: Final = 32
LEAST_MODELS: Final = 8
MEANING: Final = (
    "How well these attacks told the examples that a model was trained on from others. They are "
    "few attacks among many: a figure near 0.5 shows that they failed here, and neither that "
    "others would fail nor that the model is private. That is what the ledgers' ε bounds, for "
    "every attack."
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to attack: an experiment as it is, the same without privacy, and how many references."""

    private: Experiment
    unprotected: Experiment
    models: int
    data_dir: Path | None = None
    workers: int = 1


def planned(name: str, *, settings: tuple[str, ...], models: int | None, **how: Any) -> Plan:
    """Returns the plan of an audit; nothing is trained.

    Args:
        name: an experiment's name or file.
        settings: `key=value`, as `bract simulate --set` takes them.
        models: how many reference models; None: as many as are cheap, which may be none.
        how: `data_dir` and `workers` of the plan.

    Raises:
        UsageError: for private data, or for what cannot be attacked so.
    """
    if Path(name).is_dir():
        raise UsageError(
            f"{name} is a run folder: a membership audit of what it trained on would be an exact "
            "statistic of private examples, which no budget covers; name an experiment on public "
            f"data ({', '.join(PUBLIC)})"
        )
    private = experiments.load(name, model=None, overrides={}, settings=settings)
    if private.data.name not in PUBLIC:
        raise UsageError(
            f"data {private.data.name!r} are not known to be public: a membership audit is an "
            "exact statistic of its members, which no budget covers; name an experiment on "
            f"{', '.join(PUBLIC)}"
        )
    if private.privacy.mechanism == "none":
        raise UsageError(f"experiment {name!r} has no privacy to audit: leave privacy.mechanism")
    plain = experiments.load(
        name, model=None, overrides={}, settings=[*settings, "privacy.mechanism=none"]
    )
    return Plan(private, plain, models=_references(private, models), **how)


def audit(plan: Plan, told: Callable[[], None] = lambda: None) -> Membership:
    """Returns what the attacks reached.

    Args:
        plan: as `planned` returns it.
        told: is called after each model that was trained.
    """
    pool = references.pooled(plan.private, plan.data_dir)
    if plan.models and not pool.of_classes:
        raise UsageError(
            "reference models attack models of classes alone: --models 0 leaves the attack by loss"
        )
    (made, summary), (plain, _) = (
        references.audited(one, plan.data_dir) for one in (plan.private, plan.unprotected)
    )
    attacks = [_by_loss(pool, made, plain)]
    if plan.models:
        attacks.append(_by_references(plan, pool, told))
    return Membership(
        experiment=plan.private.name,
        data=plan.private.data.name,
        model=plan.private.model.name,
        rounds=summary.rounds,
        sites=summary.sites,
        epsilon=summary.epsilon,
        delta=summary.delta,
        attacks=attacks,
        meaning=MEANING,
    )


def _references(private: Experiment, models: int | None) -> int:
    if models is None:
        return MODELS if private.model.name in CHEAP_MODELS else 0
    if models and models < LEAST_MODELS:
        raise UsageError(
            f"--models {models} are too few to learn from: {LEAST_MODELS} at the least, or 0 for "
            "the attack by loss alone"
        )
    return models


def _by_loss(pool: references.Pooled, made: Trained, plain: Trained) -> MembershipAttack:
    """Attacks two models by their loss alone (Yeom et al. 2018, arXiv 1709.01604)."""
    splits = pool.splits
    members, others = splits.train.take(pool.rows), (splits.validation, splits.test)
    curves = []
    for model in (made, plain):
        of_others = np.concatenate([_negative_losses(model, part) for part in others])
        curves.append(roc.of_one_model(_negative_losses(model, members), of_others))
    return MembershipAttack(
        attack="loss",
        models=1,
        members=len(members),
        non_members=sum(map(len, others)),
        private=_shown(curves[0]),
        unprotected=_shown(curves[1]),
    )


def _by_references(
    plan: Plan, pool: references.Pooled, told: Callable[[], None]
) -> MembershipAttack:
    """Attacks models that were trained on random halves, each by all of the others."""
    seed = plan.private.seed
    # A coin for each model and example, and the same ones with privacy as without.
    coins = np.random.default_rng([seed, 2112]).integers(0, 2, (plan.models, len(pool.rows)))
    member = coins.astype(bool)
    curves = []
    for one in (plan.private, plan.unprotected):
        found = references.confidences(
            one, pool, member, data_dir=plan.data_dir, workers=plan.workers, told=told
        )
        curves.append(roc.of_many_models(ratios(found, member), member, seed=seed))
    return MembershipAttack(
        attack="reference models",
        models=plan.models,
        members=int(member.any(axis=0).sum()),
        non_members=int((~member).any(axis=0).sum()),
        private=_shown(curves[0]),
        unprotected=_shown(curves[1]),
    )


def _negative_losses(model: Trained, examples: Examples) -> Floats:
    _, losses = Evaluator(model.model, model.contract.data).each(model.weights, examples)
    return -losses.astype(np.float64)


def _shown(curve: Curve) -> AttackCurve:
    return AttackCurve(
        auc=_figure(curve.area),
        true_positive_rates={f"{rate:g}": _figure(one) for rate, one in curve.rates.items()},
        roc=list(curve.points),
    )


def _figure(interval: Interval) -> Figure:
    return Figure(value=interval.value, low=interval.low, high=interval.high)
