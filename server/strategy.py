"""Federated averaging with public weights, on Flower's FedAvg."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from bract.server.grid import SingleRunGrid
from bract.server.witnesses import WitnessDesk
from bract.shared import arrays as named
from bract.shared import canonical, packing, wire
from bract.shared.arrays import Array, Arrays
from bract.shared.contract import Contract, SignedContract
from bract.shared.errors import BractError, Reason, RolledBack, VerificationFailed
from bract.shared.messages import (
    CloseOrder,
    RefusalReply,
    SignedReceipt,
    SummedReply,
    TrainOrder,
    TrainReply,
)
from bract.shared.models import Shape
from bract.shared.privacy.receipts import Receipt, Received
from bract.shared.privacy.witness import NOTHING, Extension
from bract.shared.terms import SiteTerms
from bract.shared.updates import KINDS, Update

logger = logging.getLogger("bract.server")

INVALID_UPDATE = "invalid-update"
FAILED = "node-failed"
_FINAL = frozenset(reason.value for reason in Reason if reason.final)
# How far beyond its expectation the norm of an honest update may be; see greatest_norm.
NORM_SLACK = 10.0


class PublicFedAvg(FedAvg):
    """FedAvg (McMahan et al. 2017, arXiv 1602.05629) whose weights stand in the contract.

    A true number of examples would be an exact count of private data; the nominal size is public.
    What arrives are differences of weights; `aggregate_train` averages those.

    Args:
        signed: the contract that every message carries.
        shapes: names and shapes that an update must have exactly.
        desk: countersigns the heads of the sites' ledgers.
        names: the site of each node, where the grid knows it; else learned from receipts.
        seed: of a simulation, which repeats whom a round asks.
    """

    def __init__(
        self,
        signed: SignedContract,
        shapes: Mapping[str, Shape],
        desk: WitnessDesk,
        names: Mapping[int, str] | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1)
        self._signed, self._shapes, self.desk, self._seed = signed, shapes, desk, seed
        self._registered, self._names = dict(names or {}), dict(names or {})
        self._places = {site.name: place for place, site in enumerate(signed.contract.cohort)}
        self._retired: dict[int, str] = {}  # the process of each node that refused for good
        self._asked: dict[int, str] = {}
        self.replied: dict[str, Receipt] = {}
        self.proofs: dict[str, tuple[bytes, Extension]] = {}
        self.charged: dict[str, tuple[int, ...]] = {}
        self.refused: list[tuple[str, str]] = []
        self.update_bytes: int | None = None
        self._adds_up = False
        self._noise: Callable[[int], Callable[[int], packing.Sum]] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Returns one train order for each node that has not refused for good.

        Args:
            server_round: from 1.
            arrays: the weights as they travel (`packing.pack`); all orders share this record, so
                that it is hashed and held once.
            config: not used: what is asked stands in the contract.
            grid: knows which nodes are there.

        Raises:
            BractError: where it has no noise for the sum, which no site is then charged for.
        """
        # Only of a grid in this very process, which checks each update as `check_update` does.
        self._adds_up = bool(getattr(grid, "adds_up", False))
        self._noise = getattr(grid, "noise", None)  # a simulation's alone
        if self._signed.contract.privacy.unit == "client":
            self._server_noise()
        chosen = self.chosen(grid, server_round)
        self._asked = {node: _process_of(grid, node) for node in chosen}
        return [
            Message(
                content=wire.encode_order(
                    TrainOrder(
                        contract=self._signed,
                        round=server_round,
                        weights={},
                        witness=self.desk.witness(self._names.get(node)),
                    ),
                    packed=arrays,
                ),
                message_type=MessageType.TRAIN,
                dst_node_id=node,
                group_id=str(server_round),
            )
            for node in chosen
        ]

    def chosen(self, grid: Grid, server_round: int) -> list[int]:
        """Returns whom a round asks: all that are there, or as many as the contract says.

        The choice follows from contract and round, in a simulation from its seed and round, so
        that a round which is run again asks the same sites. It is no secret, and nobody's privacy
        rests on it.

        A simulation draws of the cohort, where the grid knows the sites of its nodes: an engine
        may number its nodes anew at each start.
        """
        nodes, wanted = self.available(grid), self._signed.contract.sites_per_round
        if wanted is None or len(nodes) <= wanted:
            return nodes
        agreed = self._signed.contract
        if self._seed is None:
            name = bytes.fromhex(agreed.sha256)
        else:
            name, nodes = str(self._seed).encode(), sorted(nodes, key=self._place)
        words = canonical.tagged("chosen/1", name, str(server_round).encode())
        chosen = np.random.default_rng(list(words)).choice(len(nodes), wanted, replace=False)
        return sorted(nodes[place] for place in chosen)

    def _place(self, node: int) -> tuple[int, int]:
        """Returns a node's place in the contract's cohort; behind it where its site is unknown."""
        return self._places.get(self._registered.get(node, ""), len(self._places)), node

    def configure_close(self, grid: Grid) -> list[Message]:
        """Returns the last message of the run, for each node that has a witness to be given."""
        messages = []
        for node in sorted(set(grid.get_node_ids())):
            seen = self.desk.witness(self._names.get(node))
            if seen is not None:
                content = wire.encode_close(CloseOrder(contract=self._signed, witness=seen))
                messages.append(Message(content, node, MessageType.QUERY, group_id="close"))
        return messages

    def available(self, grid: Grid) -> list[int]:
        """Returns the nodes that are there and have not refused for good."""
        return sorted(set(grid.get_node_ids()) - self.retired(grid))

    def retired(self, grid: Grid) -> set[int]:
        """Returns the nodes that have refused for good, and were not started anew since.

        Who mends what it refused for starts its process again.
        """
        return {
            node for node, process in self._retired.items() if _process_of(grid, node) == process
        }

    @property
    def may_pass(self) -> bool:
        """Whether a site that gave no update in the last round may give one when asked again."""
        return any(reason not in _FINAL for _, reason in self.refused)

    @property
    def uncharged(self) -> bool:
        """Whether each site without an update in the last round said that nothing was charged.

        A failure may have come behind a charge; a refusal of weights is the same however often.
        """
        reasons = {reason for _, reason in self.refused}
        return reasons == {Reason.LEDGER_UNAVAILABLE.value}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the mean of the valid updates by public weight, None where there is none.

        Flower's own average holds two more copies of every update. `replied` and `refused` then
        say who answered what, `proofs` holds each receipt's signature and links, `charged` the
        numbers of the charges that the links show, and `update_bytes` how large the largest
        accepted update was.
        """
        self.replied, self.refused, self.update_bytes = {}, [], None
        self.proofs, self.charged = {}, {}
        updates: dict[str, Arrays] = {}
        sums: dict[int, Mapping[str, packing.Sum]] = {}
        for message in list(replies):
            summed = self._summed(message)
            if summed is not None:
                if self._accept_summed(summed, server_round):
                    sums[summed.place] = summed.total
                continue
            reply = self._sort(message, server_round)
            if reply is not None:
                updates[reply.receipt.site] = reply.update.arrays
        if sums or (updates and self._signed.contract.privacy.unit == "client"):
            return packing.pack(self._of_sums(sums, updates, server_round)), None
        # In the contract's order: the sum of floats is the same whoever answers first.
        cohort = [site for site in self._signed.contract.cohort if site.name in updates]
        total = sum(site.nominal_size for site in cohort)
        average: dict[str, Array] = {}
        for site in cohort:
            share = site.nominal_size / total
            for name, value in updates.pop(site.name).items():  # each is dropped as it is added
                if name in average:
                    average[name] += value * share
                else:
                    average[name] = value * share
        return (packing.pack(average) if average else None), None

    def received(self, attempt: int, counted: bool) -> list[Received]:
        """Returns what an auditor may see of the updates that the last round took.

        Links are kept of a real run alone: of a simulation's the ledgers themselves are at hand.
        """
        agreed = self._signed.contract
        kept = agreed.witness is not None and not agreed.simulation
        return [
            Received(
                receipt=self.replied[site],
                signature=signature,
                ledger=ledger if kept else NOTHING,
                attempt=attempt,
                counted=counted,
            )
            for site, (signature, ledger) in sorted(self.proofs.items())
        ]

    def _of_sums(
        self,
        sums: Mapping[int, Mapping[str, packing.Sum]],
        updates: Mapping[str, Arrays],
        server_round: int,
    ) -> dict[str, Array]:
        """Returns the mean of a float64 sum, which the processes that trained may have formed.

        Where a client is protected the sum is noised here, and divided by the planned cohort: a
        number of replies that varies would change what one client adds.
        """
        contract = self._signed.contract
        terms = {name: contract.site(name) for name in self.replied}
        weights = {name: contract.weight(site) for name, site in terms.items() if site is not None}
        parts = [sums[place] for place in sorted(sums)]
        for name in sorted(updates):
            parts.append({k: np.float64(weights[name]) * v for k, v in updates[name].items()})
        total = {name: np.zeros(shape) for name, shape in self._shapes.items()}
        for part in parts:
            for name, value in part.items():
                total[name] += value
        divisor = sum(weights.values())
        if contract.privacy.unit == "client":
            divisor = contract.planned
            self._noise_(total, server_round)
        return {name: (value / divisor).astype(np.float32) for name, value in total.items()}

    def _noise_(self, total: Mapping[str, packing.Sum], server_round: int) -> None:
        """Adds N(0, (σC)²) to every number of a sum of clipped updates, in place."""
        privacy, draw = self._signed.contract.privacy, self._server_noise()(server_round)
        for value in total.values():
            noise = draw(value.size).reshape(value.shape)
            value += privacy.noise_multiplier * privacy.clip_norm * noise

    def _server_noise(self) -> Callable[[int], Callable[[int], packing.Sum]]:
        """Returns what draws a round's noise.

        Raises:
            BractError: where the grid has none to give: it is not bract's own simulation's.
        """
        if self._noise is None:
            raise BractError(
                "this grid has no noise for the mechanism 'user-level': use --engine local"
            )
        return self._noise

    def _summed(self, message: Message) -> SummedReply | None:
        """Returns the replies in a sum; only of a grid that adds up in this very process."""
        if not self._adds_up or message.has_error():
            return None
        return wire.decode_summed(message.content)

    def _accept_summed(self, reply: SummedReply, server_round: int) -> bool:
        """Returns whether a sum is used: where every receipt in it is accepted."""
        before, proofs = dict(self.replied), dict(self.proofs)
        for node, signed in reply.receipts.items():
            try:
                self._accept_receipt(signed, server_round, node)
            except Exception as error:
                self._refuse(self._name(node), INVALID_UPDATE, str(error))
        if len(self.replied) < len(before) + len(reply.receipts):
            for name in self.replied.keys() - before.keys():
                self._refuse(name, FAILED, "its sum holds an update that is not used")
            self.replied, self.proofs = before, proofs
            return False
        self.update_bytes = 4 * sum(math.prod(shape) for shape in self._shapes.values())
        return True

    def _sort(self, message: Message, server_round: int) -> TrainReply | None:
        """Returns the reply whose update is accepted, None where there is none."""
        node = message.metadata.src_node_id
        if message.has_error():
            self._refuse(self._name(node), FAILED, "the node gave none")
            return None
        try:
            reply = wire.decode_reply(message.content)
            if isinstance(reply, RefusalReply):
                # A node that is known speaks for its own site, whatever it calls itself.
                self._refuse(
                    self._registered.get(node, reply.site), reply.reason.value, "the site refused"
                )
                if Reason(reply.reason).final:
                    self._retire(node)
                return None
            self._accept_receipt(reply, server_round, node)
            self.update_bytes = max(self.update_bytes or 0, wire.update_bytes(message.content))
            return reply
        except RolledBack as error:
            self._refuse(self._name(node), Reason.LEDGER_ROLLED_BACK.value, str(error))
            # Asked again, it would charge its data for an update that is never used.
            self._retire(node)
        except VerificationFailed as error:
            self._refuse(self._name(node), INVALID_UPDATE, str(error))
        except Exception as error:
            # A reply is a stranger's: what it makes a reader raise must not end the run.
            self._refuse(self._name(node), INVALID_UPDATE, type(error).__name__)
        return None

    def _refuse(self, site: str, reason: str, detail: str) -> None:
        logger.warning(
            "no update of %s is used: %s",
            site,
            detail,
            extra={"event": "refused", "reason": reason, "site": site},
        )
        self.refused.append((site, reason))

    def _retire(self, node: int) -> None:
        """Asks a node's process no more: it would refuse again."""
        process = self._asked.get(node, "")
        if self._retired.get(node) == process:
            return
        self._retired[node] = process
        if process:
            logger.warning(
                "%s is not asked again before it is mended, and its client started again",
                self._name(node),
                extra={"event": "retired", "site": self._name(node)},
            )

    def _name(self, node: int) -> str:
        return self._names.get(node, f"node {node}")

    def _accept_receipt(self, reply: SignedReceipt, server_round: int, node: int) -> None:
        contract, receipt = self._signed.contract, reply.receipt
        terms = contract.site(receipt.site)
        if terms is None:
            raise VerificationFailed("from a site that the contract does not list")
        reply.verify(terms.key)
        if (receipt.contract, receipt.round) != (contract.sha256, server_round):
            raise VerificationFailed("of another contract or round")
        if isinstance(reply, TrainReply):  # else where it was added to its sum
            check_update(reply.update, contract, terms, self._shapes)
        if contract.evaluates(server_round) != (receipt.evaluation is not None):
            raise VerificationFailed("with or without an evaluation, unlike the contract's round")
        if receipt.site in self.replied:
            raise VerificationFailed("a second one from the same site")
        if self._registered.get(node, receipt.site) != receipt.site:
            raise VerificationFailed("of another site than the node's")
        self.charged[receipt.site] = self.desk.check(reply, terms.domain, contract)
        self.replied[receipt.site] = receipt
        self.proofs[receipt.site] = (reply.signature, reply.ledger)
        self._names[node] = receipt.site


