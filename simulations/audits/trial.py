"""Runs an audit's contracts through the whole client path, and keeps what the sites released.

The auditor is coordinator and server. It signs the contract, sends the same public weights in
every round, and looks at what each site answers before anything is averaged. The sites are those
of a simulation: gate, ledger, ClientApp, trainer and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from bract.client.app import app as client_app
from bract.shared import arrays, canonical, contract, keys, models, wire
from bract.shared.arrays import Arrays
from bract.shared.contract import (
    Contract,
    DataTerms,
    ModelTerms,
    PrivacyTerms,
    SignedContract,
    SiteTerms,
    TrainingTerms,
)
from bract.shared.data import load_part
from bract.shared.errors import VerificationFailed
from bract.shared.privacy.events import Event, PoissonGaussian
from bract.shared.privacy.ledger import Ledger
from bract.simulations.audits import gradients, register
from bract.simulations.audits.settings import DELTA, Setting
from bract.simulations.experiment import ExecutionSettings, PolicySettings
from bract.simulations.grid import LocalGrid
from bract.simulations.sites import Plan, node_config
from bract.simulations.state import State

_LOOKED_AT = 64  # examples whose gradients are measured beforehand
_CEILING = 1e4  # the audit domain holds made-up or public data: its ε is counted, not kept small
LEARNING_RATE = 1.0
BLANK = "blank"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is audited: a model and the public data that canaries are made of.

    `made_up` says that canaries are random numbers in the shape of the data.
    """

    model: ModelTerms
    data: DataTerms
    folder: Path | None = None
    made_up: bool = False


@dataclass(slots=True, eq=False)
class Answers:
    """What one site released over the rounds of a contract, in units of the clip norm.

    Attributes:
        bank: (rounds, rows + 1): what a round added to each coordinate of the register.
        tensors: each round's whole release, kept where it is looked at tensor by tensor.
        faults: what was wrong with answers: a refusal, an array too many.
        events: what the site's ledger was charged.
    """

    site: str
    bank: list[npt.NDArray[np.float64]] = field(default_factory=list)
    tensors: list[dict[str, npt.NDArray[np.float64]]] = field(default_factory=list)
    silent: int = 0
    faults: list[str] = field(default_factory=list)
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One contract of an audit, as it went.

    Attributes:
        included: by site, which canaries are in.
        sites: the answers of the sites with canaries.
        blank: those of the site without any gradient.
        expected: of a contract with q = 1, what one round's release is without noise.
    """

    setting: Setting
    included: list[npt.NDArray[np.bool_]]
    sites: list[Answers]
    blank: Answers | None
    expected: gradients.Sums | None = None

    def claimed(self, rounds: int) -> tuple[Event, ...]:
        """Returns what so many rounds cost by the contract, in the form of a ledger's events."""
        if rounds == 0:
            return ()
        setting = self.setting
        steps = rounds * setting.local_steps
        return (PoissonGaussian(setting.sampling_rate, setting.noise_multiplier, steps),)


def run(setting: Setting, subject: Subject, *, seed: int, folder: Path) -> Trial:
    """Returns what the sites of one contract released.

    Args:
        setting: the contract's terms and sizes.
        subject: the audited model and its public data.
        seed: decides which canaries are in, and the sites' sampling and noise.
        folder: of this audit alone; holds keys and ledgers, over its contracts.
    """
    if setting.strength is None:
        setting = replace(setting, strength=_own_strength(subject))
    state = State.under(folder)
    state.prepare()
    plan, path = _plan(setting, subject, state, seed=seed)
    signed = _contract(setting, subject, plan, state)
    weights = gradients.start(signed.contract.model, signed.contract.data)
    names = [plan.name_of(place) for place in range(plan.sites)]
    nodes = [node_config(path, place) for place in range(plan.sites)]
    grid = LocalGrid(client_app, nodes, workers=1)
    try:
        answers = collect(grid, signed, weights, names, setting)
    finally:
        grid.close()
    for answer in answers:
        answer.events = charged(plan, state, answer.site)
    return Trial(
        setting=setting,
        included=[register.included(seed, site, setting.canaries) for site in range(setting.sites)],
        sites=answers[: setting.sites],
        blank=answers[setting.sites] if setting.blank_rounds else None,
        expected=_expected(setting, signed.contract, subject.folder)
        if setting.sampling_rate == 1.0
        else None,
    )


def collect(
    grid: Grid, signed: SignedContract, weights: Arrays, names: Sequence[str], setting: Setting
) -> list[Answers]:
    """Returns the answers of every site to every round, through any grid.

    Args:
        grid: its nodes are the sites, in their order.
        signed: the contract.
        weights: sent in each round.
        names: of the sites.
        setting: the rounds, and which answers are kept whole.
    """
    agreed, packed = signed.contract, wire.pack(weights)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    nodes = dict(zip(sorted(grid.get_node_ids()), names, strict=True))
    found = {name: Answers(name) for name in names}
    for number in range(1, setting.rounds + 1):
        asked = [node for node, name in nodes.items() if _asked(name, names, setting, number)]
        content = wire.encode_order(wire.TrainOrder(signed, number, {}), packed=packed)
        messages = [
            Message(content, node, MessageType.TRAIN, group_id=str(number)) for node in asked
        ]
        replies = {m.metadata.src_node_id: m for m in grid.send_and_receive(messages)}
        for node in asked:
            answer, terms = found[nodes[node]], agreed.site(nodes[node])
            assert terms is not None  # noqa: S101  the auditor wrote the contract
            try:
                update = _update(replies.get(node), shapes, agreed, terms, number)
            except VerificationFailed as error:
                answer.faults.append(f"round {number}: {error}")
                continue
            _keep_(answer, update, setting)
    return list(found.values())


