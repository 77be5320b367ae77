"""Runs an audit's contracts through the whole client path, and keeps what the sites released.

The auditor is coordinator and server. It signs the contract, sends the same public weights in
every round, and looks at what each site answers before anything is averaged. The sites are those
of a simulation: gate, ledger, ClientApp, trainer and noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from bract.client.app import app as client_app
from bract.shared import arrays, canonical, keys, packing, wire
from bract.shared.arrays import Arrays
from bract.shared.contract import Contract, SignedContract
from bract.shared.data import load_part
from bract.shared.errors import VerificationFailed
from bract.shared.messages import RefusalReply, TrainOrder
from bract.shared.privacy.events import Event, PoissonGaussian
from bract.shared.privacy.ledger import Ledger
from bract.shared.terms import SiteTerms
from bract.simulations.audits import gradients, proposal, register
from bract.simulations.audits.proposal import Subject
from bract.simulations.audits.settings import DELTA, Setting
from bract.simulations.experiment import ExecutionSettings, PolicySettings
from bract.simulations.grid import LocalGrid
from bract.simulations.sites import Plan, node_config
from bract.simulations.state import State

CEILING = 1e4  # the audit domain holds made-up or public data: its ε is counted, not kept small
BLANK = "blank"


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
        signed: the contract.
    """

    setting: Setting
    included: list[npt.NDArray[np.bool_]]
    sites: list[Answers]
    blank: Answers | None
    expected: gradients.Sums | None = None
    signed: SignedContract | None = None

    def claimed(self, rounds: int) -> tuple[Event, ...]:
        """Returns what so many rounds cost by the contract, in the form of a ledger's events."""
        if rounds == 0:
            return ()
        setting = self.setting
        steps = rounds * setting.local_steps
        return (PoissonGaussian(setting.sampling_rate, setting.noise_multiplier, steps),)


def run(setting: Setting, subject: Subject, *, seed: int, folder: Path) -> Trial:
    """Returns what the simulated sites of one contract released.

    Args:
        setting: the contract's terms and sizes.
        subject: the audited model and its public data.
        seed: decides which canaries are in, and the sites' sampling and noise.
        folder: of this audit alone; holds keys and ledgers, over its contracts.
    """
    setting, state = proposal.settled(setting, subject), State.under(folder)
    state.prepare()
    plan, path = _plan(setting, subject, state, seed=seed)
    terms = {name: _terms(plan, state, name, setting) for name in plan.site_names}
    signed = proposal.propose(
        setting,
        subject,
        seed=seed,
        cohort=terms.values(),
        key=keys.load(state.key("coordinator")),
        simulation=True,
    )
    nodes = [node_config(path, place) for place in range(plan.sites)]
    grid = LocalGrid(client_app, nodes, workers=1)
    try:
        known = dict(zip(sorted(grid.get_node_ids()), plan.site_names, strict=True))
        answers = collect(grid, known, signed, setting)
    finally:
        grid.close()
    for answer in answers:
        answer.events = charged(
            state.ledger(answer.site, many=plan.many), terms[answer.site], signed.contract
        )
    return completed(setting, subject, signed, answers, seed=seed)


def completed(
    setting: Setting,
    subject: Subject,
    signed: SignedContract,
    answers: Sequence[Answers],
    *,
    seed: int,
) -> Trial:
    """Returns a contract as it went, with what the auditor knows of it.

    Args:
        setting: its terms.
        subject: what was audited.
        signed: the contract.
        answers: by site, in the contract's order.
        seed: decided which canaries were in.
    """
    whole = setting.sampling_rate == 1.0
    return Trial(
        setting=setting,
        signed=signed,
        included=[register.included(seed, site, setting.canaries) for site in range(setting.sites)],
        sites=list(answers[: setting.sites]),
        blank=answers[setting.sites] if setting.blank_rounds else None,
        expected=_expected(setting, signed.contract, subject.folder) if whole else None,
    )


def collect(
    grid: Grid, nodes: Mapping[int, str], signed: SignedContract, setting: Setting
) -> list[Answers]:
    """Returns the answers of every site to every round, through any grid.

    Args:
        grid: carries the messages.
        nodes: the site of each node; those of the contract are asked.
        signed: the contract.
        setting: its rounds, and which answers are kept whole.
    """
    agreed = signed.contract
    weights = gradients.start(agreed.model, agreed.data)
    packed = packing.pack(weights)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    node_of = {name: node for node, name in nodes.items()}
    found = {terms.name: Answers(terms.name) for terms in agreed.cohort}
    for number in range(1, setting.rounds + 1):
        asked = {
            node_of[terms.name]: terms
            for terms in agreed.cohort
            if terms.name != BLANK or number <= setting.blank_rounds
        }
        content = wire.encode_order(TrainOrder(signed, number, {}), packed=packed)
        messages = [
            Message(content, node, MessageType.TRAIN, group_id=str(number)) for node in asked
        ]
        replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages)}
        for node, terms in asked.items():
            answer = found[terms.name]
            try:
                update = _update(replies.get(node), shapes, agreed, terms, number)
            except VerificationFailed as error:
                answer.faults.append(f"round {number}: {error}")
                continue
            _keep_(answer, update, setting)
    return list(found.values())


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
    if isinstance(reply, RefusalReply):
        raise VerificationFailed(f"refused, {reply.reason.value}")
    reply.verify(terms.key)
    if (reply.receipt.contract, reply.receipt.round) != (agreed.sha256, number):
        raise VerificationFailed("an answer to another order")
    fault = arrays.fault(reply.update.arrays, shapes)
    if fault:
        raise VerificationFailed(fault)
    return reply.update.arrays


def _keep_(answer: Answers, update: Arrays, setting: Setting) -> None:
    unit = setting.normaliser / (proposal.LEARNING_RATE * setting.clip_norm)
    answer.silent += not any(value.any() for value in update.values())
    answer.bank.append(update[register.bank_of(update)][:, 0].astype(np.float64) * unit)
    whole = setting.name == "joint" or answer.site == BLANK
    if whole:
        answer.tensors.append({k: v.astype(np.float64) * unit for k, v in update.items()})


def charged(path: Path, terms: SiteTerms, agreed: Contract) -> tuple[Event, ...]:
    """Returns what a site's ledger was charged for a contract; chain and signatures are held."""
    ledger = Ledger(path)
    try:
        with ledger.transaction() as transaction:
            chain = transaction.chain(terms.name, terms.domain, key=terms.key)
            return chain.events_of(agreed.sha256)
    finally:
        ledger.close()


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
        data=proposal.data_of(setting, subject, seed=seed),
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
        policy=PolicySettings(epsilon=CEILING),
        device="cpu",
        execution=ExecutionSettings(),
    )
    path = folder / "plan.json"
    canonical.write_atomically(path, plan.model_dump_json().encode())
    return plan, path


def _terms(plan: Plan, state: State, name: str, setting: Setting) -> SiteTerms:
    return SiteTerms(
        name=name,
        key=keys.load_or_generate(state.key(name)).public,
        domain=plan.domain_of(name),
        nominal_size=setting.canaries,
    )