def _process_of(grid: Grid, node: int) -> str:
    return grid.process_of(node) if isinstance(grid, SingleRunGrid) else ""


def check_update(
    update: Update, contract: Contract, terms: SiteTerms, shapes: Mapping[str, Shape]
) -> None:
    """Returns where an update is such as a site's honest one: mechanism, shape, finite, norm.

    Raises:
        VerificationFailed: otherwise.
    """
    mechanism = contract.privacy.mechanism
    if not isinstance(update, KINDS[mechanism]):
        raise VerificationFailed("of another mechanism than the contract's")
    fault = named.fault(update.arrays, shapes)
    if fault:
        raise VerificationFailed(fault)
    if mechanism == "dp-sgd" and named.norm(update.arrays) > greatest_norm(contract, terms, shapes):
        raise VerificationFailed("of a norm that the contract's steps cannot reach")
    if mechanism == "user-level" and named.norm(update.arrays) > contract.privacy.clip_norm:
        raise VerificationFailed("of a norm over the contract's clip norm")


def greatest_norm(contract: Contract, site: SiteTerms, shapes: Mapping[str, Shape]) -> float:
    """Returns a norm that no honest protected update comes near, from public terms alone.

    One step moves the weights by lr·(sum + noise)/(q·n). Each of b examples adds at most C to the
    sum, and the noise of d parameters has norm σ·C·√d; S steps with momentum m add up to at most
    lr·S/(1 − m) of one. b = q·n and √d are expectations, and a true n may differ from the nominal
    one: NORM_SLACK covers both by far. A finite but huge update would otherwise take the model
    beyond what sites train on (they refuse weights over 1e3) and so end the run for all.
    """
    training, privacy = contract.training, contract.privacy
    batch = contract.normaliser(site)
    noise = privacy.noise_multiplier * math.sqrt(sum(math.prod(s) for s in shapes.values()))
    step = privacy.clip_norm * (batch + 1 + noise) / batch
    reach = training.learning_rate * training.local_steps / (1 - training.momentum)
    return NORM_SLACK * reach * step