def _asked(name: str, names: Sequence[str], setting: Setting, number: int) -> bool:
    is_blank = names.index(name) >= setting.sites
    return number <= (setting.blank_rounds if is_blank else setting.rounds)


def _update(
    message: Message | None,
    shapes: dict[str, tuple[int, ...]],
    agreed: Contract,
    terms: SiteTerms,
    number: int,
) -> Arrays:
    """Returns a round's update where the message holds that, a receipt for it, and nothing else.

    Raises:
        VerificationFailed: otherwise.
    """
    if message is None or message.has_error():
        raise VerificationFailed("no answer")
    reply = wire.decode_reply(message.content)
    if isinstance(reply, wire.RefusalReply):
        raise VerificationFailed(f"refused, {reply.reason.value}")
    reply.verify(terms.key)
    if (reply.receipt.contract, reply.receipt.round) != (agreed.sha256, number):
        raise VerificationFailed("an answer to another order")
    fault = arrays.fault(reply.update.arrays, shapes)
    if fault:
        raise VerificationFailed(fault)
    return reply.update.arrays


def _keep_(answer: Answers, update: Arrays, setting: Setting) -> None:
    unit = setting.normaliser / (LEARNING_RATE * setting.clip_norm)
    answer.silent += not any(value.any() for value in update.values())
    answer.bank.append(update[register.BANK][:, 0].astype(np.float64) * unit)
    whole = setting.name == "joint" or answer.site == BLANK
    if whole:
        answer.tensors.append({k: v.astype(np.float64) * unit for k, v in update.items()})


def charged(plan: Plan, state: State, site: str) -> tuple[Event, ...]:
    """Returns what a site's ledger was charged for a contract; chain and signatures are held."""
    ledger, key = Ledger(state.ledger(site, plan.sites)), keys.load(state.key(site)).public
    try:
        with ledger.transaction() as transaction:
            return transaction.chain(site, plan.domain_of(site), key=key).events
    finally:
        ledger.close()


def _own_strength(subject: Subject) -> float:
    """Returns the size of the model's own gradients, for a register that stands among them."""
    model = subject.model.model_dump_json()
    return _typical_norm(model, subject.data, subject.folder, subject.made_up)


@lru_cache(maxsize=4)
def _typical_norm(model: str, data: DataTerms, folder: Path | None, made_up: bool) -> float:
    canaries = register.data(
        base=data.model_dump_json(), canaries=_LOOKED_AT, sites=1, made_up=made_up
    )
    terms = ModelTerms.model_validate_json(model)
    return gradients.typical_norm(terms, data, canaries.examples(folder, 0))


def _expected(setting: Setting, agreed: Contract, folder: Path | None) -> gradients.Sums:
    """Returns what one round with every example releases, without noise, in units of C."""
    held = load_part(agreed.data, folder, "0")
    sums = gradients.clipped_sums(
        agreed.model,
        agreed.data,
        gradients.start(agreed.model, agreed.data),
        held,
        setting.clip_norm,
    )
    return {name: -value for name, value in sums.items()}  # a step goes down


def _plan(setting: Setting, subject: Subject, state: State, *, seed: int) -> tuple[Plan, Path]:
    """Returns the plan that the nodes open their sites by, and its file."""
    count = setting.sites + (1 if setting.blank_rounds else 0)
    names = (*(f"canary-{site}" for site in range(setting.sites)), BLANK)[:count]
    folder = state.private / setting.name
    folder.mkdir()
    rows = np.arange(count * setting.canaries)
    np.savez(folder / "rows.npz", rows=rows, cuts=np.arange(1, count) * setting.canaries)
    plan = Plan(
        data=register.data_terms(
            subject.data,
            canaries=setting.canaries,
            void=setting.void,
            sites=setting.sites,
            seed=seed,
            made_up=subject.made_up,
        ),
        data_folder=str(subject.folder) if subject.folder else None,
        rows=str(folder / "rows.npz"),
        ledgers=str(state.ledgers),
        private=str(state.private),
        domain=f"audit.{setting.name}",
        sites=count,
        site_names=names,
        seed=seed,
        coordinator=keys.load_or_generate(state.key("coordinator")).public,
        model=register.MODEL,
        mechanism="dp-sgd",
        delta=DELTA,
        policy=PolicySettings(epsilon=_CEILING),
        device="cpu",
        execution=ExecutionSettings(),
    )
    path = folder / "plan.json"
    canonical.write_atomically(path, plan.model_dump_json().encode())
    return plan, path


def _contract(setting: Setting, subject: Subject, plan: Plan, state: State) -> SignedContract:
    assert setting.strength is not None  # noqa: S101  `run` has set it
    cohort = tuple(
        SiteTerms(
            name=name,
            key=keys.load_or_generate(state.key(name)).public,
            domain=plan.domain_of(name),
            nominal_size=setting.canaries,
        )
        for name in plan.site_names
    )
    model = register.model_terms(
        subject.model, subject.data, rows=setting.rows, strength=setting.strength
    )
    agreed = Contract(
        run=f"audit-{setting.name}",
        nonce=contract.new_nonce(),
        coordinator=plan.coordinator,
        simulation=True,
        rounds=setting.rounds,
        max_attempts=setting.rounds,
        model=models.pinned(model, plan.data),
        data=plan.data,
        training=TrainingTerms(local_steps=setting.local_steps, learning_rate=LEARNING_RATE),
        privacy=PrivacyTerms(
            randomness="seeded",
            sampling_rate=setting.sampling_rate,
            noise_multiplier=setting.noise_multiplier,
            clip_norm=setting.clip_norm,
        ),
        cohort=cohort,
    )
    return contract.sign(agreed, keys.load(state.key("coordinator")))
